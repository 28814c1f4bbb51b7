"""The sampler of one sequence: from its logits to its next token.

Names, order and defaults are llama.cpp's: logit bias, then the samplers of steps.py, then one
token is sampled by probability. With mirostat 2, temperature and mirostat take the samplers' place.
"""

import functools
import itertools
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from engine.sampling import steps
from engine.sampling.grammar import GrammarError, Matcher
from engine.sampling.params import LogitsProcessor, NoTokenError, SamplingError, SamplingParams
from engine.sampling.recent import Breakers
from engine.sampling.spec import MAX_BANNED, MAX_TOP_K, SampleSpec
from engine.sampling.steps import SAMPLERS, Candidates, Context

# Samplers that a device has, in its order; they are fields of SampleSpec.
_DEVICE_SAMPLERS = ("top_k", "top_p", "min_p", "temperature")
# Temperatures that a device gets: no logit leaves float32's range.
_DEVICE_TEMPERATURES = (2**-10, 2**10)


class Sampler:
    """Samples the tokens of one sequence.

    `params` must be resolved. `banned` tokens are never sampled. `breakers` are those of DRY.
    `matcher` follows params.grammar.
    """

    def __init__(
        self, params: SamplingParams, banned: Iterable[int] = (), breakers: Breakers | None = None,
        matcher: Matcher | None = None,
    ) -> None:  # fmt: skip
        self.matcher = matcher
        self._params = p = cast(Any, params)
        bias = dict(params.logit_bias) | dict.fromkeys(banned, -math.inf)
        self._biased = np.fromiter(bias, np.intp, len(bias))
        self._bias = np.fromiter(bias.values(), np.float64, len(bias))
        seed = params.seed if params.seed not in (None, -1) else None
        self._context = Context(np.random.default_rng(seed), breakers or {})
        # Random numbers given out by `sample_spec` for tokens that have not been accepted yet, and
        # all that follow: to move some of them is one call, so that no exception can lose any.
        self._uniforms: deque[float] = deque()
        self._later = iter(self._context.rng.random, None)
        self._mu = 2.0 * p.mirostat_tau
        self._processors: Sequence[LogitsProcessor] = p.logits_processors
        self._buffer = np.empty(0)
        names = ("temperature",) if p.mirostat else p.samplers
        self._active = [name for name in names if not SAMPLERS[name].is_off(p)]
        self._is_greedy = self._takes_highest()
        self._spec = self._device_spec()

    @property
    def state(self) -> dict[str, Any]:
        """What the next tokens depend on beside the tokens so far, for JSON."""
        bits: Any = self._context.rng.bit_generator
        return {"rng": bits.state, "uniforms": list(self._uniforms), "mu": self._mu}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. Raises SamplingError for what is none."""
        try:
            self._context.rng.bit_generator.state = state["rng"]
            self._uniforms = deque(map(float, state["uniforms"]))
            self._mu = float(state["mu"])
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise SamplingError(f"expected a sampler's state, got another one: {error!r}") from None

    def accept(self, *tokens: int) -> None:
        """Count tokens of the prompt or of the output for the penalties."""
        self._context.recent += tokens

    def accept_output(self, *tokens: int) -> None:
        """`accept` tokens of the output, which a grammar must allow."""
        self.accept(*tokens)
        if self.matcher is not None:
            self.matcher.accept(*tokens)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Sample a token from logits [n_vocab]; SamplingError or GrammarError if none can be."""
        for processor in self._processors:
            logits = _processed(processor, self._context.recent, logits)
        # A grammar comes before everything that chooses among tokens.
        ids = None if self.matcher is None else self.matcher.allowed(len(logits))
        if self._is_greedy:
            allowed = logits.copy()
            allowed[self._biased] = -math.inf
            allowed = allowed if ids is None else allowed[ids]
            self._check_finite(allowed.max(), ids)
            chosen = int(allowed.argmax())
            return chosen if ids is None else int(ids[chosen])
        if self._buffer.shape != logits.shape:
            self._buffer = np.empty(logits.shape)
        values = self._buffer
        values[:] = logits
        values[self._biased] += self._bias
        if ids is not None:
            values = values[ids]
        self._check_finite(values.max(), ids)
        try:
            with np.errstate(over="raise", invalid="raise"):
                c = Candidates(_all_ids(len(values)) if ids is None else ids, values)
                for name in self._active:
                    c = SAMPLERS[name].apply(c, self._params, self._context)
                if self._params.mirostat:
                    c = steps.mirostat(c, self._mu)
                chosen = steps.sample(c, self._uniform())
        except FloatingPointError as error:
            raise NoTokenError(f"parameters too extreme for the logits: {error}") from None
        if self._params.mirostat:
            surprise = -math.log2(c.probabilities()[chosen])
            self._mu -= self._params.mirostat_eta * (surprise - self._params.mirostat_tau)
        return int(c.ids[chosen])

    def _check_finite(self, highest: float, allowed: NDArray[np.intp] | None) -> None:
        if self.matcher is not None and allowed is not None and highest == -math.inf:
            raise GrammarError(
                f"expected one that the other parameters allow, got one that needs "
                f"{self.matcher.named(allowed.tolist())} here, which logit_bias, ignore_eos or a "
                "logits processor forbids"
            )
        if not math.isfinite(highest):
            kind = NoTokenError if highest == -math.inf else SamplingError  # All are banned.
            raise kind(f"logits: expected a finite number as the highest, got {highest}")

    def _uniform(self) -> float:
        return self._uniforms.popleft() if self._uniforms else float(self._context.rng.random())

    @property
    def is_for_device(self) -> bool:
        """Whether a device can sample its tokens."""
        return self._spec is not None

    def sample_spec(self, ahead: int) -> SampleSpec | None:
        """How a device samples the token `ahead` tokens after the next; None if only `sample` can.

        `accept_sampled` each token so sampled: it has one random number, whoever samples it.
        """
        if self._spec is None or self._is_greedy:
            return self._spec
        if (n_missing := ahead + 1 - len(self._uniforms)) > 0:
            self._uniforms.extend(itertools.islice(self._later, n_missing))
        return self._spec._replace(uniform=self._uniforms[ahead])

    def mask(self) -> NDArray[np.uint32] | None:
        """The mask of its grammar for the next token, for a device; None if it is not ready, or if
        `sample` has to say why there is no token."""
        matcher = self.matcher
        assert matcher is not None
        if not matcher.is_ready:
            return None
        try:
            bits = matcher.bits()
        except GrammarError:
            return None
        left = bits.copy()
        for i in self._biased.tolist():  # They are bans, for a device.
            left[i // 32] &= ~np.uint32(1 << i % 32)
        return bits if left.any() else None

    def accept_sampled(self, token: int) -> None:
        """`accept` a token that a device sampled."""
        if self._uniforms:
            self._uniforms.popleft()
        self.accept_output(token)

    def _only_bans(self) -> bool:
        """Whether no logit is changed by its bias but those of tokens that are banned."""
        return bool(np.all(self._bias == -math.inf))

    def _takes_highest(self) -> bool:
        """Whether the chain as a whole chooses the highest logit that is not banned."""
        p = self._params
        keeps_highest = all(SAMPLERS[name].keeps_highest for name in self._active)
        is_cold = p.temperature <= 0 and not p.dynatemp_range and "temperature" in p.samplers
        return keeps_highest and is_cold and self._only_bans() and not p.mirostat

    def _device_spec(self) -> SampleSpec | None:
        """The chain as a SampleSpec without its random number; None if a device can't run it."""
        p, banned, active = self._params, tuple(self._biased.tolist()), self._active
        if p.logits_processors or p.logprobs is not None:
            return None
        if len(banned) > MAX_BANNED or not self._only_bans() or p.mirostat:
            return None
        is_masked = self.matcher is not None
        if self._is_greedy:
            return SampleSpec(banned, is_masked=is_masked)
        in_order = [name for name in _DEVICE_SAMPLERS if name in active]
        if active != in_order or "top_k" not in active or p.top_k > MAX_TOP_K or p.dynatemp_range:
            return None
        own = {name: getattr(p, name) for name in active}
        spec = SampleSpec(banned, is_masked=is_masked, **own)
        low, high = _DEVICE_TEMPERATURES
        return spec if low <= spec.temperature <= high else None


# Kept, because making the ids of a large vocabulary takes longer than sampling from it.
@functools.lru_cache(4)
def _all_ids(n: int) -> NDArray[np.intp]:
    ids = np.arange(n)
    ids.flags.writeable = False
    return ids


def _processed(
    processor: LogitsProcessor, tokens: Sequence[int], logits: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What a user's function makes of logits. Raises SamplingError if that is no such array."""
    made = np.asarray(processor(tokens, logits.copy()))
    if made.shape != logits.shape or made.dtype.kind not in "fiu":
        came = f"{made.dtype} {list(made.shape)}"
        expected = f"numbers [{len(logits)}]"
        raise SamplingError(f"logits_processors: expected {expected} back, got {came}")
    if np.isnan(made).any():
        raise SamplingError("logits_processors: expected numbers back, got NaN")
    with np.errstate(over="ignore"):  # What is infinite then is no logit, and refused.
        return made.astype(np.float32)
