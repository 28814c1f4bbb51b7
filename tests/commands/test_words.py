"""Words of the command line: llama.cpp's options, each as the data file says, and mistyped ones.

The data file's own rows are the cases: every name of every row goes through a command's parser.
"""

from __future__ import annotations

import re
from argparse import Action
from functools import cache
from pathlib import Path

import pytest

from engine.commands.main import COMMANDS, made
from engine.commands.options import Parser
from engine.commands.words import BENCH, EARLIER, SERVER, Reader, Row, rows
from tests.support.helpers import Cli

# A command for rows of programs that `run` does not stand for.
COMMAND_OF = {
    BENCH: "bench",
    "bench": "batched-bench",
    "perplexity": "perplexity",
    "tokenize": "tokenize",
    SERVER: "serve",
}
RUN_PROGRAMS = {"common", "cli", "completion"}
# What a command can't do without, and a value of it.
NEEDED = {
    "bench": {"-m": "x"},
    "perplexity": {"-f": "x"},
    "batched-bench": {"-npp": "1", "-ntg": "1", "-npl": "1"},
}
# Values that a conversion takes; 1 elsewhere.
VALUES = {
    "-l": "1+1", "-ot": "a=cpu", "-ctk": "f16", "-ctv": "f16", "--output-format": "md", "-o": "md",
    "-rea": "on", "-pg": "3,4", "--chat-template-kwargs": '{"a": 1}',
}  # fmt: skip
SWITCH = "on, off, auto, enabled, disabled, true, false, 1, 0, -1"
ENDS = {"-h", "--version", "--list-devices"}  # They print, and end the program.
# What they say is the default.
DEFAULT = {"-e", "--display-prompt", "--output-format", "-o"}


@cache
def parser_of(command: str) -> Parser:
    return made(command)[1]


def reader_of(parser: Parser) -> Reader:
    return Reader(parser, lambda: map(parser_of, ("", *COMMANDS)))


def command_of(row: Row) -> str:
    """The command for the programs of a row; `graph`, which has few options, if there is none."""
    programs = set(row.programs) - {EARLIER}
    if programs & RUN_PROGRAMS:
        return ""
    return next((c for program, c in COMMAND_OF.items() if program in programs), "graph")


def values_of(row: Row) -> list[str]:
    """Values that the row is about."""
    if row.values and not row.values.startswith("="):
        inner = re.sub(r"\(\?i:(.*)\)", r"\1", row.values)
        return [inner.split("|")[0]]
    return [VALUES.get(row.names[0], "3" if row.kind == "same" else "77")] * row.n_values


def shown(row: Row) -> str:
    return f"{command_of(row) or 'run'} {row.names[0]} {row.values}"


def n_values(action: Action) -> int:
    return 0 if action.nargs == 0 else 1


def namespace(command: str, words: list[str]) -> dict[str, object]:
    """What words for argparse set."""
    needed = [f"{n}={value}" for n, value in NEEDED.get(command, {}).items()]
    set_already = {word.partition("=")[0] for word in words}
    needed = [word for word in needed if word.partition("=")[0] not in set_already]
    return vars(parser_of(command).parse_args([*words, *needed]))


@pytest.mark.parametrize("row", rows(), ids=shown)
def test_every_option_of_llama_cpp(row: Row, capsys: pytest.CaptureFixture[str]) -> None:
    """Each name is what its row says, and never one of ours with a value glued to it."""
    parser, values = parser_of(command_of(row)), values_of(row)
    for name in row.names:
        ours, reader = parser.option(name), reader_of(parser)
        assert ours is None or row.kind == "same"
        if row.kind == "refuse":
            with pytest.raises(SystemExit) as stopped:
                reader.read([name, *values, "-p", "a"])
            out, err = capsys.readouterr()
            assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
            told = (
                f"{parser.prog}: {name} is not",
                f"{parser.prog}: {' '.join([name, *values])} is not",
            )
            assert err.startswith(told)
            assert f"supported: {row.text} (see " in err
            continue
        words = reader.read([name, *values])
        if row.kind == "note":
            assert words == []
            assert reader.notes == [f"{name} has no effect here: {row.text}"]
            continue
        assert reader.notes == []
        assert ours is None or n_values(ours) == row.n_values
        (word,) = words
        action = parser.option(word.partition("=")[0])
        assert action is not None
        assert ("=" in word) == (n_values(action) == 1)


@pytest.mark.parametrize(
    "row", [r for r in rows() if r.kind == "same" and not ENDS & set(r.names)], ids=shown
)
def test_all_names_set_the_same(row: Row) -> None:
    command, values = command_of(row), values_of(row)
    parser = parser_of(command)
    ours = row.text or next(name for name in row.names if parser.option(name))
    expected = namespace(command, [ours if "=" in ours else "=".join([ours, *values])])
    for name in row.names:
        read = reader_of(parser).read([name, *values])
        # The name of ours for which a needed value is not added.
        assert namespace(command, read if "=" not in ours else [ours]) == expected
    assert (expected == namespace(command, [])) == (row.names[0] in DEFAULT)


def test_texts_name_options_and_commands_of_ours() -> None:
    known = {name for c in ("", *COMMANDS) for name in parser_of(c).names}
    for row in rows():
        named = re.findall(r"(?<![\w\].-])--?[a-z][\w-]*", row.text)
        assert set(named) <= known, row
        assert set(re.findall(r"the command ([\w-]+)", row.text)) <= set(COMMANDS), row


def test_rows_are_well_formed() -> None:
    for row in rows():
        assert row.kind in ("same", "note", "refuse")
        assert bool(row.text) or row.kind == "same", row
        assert all(re.fullmatch(r"--?[A-Za-z][\w.-]*", name) for name in row.names), row
        assert row.n_values in (0, 1, 2)
        assert not row.values or row.n_values == 1, row


# What is read from words.


def refused(cli: Cli, *argv: object) -> str:
    """The line of a usage error, without its end."""
    result = cli(*argv)
    assert (result.status, result.out) == (2, "")
    assert result.err.removesuffix("\n").isprintable()
    return re.sub(r" \(see cli\.py.* --help\)\n$", "", result.err)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("-hf", "x"), "-hf is not supported: nothing is downloaded here; get the file and name it "
         "with -m"),
        (("-fa", "-p", "a"), f"-fa: expected {SWITCH}, got '-p'"),
        (("-fa",), f"-fa: expected {SWITCH}, got nothing"),
        (("-lm", "x"), "-lm: expected auto, none, mmap, mlock, mmap+mlock, dio, got 'x'"),
        (("--prio", "-p"), "--prio: expected a value, got '-p'"),
        (("--prio",), "--prio: expected a value, got nothing"),
        (("--temperature",), "--temperature: expected a value, got nothing"),
        (("-dev", "a\nb"), r"'-dev a\nb' is not supported: one GPU runs the model; "
         "CUDA_VISIBLE_DEVICES chooses it, and --backend cpu leaves it idle"),
        (("--jinja=1",), "--jinja: expected no value, got '1'"),
        (("-mg", "1"), "-mg 1 is not supported: one GPU runs the model; CUDA_VISIBLE_DEVICES "
         "chooses it"),
        (("-n5",), "unknown option -n5 (did you mean -n 5?)"),
        (("-c=5",), "unknown option -c=5 (did you mean -c 5?)"),
        (("-l5-inf",), "unknown option -l5-inf (did you mean -l 5-inf?)"),
        (("-v1",), "unknown option -v1 (did you mean -v?)"),
        (("-temp", "1"), "unknown option -temp (did you mean --temp?)"),
        (("--flash-atn", "on"), "unknown option --flash-atn (did you mean --flash-attn?)"),
        (("-qqq",), "unknown option -qqq"),
        (("--\n",), r"unknown option '--\n'"),
        (("--",), "unknown option --"),
        (("-p", "hello", "world"), "expected an option, got 'world' (a text of several words needs "
         "quotes)"),
        (("--dot", "x"), "--dot is no option of this command, but of cli.py graph"),
        (("--ids",), "--ids is no option of this command, but of cli.py tokenize"),
        (("-m",), "argument -m/--model: expected one argument"),
    ],
)  # fmt: skip
def test_what_is_refused(cli: Cli, words: tuple[str, ...], line: str) -> None:
    assert refused(cli, *words) == f"cli.py: {line}"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("graph", "--top-k", 3), "--top-k is no option of this command, but of cli.py, "
         "cli.py serve"),
        (("graph", "--typical-p", 1), "--typical-p is no option of this command, but of cli.py, "
         "cli.py serve"),
        (("serve", "-cnv"), "-cnv is no option of this command, but of cli.py"),
        (("serve", "--reasoning-format", "none"), "--reasoning-format none is not supported: "
         "thinking comes as reasoning_content"),
        (("serve", "-hf", "x"), "-hf is not supported: nothing is downloaded here; get the file "
         "and name it with -m"),
        (("bench", "-nkvo", 1), "-nkvo 1 is not supported: the KV cache is where its layer is; "
         "-ngl N leaves layers on the CPU"),
        (("bench", "--repack", "x"), "--repack: expected 0, 1, got 'x'"),
        (("tokenize", "--nothing"), "unknown option --nothing"),
    ],
)  # fmt: skip
def test_what_a_command_refuses(cli: Cli, words: tuple[object, ...], line: str) -> None:
    assert refused(cli, *words) == f"cli.py {words[0]}: {line}"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("grpah",), "'grpah' (did you mean graph?)"),
        (("help", "perplexty"), "'perplexty' (did you mean perplexity?)"),
        (("model.gguf", "-p", "a"), "'model.gguf' (-m names a model)"),
        (("Hello there",), "'Hello there'"),
        (("\n",), r"'\n'"),
    ],
)
def test_mistyped_commands(cli: Cli, words: tuple[str, ...], hint: str) -> None:
    expected = f"expected one of {', '.join(COMMANDS)}, or options such as -p TEXT"
    assert refused(cli, *words) == f"cli.py: unknown command {hint}: {expected}"


def test_help_is_a_command(cli: Cli) -> None:
    assert cli("help") == cli("--help")
    assert cli("help", "graph") == cli("graph", "--help")
    assert all(f"cli.py {command}" in " ".join(cli("help").out.split()) for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["-p", "-5", "-n", "-1"], ["-p=-5", "-n=-1"]),
        (["-p", "--temp", "--temp", "0"], ["-p=--temp", "--temp=0"]),
        (["-p", "", "-l", "5-inf"], ["-p=", "-l=5-inf"]),
        (["-p", "a=b\n"], ["-p=a=b\n"]),
        (["--prompt=-a=b", "--n_predict=3"], ["--prompt=-a=b", "--n-predict=3"]),
        (["--top_k", "2"], ["--top-k=2"]),
        (["-f", "-", "--temp", "-"], ["-f=-", "--temp=-"]),
        (["--reasoning", "-cnv"], ["--reasoning", "-cnv"]),
        (["-rea", "off", "--reasoning"], ["-rea=off", "--reasoning"]),
        (["-dev", "none"], ["--backend=cpu"]),
        (["--device", "cuda0"], ["--backend=cuda"]),
        (["--gpu_layers", "all"], ["-ngl=all"]),
        (["--typical-p=0.5"], ["--typical=0.5"]),
        (["--chat-template-file", "-a", "--usage"], ["--chat-template=-a", "-h"]),
    ],
)  # fmt: skip
def test_values(words: list[str], read: list[str]) -> None:
    assert reader_of(parser_of("")).read(words) == read


def test_llama_bench_has_options_of_its_own() -> None:
    """Some take a value there, and none elsewhere."""
    for command, values in (("bench", ["0"]), ("", [])):
        reader = reader_of(parser_of(command))
        assert reader.read(["--repack", *values, "-ngl", "1"]) == ["-ngl=1"]
        assert len(reader.notes) == 1
    assert reader_of(parser_of("tokenize")).read(["--stdin"]) == ["--file=-"]


def test_files_of_a_command_stay() -> None:
    words = ["a", "-", "-o", "-x.png", "b"]
    assert reader_of(parser_of("plot-bench")).read(words) == ["a", "-", "-o=-x.png", "b"]


# Notes.


def test_notes_are_said_once(cli: Cli, tiny: Path) -> None:
    words = ("-fa", "on", "--mlock", "-fa", "off", "--no-mmap", "-cb", "--no-warmup")
    result = cli("-m", tiny, "-p", "a", "-n", 0, *words)
    assert result.status == 0
    notes = [line for line in result.err.splitlines() if "has no effect here: " in line]
    assert result.err.splitlines()[:5] == notes
    assert [note.split()[0] for note in notes] == [
        "-fa",
        "--mlock",
        "--no-mmap",
        "-cb",
        "--no-warmup",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-tb", "2"], True),
        (["-tb", "2", "-t", "3"], True),
        (["-t", "2", "-tb", "2"], False),
        (["--threads-batch", "2", "--threads", "2"], False),
    ],
)
def test_threads_of_prompts(words: list[str], said: bool) -> None:
    reader = reader_of(parser_of(""))
    reader.read(words)
    assert bool(reader.notes) == said


# Values of ours that llama.cpp has too.


@pytest.mark.parametrize(
    ("value", "n"),
    [("0", 0), ("7", 7), ("all", 1 << 20), ("-2", 1 << 20), ("auto", None), ("-1", None)],
)
def test_layers_on_the_gpu(value: str, n: int | None) -> None:
    assert namespace("", [f"-ngl={value}"])["n_gpu_layers"] == n


def test_backends_of_tensors() -> None:
    given = "a=CPU,b=cuda0,c=CUDA,d=reference,e=f=Cpu,g=CUDA1,h"
    expected = ["a=cpu", "b=cuda", "c=cuda", "d=reference", "e=f=cpu", "g=CUDA1", "h"]
    assert namespace("", [f"-ot={given}"])["override_tensor"] == expected
