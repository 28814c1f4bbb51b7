"""The shapes of models: hyper-parameters, GGUF metadata and tensor shapes of each preset.

Dimensions of released models, and tiny ones for tests. Fields of a preset choose the variants of a
file: `replace(PRESETS["tiny-moe"], fused_gate_up=True)`. Used by tools/synth.py; needs only numpy.
"""

from tools.presets import kimi, ling, qwen
from tools.presets.base import Preset, metadata, tensors
from tools.presets.kimi import KimiPreset
from tools.presets.ling import LingPreset
from tools.presets.qwen import QwenPreset

PRESETS: dict[str, Preset] = {p.name: p for p in (*qwen.PRESETS, *kimi.PRESETS, *ling.PRESETS)}

__all__ = ["PRESETS", "KimiPreset", "LingPreset", "Preset", "QwenPreset", "metadata", "tensors"]
