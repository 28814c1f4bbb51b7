"""The prefix cache's tier on the host: what a device has no room for goes there and comes back.

The reference is the same prompt without the cache, and the device's memory, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.kvcache.cache import PrefixCache
from engine.kvcache.tier import HostTier
from tests.support.cuda_devices import ON_DEVICES, MakeDevice, cuda_and_others, engine_on
from tests.support.helpers import N_VOCAB, assert_all_free
from tests.support.states import save

Models = Callable[[str, str], Path]
GREEDY = SamplingParams(temperature=0, max_tokens=3)
N_TOKENS = 150


@pytest.fixture
def engine(make_device: MakeDevice, models: Models) -> Iterator[Engine]:
    """One whose device has room for two states and eight blocks beside what runs."""
    backends = cuda_and_others(make_device(0), batch_invariant=True)
    options = {"n_ctx": 512, "n_ubatch": 64, "cache_ram": 64}
    with engine_on(models("tiny", "F32"), backends, **options) as engine:
        cache_of(engine).room = replace(cache_of(engine).room, n_states=2, n_blocks=8)
        yield engine


def cache_of(engine: Engine) -> PrefixCache:
    return engine.loop.scheduler.cache


def tier_of(engine: Engine) -> HostTier:
    tier = cache_of(engine).tier
    assert tier is not None
    return tier


@ON_DEVICES
def test_prompts_go_on_from_states_on_the_host(engine: Engine, rng: np.random.Generator) -> None:
    prompts = [rng.integers(0, N_VOCAB, N_TOKENS).tolist() for _ in range(3)]
    wanted = [engine.generate(p, GREEDY, cache_prompt=False).wait().tokens for p in prompts]
    for _ in range(2):
        for prompt, tokens in zip(prompts, wanted, strict=True):
            done = engine.generate(prompt, GREEDY).wait()
            assert done.tokens == tokens
    # Each of the second round found the state at the last multiple of 64 before its end.
    assert engine.cache.counts.n_reused == len(prompts) * 128
    assert tier_of(engine).n_bytes > 0
    assert 0 < engine.cache.n_bytes <= engine.cache.budget
    assert_all_free(engine)
    assert tier_of(engine).n_bytes == 0


@ON_DEVICES
def test_contents_come_back_bit_for_bit(engine: Engine, rng: np.random.Generator) -> None:
    """Also after the device's memory was overwritten."""
    tier, memory = tier_of(engine), cache_of(engine).memory
    (states,) = engine.loop.executable.stores[:1]
    seq = memory.create()
    engine.prefill(seq, rng.integers(0, N_VOCAB, N_TOKENS).tolist())
    own = memory.allocation(seq)
    before = [save(states, "n_slots", own.state.slot)]
    before += [save(states, "n_blocks", block) for block in own.table.blocks]
    stored = tier.store(own)
    again = tier.store(own)
    assert stored is not None
    assert again is not None
    # Full blocks are there once.
    assert [a == b for a, b in zip(stored.blocks, again.blocks, strict=True)] == [1, 1, 0]
    for slot in own.state.slots:
        states.zero("n_slots", slot)
    for block in own.table.blocks:
        states.zero("n_blocks", block)
    memory.free(seq)
    loaded = memory.create()
    tier.load(again, loaded)
    own = memory.allocation(loaded)
    after = [save(states, "n_slots", own.state.slot)]
    after += [save(states, "n_blocks", block) for block in own.table.blocks]
    for was, now in zip(before, after, strict=True):
        for name, values in was.items():
            np.testing.assert_array_equal(values, now[name])
    # What came back is known to be there.
    third = tier.store(own)
    assert third is not None
    assert third.blocks[:2] == stored.blocks[:2]
    for each in (stored, again, third):
        tier.free(each)
    assert tier.n_bytes == 0
    memory.free(loaded)


@ON_DEVICES
def test_a_block_that_was_written_anew_is_copied_anew(
    engine: Engine, rng: np.random.Generator
) -> None:
    tier, memory = tier_of(engine), cache_of(engine).memory
    kept = []
    for _ in range(2):
        seq = memory.create()
        engine.prefill(seq, rng.integers(0, N_VOCAB, 64).tolist())
        kept.append((memory.allocation(seq).table.blocks, tier.store(memory.allocation(seq))))
        memory.free(seq)
    (first, one), (second, other) = kept
    assert one is not None
    assert other is not None
    assert first == second
    assert one.blocks != other.blocks


@ON_DEVICES
def test_a_host_without_room_gives_up_states(engine: Engine, rng: np.random.Generator) -> None:
    """Nothing fails: what the tier can't take is given up."""
    cache = cache_of(engine)
    cache.tier = HostTier(tier_of(engine)._mover, cache.memory, 2 * cache.room.state_bytes)
    for _ in range(4):
        prompt = rng.integers(0, N_VOCAB, N_TOKENS).tolist()
        wanted = engine.generate(prompt, GREEDY, cache_prompt=False).wait().tokens
        for _ in range(2):
            assert engine.generate(prompt, GREEDY).wait().tokens == wanted
    assert engine.cache.counts.n_evicted > 0
    assert_all_free(engine)
