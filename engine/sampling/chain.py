"""Sampling parameters, and the sampler that draws one sequence's tokens.

Names, order and defaults are llama.cpp's: logit bias, then penalties, dry, top-n-sigma, top-k 40,
typical, top-p 0.95, min-p 0.05, xtc, temperature 0.8, draw. With mirostat 2: temperature, mirostat.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from engine.sampling import steps as samplers
from engine.sampling.params import _INF, SamplingError, SamplingParams
from engine.sampling.spec import MAX_BANNED, MAX_TOP_K, SampleSpec
from engine.sampling.steps import Breakers, Candidates
from engine.text.tokenizer import Tokenizer

# Temperatures that a device gets: no logit leaves float32's range.
_DEVICE_TEMPERATURES = (2**-10, 2**10)
# A breaker's tail is cut to this many tokens, as in llama.cpp.
_MAX_TAIL = 20


class Sampler:
    """Draws the tokens of one sequence.

    `params` must be resolved. `banned` tokens are never drawn. `breakers` are those of DRY.
    """

    def __init__(
        self, params: SamplingParams, banned: Iterable[int] = (), breakers: Breakers | None = None
    ) -> None:
        self._p = cast(Any, params)
        bias = dict(params.logit_bias) | dict.fromkeys(banned, -_INF)
        self._biased = np.fromiter(bias, np.intp, len(bias))
        self._bias = np.fromiter(bias.values(), np.float64, len(bias))
        seed = params.seed if params.seed not in (None, -1) else None
        self._rng = np.random.default_rng(seed)
        # Numbers of `draw` whose tokens have not come yet.
        self._uniforms: deque[float] = deque()
        self._breakers = breakers or {}
        self._recent: list[int] = []
        self._mu = 2.0 * self._p.mirostat_tau
        self._room = np.empty(0)
        self._steps = self._chain()
        self._is_greedy = self._takes_highest()
        self._draw = self._device_draw()

    def accept(self, token: int) -> None:
        """Count a token of the prompt or of the output for the penalties."""
        self._recent.append(token)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """SampleSpec a token from logits [n_vocab]; SamplingError if no token can be drawn."""
        if self._is_greedy:
            return self._highest(logits)
        values = self._room = _room_for(logits, self._room)
        values[:] = logits
        values[self._biased] += self._bias
        _check_finite(values.max())
        c = Candidates(_all_ids(len(values)), values)
        try:
            with np.errstate(over="raise", invalid="raise"):
                for step in self._steps:
                    c = step(c)
                chosen = samplers.draw(c, self._uniform())
        except FloatingPointError as error:
            raise SamplingError(f"parameters too extreme for the logits: {error}") from None
        if self._p.mirostat:
            surprise = -math.log2(c.probabilities()[chosen])
            self._mu -= self._p.mirostat_eta * (surprise - self._p.mirostat_tau)
        return int(c.ids[chosen])

    def _uniform(self) -> float:
        return self._uniforms.popleft() if self._uniforms else float(self._rng.random())

    def draw(self, ahead: int) -> SampleSpec | None:
        """How a device draws the token that comes `ahead` tokens after the next one.

        None if only `sample` can. Follow with `drew` for each token that was drawn so; what is
        asked for again, or sampled after all, gets the same random number.
        """
        if self._draw is None or self._is_greedy:
            return self._draw
        while len(self._uniforms) <= ahead:
            self._uniforms.append(float(self._rng.random()))
        return self._draw._replace(uniform=self._uniforms[ahead])

    def drew(self, token: int) -> None:
        """Count a token that a device drew."""
        if self._uniforms:
            self._uniforms.popleft()
        self.accept(token)

    def _active(self) -> list[str]:
        """The steps of the chain that can change anything."""
        p = self._p
        neutral = {
            "penalties": (p.repeat_penalty, p.frequency_penalty, p.presence_penalty) == (1, 0, 0),
            "dry": not p.dry_multiplier,
            "top_n_sigma": p.top_n_sigma <= 0,
            "top_k": p.top_k <= 0,
            "typ_p": p.typical_p >= 1,
            "top_p": p.top_p >= 1,
            "min_p": p.min_p <= 0,
            "xtc": p.xtc_probability <= 0 or p.xtc_threshold > 0.5,
            "temperature": p.temperature == 1 and not p.dynatemp_range,
        }
        return [name for name in p.samplers if not neutral[name]]

    def _takes_highest(self) -> bool:
        """Whether all the chain does is to find the highest logit that is not banned."""
        p = self._p
        keeps_highest = not {"penalties", "dry", "typ_p", "xtc"} & set(self._active())
        cold = p.temperature <= 0 and not p.dynatemp_range and "temperature" in p.samplers
        only_banned = bool(np.all(self._bias == -_INF))
        return keeps_highest and cold and only_banned and not p.mirostat

    def _device_draw(self) -> SampleSpec | None:
        """What the chain is as a SampleSpec, without its random number; None if it is none."""
        p, banned, steps = self._p, tuple(self._biased.tolist()), self._active()
        if len(banned) > MAX_BANNED or not np.all(self._bias == -_INF) or p.mirostat:
            return None
        if self._is_greedy:
            return SampleSpec(banned)
        in_order = [name for name in ("top_k", "top_p", "min_p", "temperature") if name in steps]
        if steps != in_order or "top_k" not in steps or p.top_k > MAX_TOP_K or p.dynatemp_range:
            return None
        draw = SampleSpec(banned, **{name: getattr(p, name) for name in steps})
        low, high = _DEVICE_TEMPERATURES
        return draw if low <= draw.temperature <= high else None

    def _highest(self, logits: NDArray[np.float32]) -> int:
        values = logits.copy()
        values[self._biased] = -_INF
        token = int(values.argmax())
        _check_finite(values[token])
        return token

    def _window(self, n: int) -> list[int]:
        return self._recent if n < 0 else self._recent[-n:] if n else []

    def _chain(self) -> list[Callable[[Candidates], Candidates]]:
        p = self._p
        steps: dict[str, Callable[[Candidates], Candidates]] = {
            "penalties": lambda c: samplers.penalties(
                c,
                self._window(p.repeat_last_n),
                p.repeat_penalty,
                p.frequency_penalty,
                p.presence_penalty,
            ),
            "dry": lambda c: samplers.dry(
                c,
                self._window(p.dry_penalty_last_n),
                p.dry_multiplier,
                p.dry_base,
                p.dry_allowed_length,
                self._breakers,
            ),
            "top_n_sigma": lambda c: samplers.top_n_sigma(c, p.top_n_sigma),
            "top_k": lambda c: samplers.top_k(c, p.top_k),
            "typ_p": lambda c: samplers.typical(c, p.typical_p),
            "top_p": lambda c: samplers.top_p(c, p.top_p),
            "min_p": lambda c: samplers.min_p(c, p.min_p),
            "xtc": lambda c: samplers.xtc(c, p.xtc_probability, p.xtc_threshold, self._rng),
            "temperature": lambda c: samplers.temperature(
                c, p.temperature, p.dynatemp_range, p.dynatemp_exponent
            ),
        }
        if p.mirostat:
            return [steps["temperature"], lambda c: samplers.mirostat(c, self._mu)]
        return [steps[name] for name in p.samplers]


# Fresh arrays of a large vocabulary take longer than what is done with them.
@functools.lru_cache(4)
def _all_ids(n: int) -> NDArray[np.intp]:
    ids = np.arange(n)
    ids.flags.writeable = False
    return ids


def _room_for(logits: NDArray[np.float32], room: NDArray[np.float64]) -> NDArray[np.float64]:
    return room if room.shape == logits.shape else np.empty(logits.shape)


def _check_finite(highest: float) -> None:
    if not math.isfinite(highest):
        raise SamplingError(f"logits: expected a finite number as the highest, got {highest}")


def sequence_breakers(tokenizer: Tokenizer, texts: Sequence[str]) -> Breakers:
    """The token sequences that spell one of `texts`, for DRY: head token -> tails.

    A head holds the whole text (its tail is then empty) or ends with the beginning of it.
    """
    found: dict[int, list[tuple[int, ...]]] = {}
    for text in texts:
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise SamplingError(f"dry_sequence_breakers: {text!r} cannot be encoded") from None
        tails = {
            n: tuple(tokenizer.encode(data[n:].decode("utf-8", "replace"))[:_MAX_TAIL])
            for n in range(1, len(data))
        }
        for token in range(tokenizer.n_vocab):
            piece = tokenizer.token_bytes(token, special=True)
            if data in piece:
                found.setdefault(token, []).append(())
                continue
            for n, tail in tails.items():
                if piece.endswith(data[:n]):
                    found.setdefault(token, []).append(tail)
    return found
