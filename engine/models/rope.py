"""A file's rope: its base, and how it is scaled for contexts longer than those of the training.

Linear scaling divides every pair's speed by a factor. YaRN (arXiv 2309.00071) divides the speeds
of slow pairs, keeps those of fast ones, goes from one to the other in between, and multiplies cos
and sin. Keys, defaults and formulas are llama.cpp's.
"""

import math

from engine.formats.gguf import shown
from engine.models.hparams import HParams
from engine.ops.rope import RopeScaling

_PREFIX = "rope.scaling."
# llama.cpp replaces a file's yarn_attn_factor, and only reports whether it is finetuned.
_KEYS = {
    "type", "factor", "original_context_length", "attn_factor", "yarn_ext_factor", "yarn_beta_fast",
    "yarn_beta_slow", "yarn_attn_factor", "yarn_log_multiplier", "finetuned",
}  # fmt: skip


def read_rope(hp: HParams, n_rot: int) -> tuple[float, RopeScaling]:
    """Base and scaling of a rope that turns n_rot entries of a head. ModelError if the file has
    values that make no sense, or a key of scaling that the engine does not know."""
    # With a base below 1, pairs would turn faster and faster.
    base = hp.number("rope.freq_base", 10000.0, minimum=1)
    _refuse_unknown(hp)
    kind = hp.file.string(f"{hp.arch}.{_PREFIX}type", "")
    if kind not in ("", "none", "linear", "yarn"):
        raise hp.fail(_PREFIX + "type", "none, linear or yarn", shown(kind))
    factor, magnitude = _factor(hp, kind), hp.number(_PREFIX + "attn_factor", 1.0)
    # The part of their own speed that fast pairs keep.
    kept = hp.number(_PREFIX + "yarn_ext_factor", float(kind == "yarn"), minimum=0)
    if kept > 1:
        raise hp.fail(_PREFIX + "yarn_ext_factor", "at most 1", kept)
    if kept == 0 or factor == 1:
        return base, RopeScaling(1 / factor, 1 / factor, magnitude=magnitude)
    low, high = _band(hp, n_rot, base)
    first, magnitude = kept + (1 - kept) / factor, magnitude * (1 + 0.1 * math.log(factor))
    return base, RopeScaling(first, 1 / factor, low, max(0.001, high - low), magnitude)


def _refuse_unknown(hp: HParams) -> None:
    prefix = f"{hp.arch}.{_PREFIX}"
    for name, value in hp.file.metadata.items():
        key = name.removeprefix(prefix)
        if name.startswith(prefix) and key not in _KEYS:
            raise hp.fail(_PREFIX + key, "none (not implemented)", shown(value))
    key = _PREFIX + "yarn_log_multiplier"
    if (value := hp.file.number(f"{hp.arch}.{key}", 0.0)) != 0:
        raise hp.fail(key, "0 (not implemented)", value)


def _factor(hp: HParams, kind: str) -> float:
    """The factor of a kind of scaling, 1 for none. A factor without a kind means linear scaling,
    but 0 then means none."""
    if kind == "none":
        return 1.0
    key, old = _PREFIX + "factor", "rope.scale_linear"
    if f"{hp.arch}.{key}" not in hp.file.metadata and f"{hp.arch}.{old}" in hp.file.metadata:
        key = old
    if not kind and hp.file.number(f"{hp.arch}.{key}", 0.0) == 0:
        return 1.0
    return hp.number(key, minimum=1)


def _band(hp: HParams, n_rot: int, base: float) -> tuple[float, float]:
    """Up to which pair speeds are kept, and from which on they are divided: the pairs that turn
    beta_fast and beta_slow times in the context of the training."""
    if base == 1:
        raise hp.fail("rope.freq_base", "more than 1 with yarn", base)
    n_orig = hp.integer(_PREFIX + "original_context_length", hp.integer("context_length"))

    def pair(beta: float) -> float:
        # A quotient could overflow.
        turns = math.log(n_orig) - math.log(beta) - math.log(2 * math.pi)
        return n_rot * turns / (2 * math.log(base))

    low = math.floor(pair(hp.number(_PREFIX + "yarn_beta_fast", 32.0)))
    high = math.ceil(pair(hp.number(_PREFIX + "yarn_beta_slow", 1.0)))
    return max(low, 0), min(high, n_rot - 1)
