"""bench and batched-bench: llama.cpp's tables; every run processes what its row says."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from gguf import GGUFReader

from engine import Engine
from engine.bench.facts import ModelFacts
from engine.bench.measure import BenchError, Case, measure
from engine.commands.bench import cases_of, warm_up_case
from engine.engine import DEMO_MODEL
from engine.errors import EngineError
from engine.runtime import batch
from engine.runtime.batch import Chunk
from engine.runtime.request import Request
from tests.support.helpers import STD, Cli, assert_all_free
from tools.synth import write_model

Rng = np.random.Generator
HEAD = """\
| model                          |       size |     params | backend    | threads |\
            test |                  t/s |
| ------------------------------ | ---------: | ---------: | ---------- | ------: |\
 --------------: | -------------------: |
"""
BATCHED_HEAD = """\
|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
"""
# In llama-bench's order, without keys of features that this engine lacks.
KEYS = [
    "build_commit", "cpu_info", "backends", "model_filename", "model_type",
    "model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads",
    "type_k", "type_v", "n_gpu_layers", "n_prompt", "n_gen",
    "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts",
    "stddev_ts", "samples_ns", "samples_ts",
]  # fmt: skip


class Step(NamedTuple):
    """A step that ran: positions before each of its chunks, their lengths, rows of K and V read."""

    past: list[int]
    lengths: list[int]
    kv_rows: int


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Every step that an engine runs from now on."""
    seen: list[Step] = []
    pack = batch.pack

    def spy(chunks: Any, memory_steps: Any, capacity: Any) -> Any:
        batch = pack(chunks, memory_steps, capacity)
        past = [step.n_past for step in memory_steps]
        seen.append(Step(past, [len(chunk.tokens) for chunk in chunks], batch.live.kv_rows))
        return batch

    monkeypatch.setattr("engine.runtime.loop.pack", spy)
    return seen


def bench_json(cli: Cli, *argv: object) -> list[dict[str, Any]]:
    result = cli("bench", *argv, "-o", "json")
    assert (result.status, result.err) == (0, "")
    rows: list[dict[str, Any]] = json.loads(result.out)
    return rows


def test_the_demo_model_is_measured_where_none_is_named(cli: Cli) -> None:
    (row,) = bench_json(cli, "-p", 4, "-n", 0, "-r", 1)
    assert row["model_filename"] == str(DEMO_MODEL)


def test_the_table(tiny: Path, cli: Cli) -> None:
    options = ("-m", tiny, "-p", "8,16", "-n", "3", "-d", "0,20", "-r", 2)
    status, out, err = cli("bench", *options)
    assert (status, err) == (0, "")
    assert out.startswith(HEAD)
    lines = out.removeprefix(HEAD).splitlines()
    assert {len(line) for line in lines} == {len(HEAD) // 2 - 1}
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    tests = ["pp8", "pp16", "tg3", "pp8 @ d20", "pp16 @ d20", "tg3 @ d20"]
    assert [row[5] for row in rows] == tests
    reader = GGUFReader(tiny)
    size = sum(int(t.n_bytes) for t in reader.tensors) / 2**20
    n_params = sum(int(t.n_elements) for t in reader.tensors) / 1e6
    for row in rows:
        assert row[:4] == ["qwen35 Q8_0", f"{size:.2f} MiB", f"{n_params:.2f} M", "cpu"]
        assert int(row[4]) >= 1
        assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", row[6])


def test_sizes_have_units(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = ModelFacts(str(tiny), "qwen35 4B Q8_0", 5 << 29, 4_020_000_000, 4096)
    monkeypatch.setattr(ModelFacts, "of", lambda path: facts)
    out = cli("bench", "-m", tiny, "-p", 1, "-n", 0, "-r", 1).out
    assert "|   2.50 GiB |     4.02 B |" in out


def test_lists_of_engine_options(tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination has an engine of its own, in the order of llama-bench's loops: batch,
    micro-batch, threads, depth, and then the tests."""
    loaded: list[tuple[int, ...]] = []
    load = Engine.load

    def noted(path: str, **options: Any) -> Engine:
        loaded.append(tuple(options[name] for name in ("n_batch", "n_ubatch", "n_threads")))
        return load(path, **options)

    monkeypatch.setattr(Engine, "load", noted)
    sizes = ("-p", 4, "-n", 2, "-d", "0,3", "-r", 1)
    options = ("-t", "2,1", "-b", 64, "-b", 32, "-ub", "16,8", "-ub", 16)
    rows = bench_json(cli, "-m", tiny, *sizes, *options)
    combinations = [(b, ub, t) for b in (64, 32) for ub in (16, 8) for t in (2, 1)]
    assert loaded == combinations
    got = [(r["n_batch"], r["n_ubatch"], r["n_threads"], r["n_depth"], r["n_prompt"]) for r in rows]
    assert got == [(*c, n_depth, n) for c in combinations for n_depth in (0, 3) for n in (4, 0)]


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ((), {}),
        (("-t", "1,2"), {}),
        (("-b", 2048, "-ub", 512, "-ctk", "f16"), {}),
        (("-ub", "64,512"), {"n_ubatch": ["64", "512"]}),
        (("-b", 64), {"n_batch": ["64"]}),
        (("-b", "64", "-ub", "8,16", "-ctv", "f32"),
         {"n_batch": ["64", "64"], "n_ubatch": ["8", "16"], "type_v": ["f32", "f32"]}),
    ],
)  # fmt: skip
def test_columns_of_what_is_not_the_default(
    tiny: Path, cli: Cli, options: tuple[object, ...], columns: dict[str, list[str]]
) -> None:
    options = ("-m", tiny, "-p", 4, "-n", 0, "-r", 1, "--backend", "cpu", *options)
    status, out, _ = cli("bench", *options)
    assert status == 0
    head, rule, *lines = [line.strip("| ").split(" | ") for line in out.splitlines()]
    assert {len(line) for line in (head, rule, *lines)} == {len(head)}
    names = [name.strip() for name in head]
    assert names == ["model", "size", "params", "backend", "threads", *columns, "test", "t/s"]
    shown = {name: [line[names.index(name)].strip() for line in lines] for name in columns}
    assert shown == columns


@pytest.mark.parametrize("depth", [0, 33])
def test_a_prompt_and_generation_in_one_test(
    tiny: Path, cli: Cli, steps: list[Step], depth: int
) -> None:
    options = ("-p", 0, "-n", 5, "-pg", "40,3", "-pg", "0,0", "-pg", "7,0", "-d", depth, "-r", 2)
    rows = bench_json(cli, "-m", tiny, *options, "--no-warmup")
    assert [(r["n_prompt"], r["n_gen"]) for r in rows] == [(0, 5), (40, 3), (7, 0)]
    row = rows[1]
    assert row["samples_ts"] == pytest.approx([43e9 / ns for ns in row["samples_ns"]])
    both = [(step.past, step.lengths) for step in steps]
    run = [([depth], [40]), *(([depth + 40 + i], [1]) for i in range(3))]
    generated = [([depth + i], [1]) for i in range(5)]
    expected = [*generated * 2, *run * 2, *[([depth], [7])] * 2]
    assert both == [*([([0], [depth])] if depth else []), *expected]
    table = cli("bench", "-m", tiny, *options).out
    name = "pp40+tg3 @ d33" if depth else "pp40+tg3"
    assert f" | {name:>15} | " in table


def test_json_lines(tiny: Path, cli: Cli) -> None:
    status, out, _ = cli("bench", "-m", tiny, "-p", 4, "-n", 2, "-r", 2, "-o", "jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [list(row) for row in rows] == [KEYS] * 2
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [(4, 0), (0, 2)]


def test_keys_and_statistics(path: Path, cli: Cli) -> None:
    rows = bench_json(cli, "-m", path, "-p", 9, "-n", 2, "-d", 5, "-r", 3, "-ub", 8, "-b", 64)
    assert [list(row) for row in rows] == [KEYS] * 2
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in rows] == [(9, 0, 5), (0, 2, 5)]
    for row in rows:
        ns, ts = row["samples_ns"], row["samples_ts"]
        assert len(ns) == 3
        assert ts == pytest.approx([1e9 * (row["n_prompt"] + row["n_gen"]) / t for t in ns])
        for unit, samples in (("ns", ns), ("ts", ts)):
            mean, deviation = float(np.mean(samples)), float(np.std(samples, ddof=1))
            slack = 1.0 if unit == "ns" else 1e-6
            assert row[f"avg_{unit}"] == pytest.approx(mean, abs=slack)
            assert row[f"stddev_{unit}"] == pytest.approx(deviation, abs=slack)
        assert (row["n_ubatch"], row["n_batch"], row["n_gpu_layers"]) == (8, 64, 0)
        assert (row["type_k"], row["type_v"], row["backends"]) == ("f16", "f16", "cpu")
        assert row["model_filename"] == str(path)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["test_time"])


def test_one_repetition_deviates_by_nothing(tiny: Path, cli: Cli) -> None:
    (row,) = bench_json(cli, "-m", tiny, "-p", 4, "-n", 0, "-r", 1)
    assert (row["stddev_ns"], row["stddev_ts"]) == (0, 0)
    assert row["avg_ns"] == row["samples_ns"][0]


def test_csv(tiny: Path, cli: Cli) -> None:
    status, out, _ = cli("bench", "-m", tiny, "-p", 4, "-n", 2, "-r", 1, "-o", "csv")
    assert status == 0
    rows = list(csv.DictReader(out.splitlines()))
    assert list(rows[0]) == KEYS[:-2]
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [("4", "0"), ("0", "2")]
    assert all(float(row["avg_ts"]) > 0 for row in rows)


def test_defaults_are_those_of_llama_bench() -> None:
    cases = cases_of([512], [128], [0, 4096])
    assert [c.name for c in cases] == ["pp512", "tg128", "pp512 @ d4096", "tg128 @ d4096"]
    assert cases_of([0], [0], [7]) == []


@pytest.mark.parametrize("warm_up", [True, False])
def test_every_position_is_filled(path: Path, rng: Rng, steps: list[Step], warm_up: bool) -> None:
    """The depth is processed once; every prompt and generation starts after it."""
    with Engine.load(path, n_ctx=128, n_ubatch=64, n_checkpoints=1) as engine:
        cases = [Case(30, 0, 70), Case(0, 3, 70), Case(0, 2, 0)]
        runs: list[int] = []
        warm = warm_up_case if warm_up else None
        measured = list(measure(engine, cases, rng, 2, warm, lambda: runs.append(len(steps))))
        assert_all_free(engine)
    assert [m.case for m in measured] == cases
    assert [len(m.prompt_s) for m in measured] == [2, 2, 2]
    for m in measured:
        for seconds, n in ((m.prompt_s, m.case.n_prompt), (m.gen_s, m.case.n_gen)):
            assert all(s > 0 if n else s == 0 for s in seconds)
    assert len(runs) == 3 * (2 + warm_up)
    prompt = [([70], [30], 100)]
    # A chunk of a prompt ends at a multiple of 64.
    expected = [([0], [64], 64), ([64], [6], 70)]
    for n_past, run in ((70, prompt), (70, 3), (0, 2)):
        token = [([n_past + i], [1], n_past + i + 1) for i in range(3)]
        if isinstance(run, list):
            expected += run * (2 + warm_up)
        else:
            expected += token[:1] * warm_up + token[:run] * 2
    assert steps == expected


def shorten_prompts(patch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def shortened(self: Engine, chunks: list[Chunk]) -> Any:
        return step(self, [replace(chunk, tokens=chunk.tokens[:-1]) for chunk in chunks])

    patch.setattr(Engine, "step", shortened)


def change_tokens(change: Callable[[list[int]], object]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        accept_logits = Request.accept_logits
        changed: list[Request] = []

        def accept_and_change(self: Request, logits: Any) -> None:
            accept_logits(self, logits)
            if len(self.tokens) == 2 and self not in changed:
                changed.append(self)
                change(self.tokens)

        patch.setattr(Request, "accept_logits", accept_and_change)

    return apply


def do_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "advance", lambda self: False)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (shorten_prompts, "expected 4 positions after a prompt, got 3"),
        (change_tokens(lambda tokens: tokens.pop()), "expected 4 tokens in 4 steps, got 4 in 5"),
        (
            change_tokens(lambda tokens: tokens.append(1)),
            "expected 4 tokens in 4 steps, got 4 in 3",
        ),
        (do_nothing, "expected 4 tokens in 4 steps, got 0 in 0"),
    ],
)
def test_a_run_of_other_tokens_than_asked_for_is_an_error(
    tiny: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
    expected: str,
) -> None:
    fault(monkeypatch)
    size = ("-p", 4, "-n", 0) if fault is shorten_prompts else ("-p", 0, "-n", 4)
    assert expected in cli("bench", "-m", tiny, *size, "--no-warmup").refused()


def test_a_depth_of_other_tokens_than_asked_for_is_an_error(
    tiny: Path, rng: Rng, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_prompts(monkeypatch)
    with Engine.load(tiny, n_ctx=64) as engine:
        with pytest.raises(BenchError, match="expected 9 positions after a prompt, got 8"):
            next(measure(engine, [Case(0, 2, 9)], rng))
        assert_all_free(engine)


def test_models_one_after_another(
    models: Callable[[str, str], Path], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(models("tiny", "Q8_0")), str(models("tiny-moe", "F32"))]
    events: list[str] = []
    load, close = Engine.load, Engine.close

    def noted_load(path: str, **options: Any) -> Engine:
        events.append(path)
        return load(path, **options)

    def noted_close(engine: Engine) -> None:
        events.append("closed")
        close(engine)

    monkeypatch.setattr(Engine, "load", noted_load)
    monkeypatch.setattr(Engine, "close", noted_close)
    rows = bench_json(cli, "-m", ",".join(paths), "-p", 4, "-n", 1, "-r", 1)
    assert [row["model_filename"] for row in rows] == [p for p in paths for _ in range(2)]
    assert [row["model_type"] for row in rows[::2]] == ["qwen35 Q8_0", "qwen35moe F32"]
    assert events == [paths[0], "closed", paths[1], "closed"]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("output", ["md", "json", "csv", "jsonl"])
def test_rows_before_an_interrupt_are_printed(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setattr("engine.bench.measure.time_generation", interrupt)
    status, out, _ = cli("bench", "-m", tiny, "-p", 4, "-n", 4, "-r", 1, "-o", output)
    assert status == 130
    if output == "json":
        assert [row["n_prompt"] for row in json.loads(out)] == [4]
    else:
        assert len(out.removeprefix(HEAD).splitlines()) == (2 if output == "csv" else 1)


def test_rows_before_a_model_that_fails_are_printed(
    models: Callable[[str, str], Path], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = models("tiny", "Q8_0"), models("tiny", "F32")
    load = Engine.load

    def fail(path: str, **options: Any) -> Engine:
        if path == str(bad):
            raise EngineError("no room for it")
        return load(path, **options)

    monkeypatch.setattr(Engine, "load", fail)
    result = cli("bench", "-m", f"{good},{bad}", "-p", 4, "-n", 0, "-r", 1, "-o", "json")
    assert (result.status, result.err) == (1, "error: no room for it\n")
    assert [row["model_filename"] for row in json.loads(result.out)] == [str(good)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"general.size_label": "0.8B"}, "qwen35 0.8B Q8_0"),
        ({"general.size_label": "|1\n"}, "qwen35 1 Q8_0"),
        ({"general.file_type": 15}, "qwen35 Q4_K_M"),
        ({"general.file_type": None}, "qwen35 Q8_0"),
        ({"general.file_type": 999}, "qwen35 Q8_0"),
        ({"general.file_type": 0}, "qwen35 F32"),
        ({"general.file_type": "x"}, "qwen35 Q8_0"),
    ],
)
def test_model_types(tmp_path: Path, overrides: dict[str, Any], expected: str) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, "tiny", "Q8_0", std=STD, overrides=overrides)
    assert ModelFacts.of(str(path)).type == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("-p", "0", "-n", "0"), "nothing to measure"),
        (("-p", "-1"), "expected at least 0, got -1"),
        (("-p", "8,x"), "expected integers and commas between them, got '8,x'"),
        (("-n", ""), "expected integers and commas between them, got ''"),
        (("-d", "-4"), "expected at least 0, got -4"),
        (("-r", "0"), "expected at least 1, got 0"),
        (("-o", "sql"), "invalid choice: 'sql' (choose from "),
        (("-t", "1,0"), "argument -t/--threads: expected at least 1, got 0"),
        (("-b", "x"), "argument -b/--batch-size: expected integers and commas between them"),
        (("-ub", "8,"), "argument -ub/--ubatch-size: expected integers and commas between them"),
        (("-pg", "512"), "argument -pg: expected two integers and a comma, got '512'"),
        (("-pg", "8,4,2"), "argument -pg: expected two integers and a comma, got '8,4,2'"),
        (("-pg", "8,-4"), "argument -pg: expected at least 0, got -4"),
        (("-pg", "0,0", "-p", "0", "-n", "0"), "nothing to measure"),
        (("-m", ","), "expected files and commas between them, got ','"),
    ],
)
def test_bad_options(tiny: Path, cli: Cli, options: tuple[str, ...], expected: str) -> None:
    result = cli("bench", "-m", tiny, *options)
    assert (result.status, result.out) == (2, "")
    assert expected in result.err
    assert result.err.count("\n") == 1


def test_every_model_is_checked_before_the_first_run(
    tiny: Path, tmp_path: Path, cli: Cli, steps: list[Step]
) -> None:
    (tmp_path / "text").write_text("no model")
    for name, expected in (("none.gguf", "No such file"), ("text", "expected")):
        line = cli("bench", "-m", f"{tiny},{tmp_path / name}", "-p", 4, "-n", 0).refused()
        assert line.startswith(f"{tmp_path / name}: ")
        assert expected in line
    assert steps == []


def test_contexts_are_checked_before_the_first_run(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    short = tmp_path / "short.gguf"
    write_model(short, "tiny", "Q8_0", std=STD, overrides={"qwen35.context_length": 32})
    sizes = ("-p", "4", "-n", "8", "-d", "0,30")
    line = cli("bench", "-m", f"{tiny},{short}", *sizes).refused()
    assert line == (
        f"{short}: tg8 @ d30 needs 38 positions: expected at most the 32 of the model's context"
    )
    line = cli("bench", "-m", tiny, *sizes, "-c", 37).refused()
    assert line.endswith("tg8 @ d30 needs 38 positions: expected at most the 37 of -c")
    assert cli("bench", "-m", tiny, *sizes, "-c", 38, "-r", 1).status == 0


def test_the_batched_table(tiny: Path, cli: Cli) -> None:
    options = ("-m", tiny, "-npp", "8,70", "-ntg", "3", "-npl", "1,4")
    status, out, err = cli("batched-bench", *options)
    assert (status, err) == (0, "")
    assert out.startswith(BATCHED_HEAD)
    pattern = r"\|( *\d+) \|( *\d+) \|( *\d+) \|( *\d+) \|" + r"( *\d+\.\d+) \|" * 6
    lines = out.removeprefix(BATCHED_HEAD).splitlines()
    # The speeds of small models may have more digits than a column of llama-batched-bench.
    assert min(map(len, lines)) >= len(BATCHED_HEAD) // 2 - 1
    rows = [tuple(map(float, m.groups())) for line in lines if (m := re.fullmatch(pattern, line))]
    assert [row[:4] for row in rows] == [
        (8, 3, 1, 11), (8, 3, 4, 44), (70, 3, 1, 73), (70, 3, 4, 292),
    ]  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
def test_batched_numbers_are_consistent(tiny: Path, cli: Cli, shared: bool) -> None:
    options = ("-m", tiny, "-npp", "20", "-ntg", "3", "-npl", "2,4", "--output-format", "jsonl")
    status, out, _ = cli("batched-bench", *options, *(["-pps"] if shared else []))
    assert status == 0
    for line, n_seqs in zip(out.splitlines(), (2, 4), strict=True):
        row = json.loads(line)
        n_prompt = 20 * (1 if shared else n_seqs)
        assert (row["pp"], row["tg"], row["pl"], row["is_pp_shared"]) == (20, 3, n_seqs, shared)
        assert row["n_kv"] == n_prompt + 3 * n_seqs
        assert row["n_kv_max"] == (20 if shared else 80) + 12
        assert row["speed_pp"] == pytest.approx(n_prompt / row["t_pp"])
        assert row["speed_tg"] == pytest.approx(3 * n_seqs / row["t_tg"])
        assert row["t"] == pytest.approx(row["t_pp"] + row["t_tg"])
        assert row["speed"] == pytest.approx(row["n_kv"] / row["t"])


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(
    ("n_prompt", "n_gen", "n_seqs", "n_ubatch"),
    [(8, 3, 5, 64), (63, 70, 8, 128), (64, 64, 3, 512), (100, 2, 4, 128), (20, 2, 4, 7)],
)
def test_batched_steps(
    tiny: Path, rng: Rng, steps: list[Step], shared: bool, n_prompt: int, n_gen: int,
    n_seqs: int, n_ubatch: int,
) -> None:  # fmt: skip
    """Full steps of prompts, then steps of all sequences; the smallest context suffices."""
    case = Case(n_prompt, n_gen, n_seqs=n_seqs, is_shared=shared)
    options: dict[str, Any] = {"n_parallel": n_seqs, "n_checkpoints": n_seqs}
    options["n_ubatch"] = n_ubatch
    with Engine.load(tiny, n_ctx=case.n_kv, **options) as engine:
        list(measure(engine, [case], rng))
        assert_all_free(engine)
    prompts, gen = steps[:-n_gen], steps[-n_gen:]
    assert sum(sum(step.lengths) for step in prompts) == case.n_prompts * n_prompt
    assert all(sum(step.lengths) > n_ubatch - 64 for step in prompts[:-1])
    for i, step in enumerate(gen):
        assert step.past == [n_prompt + i] * n_seqs
        assert step.lengths == [1] * n_seqs
        assert step.kv_rows == n_seqs * (n_prompt + i + 1)


@pytest.mark.parametrize(
    ("options", "status", "expected"),
    [
        (("-npp", "8", "-ntg", "4"), 2, "required: -npl"),
        (("-npp", "0", "-ntg", "4", "-npl", "1"), 2, "expected at least 1, got 0"),
        (("-npp", "8", "-ntg", "x", "-npl", "1"), 2, "expected integers"),
        (("-npp", "8", "-ntg", "4", "-npl", "2", "-c", "23"), 1, "needs 24 positions"),
        (("-npp", "8", "-ntg", "4", "-npl", "9", "-ub", "8"), 1, "at most the 8 tokens of a step"),
        (("-npp", "9999999", "-ntg", "4", "-npl", "1"), 1, "of the model's context"),
        (("-npp", "8", "-ntg", "4", "-npl", "1", "--output-format", "x"), 2, "invalid choice"),
    ],
)
def test_bad_batched_options(
    tiny: Path, cli: Cli, options: tuple[str, ...], status: int, expected: str
) -> None:
    result = cli("batched-bench", "-m", tiny, *options)
    assert (result.status, result.out) == (status, "")
    assert expected in result.err
    assert result.err.count("\n") == 1
    assert status == 2 or result.err.startswith("error: ")


def test_batched_generation_of_other_tokens_is_an_error(
    tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_tokens(lambda tokens: tokens.pop())(monkeypatch)
    line = cli("batched-bench", "-m", tiny, "-npp", 8, "-ntg", 3, "-npl", 2).refused()
    assert "expected 3 tokens in 3 steps, got 3 in 4" in line
