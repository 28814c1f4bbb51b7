"""Architectures by the name that a GGUF file gives."""

from engine.formats.gguf import GGUFFile, shown
from engine.models.bailingmoe3 import BailingMoe3
from engine.models.base import Model
from engine.models.hparams import ModelError
from engine.models.kimi_linear import KimiLinear
from engine.models.layers import BuildOptions
from engine.models.qwen3next import Qwen3Next
from engine.models.qwen35 import Qwen35
from engine.models.qwen35moe import Qwen35MoE

ARCHITECTURES: dict[str, type[Model]] = {
    model.name: model for model in (Qwen35, Qwen35MoE, Qwen3Next, KimiLinear, BailingMoe3)
}

__all__ = ["ARCHITECTURES", "BuildOptions", "Model", "ModelError", "load_model"]


def load_model(file: GGUFFile) -> Model:
    """The model of a file; raises ModelError if its architecture or tensors are not known."""
    kind = file.metadata.get("general.type", "model")
    if not isinstance(kind, str) or kind != "model":
        raise ModelError(f"{file.path}: expected a model, got general.type {shown(kind)}")
    arch = file.string("general.architecture")
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{file.path}: unknown architecture {shown(arch)}; known are {known}")
    if not file.tensors:
        raise ModelError(f"{file.path}: expected a model, got a vocabulary without tensors")
    if "token_embd.weight" not in file.tensors and any(".nextn." in t for t in file.tensors):
        raise ModelError(f"{file.path}: expected a model, got layers for multi-token prediction")
    return ARCHITECTURES[arch](file)
