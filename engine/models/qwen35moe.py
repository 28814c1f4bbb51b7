"""Qwen3.5 mixture of experts (`qwen35moe`)."""

from engine.models.hybrid import MoEHybrid


class Qwen35MoE(MoEHybrid):
    """Qwen3.5's layers with routed experts and a gated shared one instead of the feed-forward."""

    name = "qwen35moe"
