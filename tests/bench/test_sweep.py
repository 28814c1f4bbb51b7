"""sweep-bench: each row is measured at its depth and printed in ik_llama.cpp's formats."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine
from engine.bench import measure, plots
from engine.bench.facts import cpu_name, sequence_bytes
from engine.bench.measure import BenchError, Case, Measurement, measure_and_extend, sequences
from engine.commands.sweep_bench import _TABLE, _values, context_needed, depths
from engine.runtime.batch import Chunk
from tests.support.helpers import Cli, assert_all_free
from tests.support.states import save

Rng = np.random.Generator
PREFIX = "main: n_kv_max = {}, n_batch = {}, n_ubatch = {}, flash_attn = 1, n_gpu_layers = 0, "
HEAD = [
    "|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |",
    "|-------|--------|--------|----------|----------|----------|----------|",
]
# The speeds of small models may have more digits than a column.
LINE = re.compile(
    r"\|([ \d]{6}) \| ([ \d]{6}) \| ([ \d]{6}) \| ([ \d.]{8}) \| ([ \d.]{8,}) "
    r"\| ([ \d.]{8}) \| ([ \d.]{8,}) \|"
)
IK_KEYS = "n_kv_max n_batch n_ubatch flash_attn n_gpu_layers n_threads n_threads_batch pp tg n_kv"
IK_SPEEDS = "t_pp speed_pp t_tg speed_tg"
OUR_FACTS = "model_filename model_type machine"
OUR_KEYS = "backend graph_nodes state_bytes kv_bytes rss_hwm_mib vram_delta_mib"
KEYS = f"{IK_KEYS} {IK_SPEEDS} {OUR_FACTS} {OUR_KEYS}".split()


def contents(engine: Engine, seq: int) -> list[dict[str, Any]]:
    """The recurrent state and the KV cache of a sequence, from every store."""
    span, size = engine.memory.allocation(seq), engine.capacity.block_size
    saved: list[dict[str, Any]] = []
    for store in engine.loop.executable.stores:
        saved.append({} if span.state.slot < 0 else save(store, "n_slots", span.state.slot))
        for i, block in enumerate(span.table.blocks):
            kv = save(store, "n_blocks", block)  # [..., block_size, head_dim] each
            assert all(array.shape[-2] == size for array in kv.values())
            filled = min(size, span.n_tokens - i * size)
            saved.append({name: array[..., :filled, :] for name, array in kv.items()})
    return saved


def assert_identical(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [list(part) for part in got] == [list(part) for part in expected]
    for part, other in zip(got, expected, strict=True):
        for name in part:
            assert part[name].any(), name
            assert part[name].tobytes() == other[name].tobytes(), name


@pytest.fixture
def engine_for(path: Path) -> Any:
    def load(n_kv_max: int, n_ubatch: int, n_gen: int) -> Engine:
        n_ctx = context_needed(n_kv_max, n_ubatch, n_gen)
        return Engine.load(path, n_ctx=n_ctx, n_ubatch=n_ubatch, n_checkpoints=1)

    return load


def sweep(
    engine: Engine, seq: int, n_kv_max: int, n_prompt: int, n_gen: int, rng: Rng, repeats: int = 1
) -> Iterator[Measurement]:
    """The rows of a sweep of one sequence, as the command measures them."""
    for _ in depths(n_kv_max, n_prompt):
        yield measure_and_extend(engine, seq, n_prompt, n_gen, rng, repeats)


@pytest.mark.parametrize(
    ("n_kv_max", "n_ubatch", "n_gen", "repeats"), [(192, 64, 5, 1), (90, 30, 70, 2)]
)
def test_a_sequence_holds_only_its_prompts(
    engine_for: Any, rng: Rng, n_kv_max: int, n_ubatch: int, n_gen: int, repeats: int
) -> None:
    tokens: list[int] = []
    with (
        engine_for(n_kv_max, n_ubatch, n_gen) as engine,
        engine_for(n_kv_max, n_ubatch, n_gen) as plain,
    ):
        step = engine.step

        def recorded(chunks: Sequence[Chunk]) -> Any:
            tokens.extend(token for chunk in chunks for token in chunk.tokens)
            return step(chunks)

        engine.step = recorded
        seq, alone = engine.memory.create(), plain.memory.create()
        for m in sweep(engine, seq, n_kv_max, n_ubatch, n_gen, rng, repeats):
            assert m.case.n_depth == plain.memory.n_tokens(alone)
            prompt = tokens[:n_ubatch]
            assert tokens == prompt * repeats
            plain.prefill(alone, prompt)
            tokens.clear()
            assert engine.memory.n_tokens(seq) == m.case.n_depth + n_ubatch
            assert_identical(contents(engine, seq), contents(plain, alone))
        assert m.case.n_depth == n_kv_max - n_ubatch
        engine.memory.free(seq)
        assert_all_free(engine)


def test_generation_starts_at_the_depth_of_its_row(
    tiny: Path, rng: Rng, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not change the sequence."""
    seen: list[int] = []
    plain = measure.time_generation

    def watched(engine: Engine, first: Any, n: int, after: Any) -> float:
        before = contents(engine, seq)
        seen.append(after[0].n_tokens)
        seconds = plain(engine, first, n, after)
        assert_identical(contents(engine, seq), before)
        return seconds

    monkeypatch.setattr(measure, "time_generation", watched)
    with Engine.load(tiny, n_ctx=200, n_ubatch=40, n_checkpoints=1) as engine:
        seq = engine.memory.create()
        list(sweep(engine, seq, 120, 40, 9, rng, repeats=2))
    assert seen == [0, 0, 40, 40, 80, 80]


@pytest.mark.parametrize(
    ("n_kv_max", "n_prompt", "n_gen"), [(64, 64, 1), (100, 33, 200), (129, 64, 64), (5, 1, 1)]
)
def test_the_context_just_suffices(
    tiny: Path, rng: Rng, n_kv_max: int, n_prompt: int, n_gen: int
) -> None:
    n_ctx = context_needed(n_kv_max, n_prompt, n_gen)
    with Engine.load(tiny, n_ctx=n_ctx, n_ubatch=n_prompt, n_checkpoints=1) as engine:
        with sequences(engine, 1) as (seq,):
            measure_and_extend(engine, seq, n_prompt, min(n_gen, 4), rng)
        assert_all_free(engine)
        seq = engine.memory.create()
        measured = list(sweep(engine, seq, n_kv_max, n_prompt, n_gen, rng))
    assert [m.case.n_depth for m in measured] == list(range(0, n_kv_max, n_prompt))


def test_a_context_that_is_too_small_is_an_error(tiny: Path, rng: Rng) -> None:
    with Engine.load(tiny, n_ctx=64, n_ubatch=64, n_checkpoints=1) as engine:
        seq = engine.memory.create()
        with pytest.raises(BenchError, match="expected 100 tokens in 100 steps"):
            list(sweep(engine, seq, 64, 64, 100, rng))
        engine.memory.free(seq)
        assert_all_free(engine)


def test_medians(tiny: Path, rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, generation = iter([5.0, 2.0, 3.0]), iter([8.0, 1.0, 4.0])
    monkeypatch.setattr(measure, "time_prompts", lambda *_: next(prompt))
    monkeypatch.setattr(measure, "time_generation", lambda *_: next(generation))
    with Engine.load(tiny, n_ctx=64, n_checkpoints=1) as engine:
        m = measure_and_extend(engine, engine.memory.create(), 6, 8, rng, 3)
    assert (m.prompt_s, m.gen_s) == ([5.0, 2.0, 3.0], [8.0, 1.0, 4.0])
    assert m.medians() == {"t_pp": 3.0, "speed_pp": 2.0, "t_tg": 4.0, "speed_tg": 2.0}


def test_a_table_line() -> None:
    values = _values(Measurement(Case(512, 128, 1024), [2.0], [3.2]))
    assert _TABLE.line(list(values.values())) == (
        "|   512 |    128 |   1024 |    2.000 |   256.00 |    3.200 |    40.00 |"
    )
    assert _TABLE.head().split("\n") == HEAD


@pytest.mark.parametrize("form", [(), ("--output-format", "md"), ("--output-format", "table")])
def test_the_table(tiny: Path, cli: Cli, form: tuple[str, ...]) -> None:
    status, out, err = cli("sweep-bench", "-m", tiny, "-c", 70, "-ub", 32, "-b", 64, "-n", 3, *form)
    assert (status, err) == (0, "")
    empty, header, *facts, blank = out.removesuffix("\n").split("\n")[:-5]
    table = out.removesuffix("\n").split("\n")[-5:]
    assert facts == [
        f"main: model_filename = {tiny}", "main: model_type = qwen35 Q8_0",
        f"main: machine = {cpu_name()}",
    ]  # fmt: skip
    assert (empty, blank) == ("", "")
    pattern = re.escape(PREFIX.format(70, 64, 32)) + r"n_threads = (\d+), n_threads_batch = \1"
    assert re.fullmatch(pattern, header)
    assert table[:2] == HEAD
    rows = [[float(cell) for cell in LINE.fullmatch(line).groups()] for line in table[2:]]  # type: ignore[union-attr]
    assert [row[:3] for row in rows] == [[32, 3, n_kv] for n_kv in (0, 32, 64)]
    for pp, tg, _, t_pp, s_pp, t_tg, s_tg in rows:
        # Seconds are rounded to milliseconds, which is coarse for short runs.
        assert pp / s_pp == pytest.approx(t_pp, abs=0.000501)
        assert tg / s_tg == pytest.approx(t_tg, abs=0.000501)
    assert [(p.n_kv, p.speed_pp, p.speed_tg) for p in plots.parse_points(out)] == [
        (row[2], row[4], row[6]) for row in rows
    ]


def test_json_lines(tiny: Path, cli: Cli) -> None:
    options = ("-c", 64, "-ub", 32, "-nrep", 2, "--no-warmup", "--output-format", "jsonl")
    status, out, err = cli("sweep-bench", "-m", tiny, *options)
    assert (status, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [list(row) for row in rows] == [KEYS, KEYS]
    assert [row["n_kv"] for row in rows] == [0, 32]
    with Engine.load(tiny) as engine:
        n_nodes = len(engine.plan.graph.nodes)
    for row in rows:
        assert math.isclose(row["speed_pp"] * row["t_pp"], row["pp"])
        assert math.isclose(row["speed_tg"] * row["t_tg"], row["tg"])
        assert (row["n_kv_max"], row["n_batch"], row["n_ubatch"]) == (64, 2048, 32)
        assert (row["pp"], row["tg"], row["flash_attn"], row["n_gpu_layers"]) == (32, 8, 1, 0)
        assert (row["backend"], row["graph_nodes"]) == ("cpu", n_nodes)
        assert (row["model_filename"], row["model_type"]) == (str(tiny), "qwen35 Q8_0")
        assert row["machine"] == cpu_name()
        assert (row["vram_delta_mib"], row["rss_hwm_mib"] > 1) == (0.0, True)
    assert [(p.n_kv, p.speed_pp, p.speed_tg) for p in plots.parse_points(out)] == [
        (row["n_kv"], row["speed_pp"], row["speed_tg"]) for row in rows
    ]


def test_bytes_are_those_a_sequence_fills(path: Path, rng: Rng) -> None:
    with Engine.load(path, n_ctx=256, n_ubatch=64, n_checkpoints=3) as engine:
        seq = engine.memory.create()
        engine.prefill(seq, [1] * 100)
        span = engine.memory.allocation(seq)
        (store,) = engine.loop.executable.stores
        state = sum(a.nbytes for a in save(store, "n_slots", span.state.slot).values())
        block = sum(a.nbytes for a in save(store, "n_blocks", span.table.blocks[0]).values())
        assert sequence_bytes(engine, 100) == (state, block * 100 // 64)


@pytest.mark.parametrize("warm", [True, False])
def test_the_warm_up_is_not_printed(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    generated: list[int] = []

    def note(engine: Engine, first: object, n: int, after: object) -> float:
        generated.append(n)
        return 1.0

    monkeypatch.setattr(measure, "time_generation", note)
    form = ("--output-format", "jsonl", *(() if warm else ("--no-warmup",)))
    status, out, _ = cli("sweep-bench", "-m", tiny, "-c", 32, "-ub", 32, *form)
    assert (status, out.count("\n")) == (0, 1)
    assert generated == ([4, 8] if warm else [8])


def test_rows_are_printed_as_they_are_measured(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([1.0, 1.0])

    def interrupted(*_: object) -> float:
        if (seconds := next(times, None)) is None:
            raise KeyboardInterrupt
        return seconds

    monkeypatch.setattr(measure, "time_generation", interrupted)
    options = ("-c", 16, "-ub", 4, "--no-warmup", "--output-format", "jsonl")
    status, out, _ = cli("sweep-bench", "-m", tiny, *options)
    assert status == 130
    assert [json.loads(line)["n_kv"] for line in out.splitlines()] == [0, 4]


def test_the_plot(tiny: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.bench.facts.cpu_name", lambda: "A CPU")
    picture = tmp_path / "a.svg"
    options = ("-c", 8, "-ub", 8, "-t", 1, "--plot", picture)
    status, out, err = cli("sweep-bench", "-m", tiny, *options)
    assert (status, err, out.count("\n")) == (0, "", 9)
    title = f"{tiny.name}, qwen35 Q8_0 · A CPU · 1 thread"
    assert f"<!-- {title} -->" in picture.read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("-c", 64, "-ub", 128), "argument -c: expected at least the 128 of -ub, got 64"),
        (("-c", 64), "argument -c: expected at least the 512 of -ub, got 64"),
        (("-c", 0), "expected at least 1, got 0"),
        (("-ub", 0), "expected at least 1, got 0"),
        (("-n", 0), "expected at least 1, got 0"),
        (("-b", -1), "expected at least 1, got -1"),
        (("-nrep", 0), "expected at least 1, got 0"),
        (("-c", "x"), "invalid integer value: 'x'"),
        (("--output-format", "csv"), "invalid choice: 'csv'"),
    ],
)
def test_usage_errors(tiny: Path, cli: Cli, options: tuple[object, ...], expected: str) -> None:
    result = cli("sweep-bench", "-m", tiny, *options)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert expected in result.err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--plot", "{}/no/a.png"), "{}/no/a.png: No such file or directory"),
        (("--plot", "{}/a.bmp"), "{}/a.bmp: expected a name that ends in .png, .svg, .pdf"),
        (("--plot", "{}/d.png"), "{}/d.png: Is a directory"),
        (("-c", 2**31), "n_ctx: expected at most 2147483647, got 2147483776"),
    ],
)
def test_refusals_before_anything_is_measured(
    tiny: Path, cli: Cli, tmp_path: Path, options: tuple[object, ...], expected: str
) -> None:
    (tmp_path / "d.png").mkdir()
    given = [str(option).format(tmp_path) for option in options]
    line = cli("sweep-bench", "-m", tiny, *given).refused()
    assert line.startswith(expected.format(tmp_path))
