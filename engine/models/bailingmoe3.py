"""Ling 3.0 (`bailingmoe3`): Kimi delta attention (KDA) with latent attention (MLA) in between.

Decays have a lower bound. They and the output gates have full matrices. MLA has a rope, a gate for
each head, and in some files low-rank queries. Experts may be chosen by groups and clamped. Follows
llama.cpp's files, transformers' `bailing_hybrid`, and for clamps inclusionAI's vLLM.
"""

import logging
from dataclasses import replace

from engine.formats.gguf import shown
from engine.graph import Shape
from engine.models.hparams import HParams, ModelError
from engine.models.kda_hybrid import KdaHybrid
from engine.models.rope import read_rope
from engine.ops.router import Routing

_CLAMPS = ("swiglu_clamp_exp", "swiglu_clamp_shexp")
# Layers of Ling-3.0-flash, of whose files early ones lack the clamps that the model needs.
_CLAMPED_LAYERS = 42
_log = logging.getLogger(__name__)


class BailingMoe3(KdaHybrid):
    name = "bailingmoe3"

    def _read(self, hp: HParams, n_entries: int) -> None:
        self._refuse_variants(hp)
        super()._read(hp, n_entries)
        bound = hp.file.number(f"{hp.arch}.kda.gate_lower_bound")
        if bound >= 0:
            raise hp.fail("kda.gate_lower_bound", "a negative number", bound)
        self.delta_net = replace(self.delta_net, lower_bound=bound)
        d_pe = self.latent.d_pe
        if d_pe % 2:
            raise hp.fail("rope.dimension_count", "an even number", d_pe)
        q_rank = hp.integer("attention.q_lora_rank", 0, minimum=0)
        rope = (d_pe, *read_rope(hp, d_pe))
        self.latent = replace(self.latent, rope=rope, q_rank=q_rank, gated=True)
        self.limits = self._read_limits(hp, n_entries)

    def _refuse_variants(self, hp: HParams) -> None:
        """Raise ModelError for files that other formulas would be needed for."""
        if not hp.file.boolean(f"{hp.arch}.kda.safe_gate", True):
            raise hp.fail("kda.safe_gate", "true (false is not implemented)", "false")
        sections = f"{hp.arch}.rope.dimension_sections"
        if (value := hp.file.metadata.get(sections)) is not None:
            message = "none (vision-language models are not implemented)"
            raise hp.fail("rope.dimension_sections", message, shown(value))
        for i in range(self.n_layers):
            for name in ("ssm_f.weight", "ssm_g.weight"):
                if self._has(i, name):
                    message = "expected ssm_f_a and ssm_g_a (this file is an older fork's)"
                    raise ModelError(f"{hp.file.path}: {message}, got blk.{i}.{name}")

    def _read_limits(self, hp: HParams, n_entries: int) -> list[tuple[float, float]]:
        if self.n_layers == _CLAMPED_LAYERS and not any(map(hp.has, _CLAMPS)):
            message = "%s: no %s: an early file of Ling-3.0-flash, which writes garbage without"
            _log.warning(message, hp.file.path, " and ".join(f"{hp.arch}.{key}" for key in _CLAMPS))
        exp, shexp = (hp.numbers(key, n_entries, 0.0) for key in _CLAMPS)
        return list(zip(exp, shexp, strict=True))

    def _routing(self, hp: HParams, routing: Routing) -> Routing:
        keys = ("expert_group_count", "expert_group_used_count")
        n_groups, n_used = (hp.integer(key, 0, minimum=0) for key in keys)
        groups = (n_groups, n_used) if n_groups > 1 else (1, 1)
        normalized = hp.file.boolean(f"{hp.arch}.expert_weights_norm", False)
        return replace(routing, groups=groups, normalized=normalized)

    def _shared_size(self, hp: HParams, d_ff: int) -> int:
        size = d_ff * hp.integer("expert_shared_count", 1)
        return hp.integer("expert_shared_feed_forward_length", size)

    def _gate_weights(self, n_rows: int, d_head: int) -> dict[str, Shape]:
        return {f"ssm_{part}_a.weight": (n_rows, self.n_embd) for part in "fg"}

    def _latent_weights(self, i: int) -> dict[str, Shape]:
        s, shapes = self._latent(i), super()._latent_weights(i)
        if s.q_rank:
            n_rows, n_embd = shapes.pop("attn_q.weight")
            shapes |= {
                "attn_q_a.weight": (s.q_rank, n_embd),
                "attn_q_a_norm.weight": (s.q_rank,),
                "attn_q_b.weight": (n_rows, s.q_rank),
            }
        return shapes | {"attn_gate.weight": (s.n_heads, self.n_embd)}
