"""The tiny presets by what they have: a new architecture is in all tests that go by these lists."""

from __future__ import annotations

from tools.presets import PRESETS, KimiPreset

TINY = tuple(name for name in PRESETS if name.startswith("tiny"))
_BY_ARCH = {PRESETS[name].arch: name for name in reversed(TINY)}
# The first one of every architecture.
ONE_OF_EACH = tuple(name for name in TINY if name in _BY_ARCH.values())
WITH_EXPERTS = tuple(name for name in TINY if PRESETS[name].n_experts)
# KDA and latent attention.
WITH_LATENTS = tuple(name for name in TINY if isinstance(PRESETS[name], KimiPreset))
