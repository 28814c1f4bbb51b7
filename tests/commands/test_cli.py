"""The command line: its output streams, and the commands graph and tokenize.

It runs in this process; tests that need real streams and signals are in test_cli_process.py.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineError, SamplingParams
from engine.commands.main import made
from engine.commands.options import sampling_params
from engine.formats.gguf import GGUFFile
from engine.planning import plan_only
from engine.version import __version__
from tests.support.helpers import Cli
from tools.ggufwrite import TensorSpec, write_gguf
from tools.makevocab import made_vocabulary, padded_vocabulary
from tools.presets import PRESETS, metadata, tensors
from tools.synth import tensor_type

GREEDY = ("--temp", 0)


def completion(path: Path, prompt: str, n: int, **params: Any) -> str:
    """The completion that `Engine.generate` gives."""
    chosen = SamplingParams(max_tokens=n, **{"temperature": 0, **params})
    with Engine.load(path) as engine:
        return "".join(token.text for token in engine.generate(prompt, chosen))


# Completion.


def test_prompt_and_completion_go_to_standard_output(cli: Cli, tiny: Path) -> None:
    result = cli("-m", tiny, "-p", "Once upon", "-n", 8, *GREEDY)
    assert result.status == 0
    assert result.out == f"Once upon{completion(tiny, 'Once upon', 8)}\n"


def test_without_the_prompt(cli: Cli, tiny: Path) -> None:
    result = cli("-m", tiny, "-p", "Once upon", "-n", 8, *GREEDY, "--no-display-prompt")
    assert result.out == f"{completion(tiny, 'Once upon', 8)}\n"


def test_timings_go_to_standard_error(cli: Cli, tiny: Path) -> None:
    err = cli("-m", tiny, "-p", "Once", "-n", 8, *GREEDY, "--ignore-eos").err
    n = len(Engine.load(tiny).encode_prompt("Once"))
    number = r" *\d+\.\d\d"
    each = rf"\({number} ms per token,{number} tokens per second\)"
    load, prompt, evaluated, ended = err.splitlines()
    assert re.fullmatch(rf" *load time ={number} ms", load)
    assert re.fullmatch(rf" *prompt eval time ={number} ms / *{n} tokens {each}", prompt)
    # The first token comes from the prompt's logits.
    assert re.fullmatch(rf" *eval time ={number} ms / *7 runs +{each}", evaluated)
    assert ended.strip() == "ended : length (8 tokens were asked for)"


@pytest.mark.parametrize("n", [0, 1])
def test_timings_of_nothing(cli: Cli, tiny: Path, n: int) -> None:
    result = cli("-m", tiny, "-p", "Once", "-n", n, *GREEDY)
    assert result.status == 0
    _, prompt, evaluated, _ = result.err.splitlines()
    assert ("tokens" in prompt) == (n > 0)
    assert "runs" not in evaluated
    if n == 0:
        assert result.out == "Once\n"


CACHE = (
    r"prefix cache: \d+\.\d of \d+\.\d MiB \(states: \d+, \d+\.\d MiB; tokens: \d+, \d+\.\d MiB\); "
    r"reused 0 of {} tokens; states given up: 0"
)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ((), "nothing known begins like it"),
        (("--no-cache-prompt",), "cache_prompt is off"),
        (("--cache-ram", 0), "the cache is off: no cache_ram"),
    ],
    ids=str,
)
def test_verbose_says_what_was_reused(
    cli: Cli, tiny: Path, option: tuple[object, ...], why: str
) -> None:
    n = len(Engine.load(tiny).encode_prompt("Once"))
    *_, prompt, cache = cli("-m", tiny, "-p", "Once", "-n", 2, "-v", *option).err.splitlines()
    assert prompt.strip() == f"prompt : reused 0 of {n} tokens ({why})"
    assert re.fullmatch("prefix cache off" if option else CACHE.format(n), cache)


def test_prompts_from_files_and_standard_input(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    text = 'naïve "日本"\\n\n two \n\n'
    expected = cli("-m", tiny, "--no-escape", "-p", text[:-1], "-n", 4, *GREEDY)
    assert expected.out.startswith(text[:-1])
    (tmp_path / "prompt").write_text(text, "utf-8")
    # Only the last line's end is dropped, and escapes are text.
    for source in ("-f", "--file"):
        assert cli("-m", tiny, source, tmp_path / "prompt", "-n", 4, *GREEDY).out == expected.out
    assert cli("-m", tiny, "-n", 4, *GREEDY, stdin=text.encode()).out == expected.out


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (r"a\nb\tc\\d\'\"", "a\nb\tc\\d'\""),
        (r"\\n", r"\n"),
        (r"\x\d\ ", r"\x\d\ "),
        ("a\nb", "a\nb"),
        ("end\\", "end\\"),
    ],
)
def test_escapes_in_a_prompt(cli: Cli, tiny: Path, given: str, meant: str) -> None:
    assert cli("-m", tiny, "-p", given, "-n", 0).out == meant + "\n"
    assert cli("-m", tiny, "-p", given, "-n", 0, "--no-escape").out == given + "\n"


def test_the_last_word_on_escapes_and_on_the_prompt_counts(cli: Cli, tiny: Path) -> None:
    run = ("-m", tiny, "-p", r"a\nb", "-n", 0)
    for options, out in (
        (("-e",), "a\nb\n"), (("--no-escape", "--escape"), "a\nb\n"),
        (("-e", "--no-escape"), "a\\nb\n"), (("--no-display-prompt",), "\n"),
        (("--no-display-prompt", "--display-prompt"), "a\nb\n"),
    ):  # fmt: skip
        assert cli(*run, *options).out == out


def test_escapes_in_texts_of_options() -> None:
    """-r and --dry-sequence-breaker have them, as in llama.cpp."""
    words = [r"-r=\n\n", r"-r=\tb", r"--dry-sequence-breaker=\n", "--dry-sequence-breaker=none"]
    _, parser = made("")
    params = sampling_params(parser.parse_args(words))
    assert params.stop == ("\n\n", "\tb")
    assert params.dry_sequence_breakers == ("\n",)
    params = sampling_params(parser.parse_args([*words, "--no-escape"]))
    assert params.stop == (r"\n\n", r"\tb")
    assert params.dry_sequence_breakers == (r"\n",)


def test_numbers_and_names_as_llama_cpp_has_them() -> None:
    _, parser = made("")

    def given(*words: str) -> dict[str, Any]:
        return vars(parser.parse_args(words))

    assert [given(f"-t={n}")["n_threads"] for n in (3, 0, -1)] == [3, None, None]
    assert [given(f"-n={n}")["max_tokens"] for n in (3, 0, -1, -2)] == [3, 0, -1, -1]
    found = given("--samplers=top-k;temp;nucleus;min_p;typ-p")["samplers"]
    assert found == ("top_k", "temperature", "top_p", "min_p", "typ_p")


def test_escapes_of_bytes() -> None:
    _, parser = made("")
    words = [r"-r=\x2c\x0a", r"-r=\xc3\xa9\xff", r"-r=\x4", r"-r=a\tb"]
    params = sampling_params(parser.parse_args(words))
    assert params.stop == (",\n", "é\ufffd", r"\x4", "a\tb")


def test_biases_of_one_token_add_up() -> None:
    _, parser = made("")
    words = ["-l=5+1", "-l=5+1", "-l=6-0.5", "-l=7-inf", "-l=7+3"]
    params = sampling_params(parser.parse_args(words))
    assert params.logit_bias == {5: 2.0, 6: -0.5, 7: -np.inf}


def test_seeds(cli: Cli, tiny: Path) -> None:
    def text(*options: object) -> str:
        return cli("-m", tiny, "-p", "Once", "-n", 20, "--temp", 2, "--ignore-eos", *options).out

    assert text("-s", 1) == text("--seed", 1) != text("-s", 2)
    assert text() != text()
    assert text("--seed", -1) != text("--seed", -1)


@pytest.mark.parametrize(
    ("options", "params"),
    [
        (("--temp", 1.5), {"temperature": 1.5}),
        (("--top-k", 2), {"top_k": 2}),
        (("--top-p", 0.3), {"top_p": 0.3}),
        (("--min-p", 0.6), {"min_p": 0.6}),
        (("--repeat-penalty", 1.8), {"repeat_penalty": 1.8}),
        (("--repeat-penalty", 1.8, "--repeat-last-n", 2),
         {"repeat_penalty": 1.8, "repeat_last_n": 2}),
        (("--ignore-eos",), {"ignore_eos": True}),
    ],
)  # fmt: skip
def test_sampling_options_arrive(
    cli: Cli, tiny: Path, options: tuple[object, ...], params: dict[str, float]
) -> None:
    base = {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3}
    off = ("--temp", 0.9, "--top-k", 0, "--top-p", 1, "--min-p", 0, "-s", 3)
    result = cli("-m", tiny, "-p", "Once", "-n", 25, *off, *options)
    assert result.out == f"Once{completion(tiny, 'Once', 25, **{**base, **params})}\n"


def test_long_names_are_the_short_ones(cli: Cli, tiny: Path) -> None:
    short = cli("-m", tiny, "-p", "Once", "-n", 5, "-c", 64, "-b", 9, "-ub", 3, "-s", 1,
                "-ctk", "f16", "-ctv", "f16")  # fmt: skip
    long = cli("--model", tiny, "--prompt", "Once", "--predict", 5, "--ctx-size", 64,
               "--batch-size", 9, "--ubatch-size", 3, "--seed", 1, "--cache-type-k", "f16",
               "--cache-type-v", "f16", "--n-predict", 5)  # fmt: skip
    assert short.status == long.status == 0
    assert short.out == long.out


def test_engine_options_arrive(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(EngineError):
        pass

    def load(path: str, **options: object) -> None:
        arrived.update(options, path=path)
        raise Stopped

    arrived: dict[str, object] = {}
    monkeypatch.setattr(Engine, "load", load)
    cli("-m", "file", "-p", "a", "-c", 9, "-b", 8, "-ub", 7, "-t", 6, "-ctk", "f16", "-ctv", "f32",
        "--gdn", "scan", "--backend", "reference", "--strict-backend")  # fmt: skip
    expected = {
        "path": "file", "n_ctx": 9, "n_batch": 8, "n_ubatch": 7, "n_threads": 6, "type_k": "f16",
        "type_v": "f32", "gdn": "scan", "backend": "reference", "strict_backend": True,
    }  # fmt: skip
    assert {name: arrived[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("backend", "more"),
    [
        ("cpu", [("--backend", "auto"), ("-ctk", "f16", "-ctv", "f16")]),
        ("reference", [("--gdn", "chunk"), ("-ctk", "f32", "-ctv", "f32")]),
    ],
)
def test_options_that_change_nothing(
    cli: Cli, tiny: Path, backend: str, more: list[tuple[str, ...]]
) -> None:
    run = ("-m", tiny, "-p", "Once", "-n", 5, *GREEDY, "--backend", backend)
    plain = cli(*run)
    for options in (
        ("-t", 2), ("--threads", 1), ("--strict-backend",), ("--gdn", "scan"), ("-c", 0), ("-v",),
        *more,
    ):  # fmt: skip
        result = cli(*run, *options)
        assert (result.status, result.out) == (0, plain.out)


def test_generation_fills_the_context(cli: Cli, tiny: Path) -> None:
    result = cli("-m", tiny, "-p", "Once", "-c", 20, *GREEDY, "--ignore-eos", "-n", -1)
    assert result.out == f"Once{completion(tiny, 'Once', 20 - 3, ignore_eos=True)}\n"


@pytest.mark.parametrize("command", [(), ("graph",), ("tokenize",), ("perplexity",)])
def test_help(cli: Cli, command: tuple[str, ...]) -> None:
    result = cli(*command, "--help")
    assert result.status == 0
    assert result.err == ""
    assert result.out.startswith(f"usage: {' '.join(('cli.py', *command))} ")
    assert "-m FILE, --model FILE" in result.out
    assert max(map(len, result.out.splitlines())) <= 100


def test_version(cli: Cli) -> None:
    result = cli("--version")
    assert (result.status, result.err) == (0, "")
    assert __version__ in result.out
    assert "cpu (" in result.out
    assert "reference" in result.out


# tokenize


@pytest.mark.parametrize("text", ["the cat<|im_end|>\n", "日本 é", "a  b"])
def test_tokenize_prints_ids_and_pieces(cli: Cli, tiny: Path, text: str) -> None:
    tokenizer = Engine.load(tiny).tokenizer
    ids = tokenizer.encode(text, add_special=True, parse_special=True)
    result = cli("tokenize", "-m", tiny, "-p", text)
    pieces = (tokenizer.token_bytes(i, special=True).decode("utf-8", "replace") for i in ids)
    rows = [f"{i:6d} -> '{piece}'\n" for i, piece in zip(ids, pieces, strict=True)]
    assert (result.status, result.out, result.err) == (0, "".join(rows), "")
    assert cli("tokenize", "-m", tiny, "-p", text, "--ids").out == f"{ids}\n"


def test_tokenize_format_is_llama_cpps(cli: Cli, tiny: Path) -> None:
    result = cli("tokenize", "-m", tiny, "-p", "!<|im_end|>")
    assert result.out == "    33 -> '!'\n   319 -> '<|im_end|>'\n"
    result = cli("tokenize", "-m", tiny, "-p", "<|im_end|>", "--no-parse-special")
    assert "319" not in result.out
    assert result.out.splitlines()[0] == "    60 -> '<'"


def test_tokenize_adds_bos_except_with_no_bos(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "m"
    write_gguf(path, {"tokenizer.ggml.model": "gpt2"} | made_vocabulary()
               | {"tokenizer.ggml.add_bos_token": True}, [])  # fmt: skip
    assert cli("tokenize", "-m", path, "-p", "!", "--ids").out == "[317, 33]\n"
    assert cli("tokenize", "-m", path, "-p", "!", "--ids", "--no-bos").out == "[33]\n"


def test_tokenize_reads_files_and_standard_input(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("!!\n")
    for options, stdin in ((("-f", tmp_path / "text"), b""), ((), b"!!\n")):
        result = cli("tokenize", "-m", tiny, "--ids", *options, stdin=stdin)
        assert (result.status, result.out) == (0, "[33, 33]\n")


def test_tokenize_of_nothing(cli: Cli, tiny: Path) -> None:
    assert cli("tokenize", "-m", tiny, "--ids", stdin=b"").out == "[]\n"
    assert cli("tokenize", "-m", tiny, "-p", "").out == ""


# graph


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, reading tensor data fails."""

    def raw(self: GGUFFile, name: str, *part: int) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(GGUFFile, "raw", raw)


@pytest.mark.usefixtures("unreadable")
def test_graph_as_text(cli: Cli, tiny: Path) -> None:
    result = cli("graph", "-m", tiny)
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "graph nodes  = 49 (with bs=512), 49 (with bs=1)"
    assert lines[1] == "graph splits = 1 (with bs=512), 1 (with bs=1)"
    rows = [line.split() for line in lines]
    for row in (["GATED_DELTA_NET", "3"], ["ATTENTION", "1"], ["delta", "net", "3", "12"]):
        assert row in rows
    ops = [row for row in rows if len(row) == 2 and row[0].isupper()]
    reasons = [row for row in rows if row[:1] == ["cpu"]]
    for counted in (ops, reasons):
        assert sum(int(row[1]) for row in counted) == 49
    assert all(len(row) > 2 for row in reasons)


@pytest.mark.usefixtures("unreadable")
def test_graph_with_a_line_per_node(cli: Cli, tiny: Path) -> None:
    nodes = json.loads(cli("graph", "-m", tiny, "--json").out)["nodes"]
    lines = cli("graph", "-m", tiny, "--verbose").out.splitlines()
    for node in nodes:
        (line,) = [line for line in lines if line.startswith(node["name"] + " ")]
        assert line.split()[1:3] == [node["op"], "cpu"]
        assert node["reason"] in line


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("gdn", ["fused", "decomposed"])
def test_graph_as_json(cli: Cli, tiny: Path, gdn: str) -> None:
    document = json.loads(cli("graph", "-m", tiny, "--json", "--bs", "64,1,7", "--gdn", gdn).out)
    counts = {str(bs): len(plan_only(tiny, bs, gdn).graph.nodes) for bs in (64, 1, 7)}
    assert document["graph_nodes"] == counts
    # The CPU backend has no primitives: each of the three delta rules is a split on the reference.
    n_splits = 1 if gdn == "fused" else 2 * 3 + 1
    assert document["graph_splits"] == dict.fromkeys(("64", "1", "7"), n_splits)
    nodes = document["nodes"]
    assert len(nodes) == sum(document["ops"].values()) == counts["64"]
    assert len({node["name"] for node in nodes}) == len(nodes)
    assert ("GATED_DELTA_NET" in document["ops"]) == (gdn == "fused")
    assert [document["layer_kinds"][kind]["layers"] for kind in ("delta net", "attention")] == [
        3,
        1,
    ]
    made = {out["name"] for node in nodes for out in node["outputs"]}
    backends = {"cpu"} if gdn == "fused" else {"cpu", "reference"}
    assert {node["backend"] for node in nodes} == backends
    assert all(node["reason"] for node in nodes)
    assert {"token_embd.weight", "tokens"} == set(nodes[0]["inputs"].values())
    assert {"blk.0.attn_norm", "output"} <= made


def sparse_model(path: Path, name: str) -> None:
    """The header of a real model's file; its tensor data is a hole in the file."""
    p = replace(PRESETS[name], n_vocab=0)
    vocabulary = padded_vocabulary(made_vocabulary(), 1000)
    p = replace(p, n_vocab=1000)
    header_is_written = RuntimeError()

    def no_data() -> list[bytes]:
        raise header_is_written

    specs, total = [], 0
    for tensor, shape in tensors(p).items():
        block = tensor_type(p, tensor, shape, "Q4_K_M")
        nbytes = block.nbytes
        for size in shape:
            nbytes *= size
        specs.append(TensorSpec(tensor, shape, block.ggml_id, nbytes // block.elems, no_data))
        total += nbytes // block.elems + 32
    with pytest.raises(RuntimeError):
        write_gguf(path, {"general.architecture": p.arch} | metadata(p) | vocabulary, specs)
    os.truncate(path, path.stat().st_size + total)


@pytest.mark.parametrize(("name", "most"), [("0.8b", 340), ("27b", 14 * 64 + 4)])
def test_graph_of_a_large_model_reads_only_its_header(
    cli: Cli, tmp_path: Path, unreadable: None, name: str, most: int
) -> None:
    path = tmp_path / "m.gguf"
    sparse_model(path, name)
    assert path.stat().st_size > 100 * path.stat().st_blocks * 512
    result = cli("graph", "-m", path)
    match = re.match(r"graph nodes  = (\d+) \(with bs=512\), (\d+) \(with bs=1\)", result.out)
    assert match
    # The topology does not depend on the batch.
    assert match[1] == match[2]
    assert int(match[1]) <= most


def test_graph_does_not_depend_on_the_order_of_batch_sizes(cli: Cli, tiny: Path) -> None:
    a, b = (cli("graph", "-m", tiny, "--bs", bs).out.splitlines() for bs in ("1,64", "64,1"))
    assert a[2:] == b[2:]
    assert a[0] == "graph nodes  = 49 (with bs=1), 49 (with bs=64)"
