"""Errors of the command line: one line on standard error, nothing on standard output.

Status 2 for wrong options, 1 for every other error. Bad models have their
own tests in test_bad_models.py and test_bad_files.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.backends import missing
from engine.formats.gguf import GGUFFile
from tests.support.helpers import Cli

RUN, GRAPH, TOKENIZE = (), ("graph",), ("tokenize",)


def usage_error(cli: Cli, *argv: object, stdin: bytes | None = b"") -> str:
    """The line that a usage error prints, without the program's name and the hint at --help."""
    result = cli(*argv, stdin=stdin)
    assert (result.status, result.out) == (2, "")
    assert result.err.endswith("\n")
    line = result.err.removesuffix("\n")
    assert line.isprintable()
    name = f"cli.py {argv[0]}" if argv[:1] in (GRAPH, TOKENIZE) else "cli.py"
    assert line.startswith(f"{name}: ")
    assert line.endswith(f" (see {name} --help)")
    return line.removeprefix(f"{name}: ").removesuffix(f" (see {name} --help)")


@pytest.mark.parametrize("command", [RUN, GRAPH, TOKENIZE])
def test_a_model_needs_its_name(cli: Cli, command: tuple[str, ...]) -> None:
    """Without -m, the model that comes with the engine runs."""
    assert usage_error(cli, *command, "-m") == "argument -m/--model: expected one argument"


@pytest.mark.parametrize("command", [RUN, GRAPH, TOKENIZE])
def test_unknown_options(cli: Cli, command: tuple[str, ...]) -> None:
    assert usage_error(cli, *command, "-m", "x", "--nothing") == "unknown option --nothing"
    # Names can't be shortened: a later option could make a short form ambiguous.
    expected = "unknown option --mod (did you mean --model?)"
    assert usage_error(cli, *command, "--mod", "x") == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-n", "abc"), "-n/--predict/--n-predict: invalid integer value: 'abc'"),
        (("-n", "1.5"), "-n/--predict/--n-predict: invalid integer value: '1.5'"),
        (("-n", "-3"), "-n/--predict/--n-predict: expected at least -2, got -3"),
        (("-c", "-1"), "-c/--ctx-size: expected at least 0, got -1"),
        (("-c", "4k"), "-c/--ctx-size: invalid integer value: '4k'"),
        (("-b", "0"), "-b/--batch-size: expected at least 1, got 0"),
        (("-b", "many"), "-b/--batch-size: invalid integer value: 'many'"),
        (("-ub", "0"), "-ub/--ubatch-size: expected at least 1, got 0"),
        (("-t", "all"), "-t/--threads: invalid integer value: 'all'"),
        (("-s", "-2"), "-s/--seed: expected at least -1, got -2"),
        (("-s", "x"), "-s/--seed: invalid integer value: 'x'"),
        (("--temp", "hot"), "--temp: invalid float value: 'hot'"),
        (("--top-k", "0.5"), "--top-k: invalid int value: '0.5'"),
        (("--top-p", ""), "--top-p: invalid float value: ''"),
        (("--min-p", "1,5"), "--min-p: invalid float value: '1,5'"),
        (("--repeat-last-n", "-2"), "--repeat-last-n: expected at least -1, got -2"),
        (("--gdn", "fused"), "--gdn: invalid choice: 'fused' (choose from "),
        (("-ctk", "q4_0"), "-ctk/--cache-type-k: invalid choice: 'q4_0'"),
        (("-ctv", "F16"), "-ctv/--cache-type-v: invalid choice: 'F16'"),
        (("--backend", "vulkan"), "--backend: invalid choice: 'vulkan'"),
        (("--activations", 16), "--activations: invalid choice: 16"),
        (("-f", "x"), "-f/--file: not allowed with argument -p/--prompt"),
    ],
)
def test_values_of_options(cli: Cli, tiny: Path, options: tuple[str, ...], words: str) -> None:
    line = usage_error(cli, "-m", tiny, "-p", "a", *options)
    assert line.startswith(f"argument {words}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bs", "0"), "--bs: expected at least 1, got 0"),
        (("--bs", "512,,1"), "--bs: expected integers and commas between them, got '512,,1'"),
        (("--bs", "x"), "--bs: expected integers and commas between them, got 'x'"),
        (("--gdn", "scan"), "--gdn: invalid choice: 'scan'"),
    ],
)
def test_values_of_graph_options(
    cli: Cli, tiny: Path, options: tuple[str, ...], words: str
) -> None:
    assert usage_error(cli, "graph", "-m", tiny, *options).startswith(f"argument {words}")


def test_a_terminal_gives_no_prompt(cli: Cli, tiny: Path) -> None:
    expected = "a prompt is needed: -p TEXT, -f FILE, or standard input"
    for command in (RUN, TOKENIZE):
        assert usage_error(cli, *command, "-m", tiny, stdin=None) == expected


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--temp", "nan"), "temperature: expected a number, got nan"),
        (("--temp", "inf"), "temperature: expected a number, got inf"),
        (("--top-p", "1.5"), "top_p: expected 0 to 1, got 1.5"),
        (("--top-p", "nan"), "top_p: expected 0 to 1, got nan"),
        (("--min-p", "-0.1"), "min_p: expected 0 to 1, got -0.1"),
        (("--repeat-penalty", "0"), "repeat_penalty: expected more than 0, got 0"),
        (("--repeat-penalty=-inf",), "repeat_penalty: expected at least 0, got -inf"),
        (("--repeat-last-n", str(10**30)),
         f"repeat_last_n: expected -1 to 2147483647, got {10**30}"),
        (("--seed", str(2**64)), f"seed: expected -1 to {2**64 - 1}, got {2**64}"),
        (("-c", "3", "-p", "xqzj"),
         "the prompt has 4 tokens, the context 3: shorten it or raise n_ctx (-c)"),
        (("-c", str(2**62)), f"n_ctx: expected at most 2147483647, got {2**62}"),
        (("-p", ""), "the prompt is empty: expected at least one token"),
    ],
)  # fmt: skip
def test_what_cannot_be_run(cli: Cli, tiny: Path, options: tuple[str, ...], line: str) -> None:
    assert cli("-m", tiny, "-p", "a", *options).refused() == line


@pytest.mark.skipif(not missing("cuda"), reason="there is a GPU")
@pytest.mark.parametrize("command", [("-p", "a"), ("graph",), ("sweep-bench",)])
def test_a_backend_that_is_not_there(cli: Cli, tiny: Path, command: tuple[str, ...]) -> None:
    line = cli(*command, "-m", tiny, "--backend", "cuda").refused()
    assert line.startswith("backend cuda: expected ")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("-ot", "a=b"), "--override-tensor: expected REGEX=BACKEND with one of cpu, reference "
         "(in use), got 'a=b'"),
        (("-ot", "(=cpu"), "--override-tensor (=cpu: no regular expression: missing ), "
         "unterminated subpattern at position 0"),
        (("-ot", "ffn_oops=cpu"), "--override-tensor ffn_oops=cpu: matches no weight of the model"),
        (("-ot", "ffn=cuda"), "--override-tensor: expected REGEX=BACKEND with one of cpu, "
         "reference (in use), got 'ffn=cuda'"),
    ],
)  # fmt: skip
def test_placement_that_is_impossible(
    cli: Cli, tiny: Path, options: tuple[str, ...], line: str
) -> None:
    assert cli("-m", tiny, "-p", "a", "--backend", "cpu", *options).refused() == line


def test_a_number_of_layers_that_is_none(cli: Cli, tiny: Path) -> None:
    line = usage_error(cli, "-m", tiny, "-p", "a", "-ngl", "most")
    expected = "expected a number of layers, all or auto, got 'most'"
    assert line == f"argument -ngl/--n-gpu-layers: {expected}"


def test_a_prompt_must_come_before_the_model_is_read(cli: Cli, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    line = cli("-m", tmp_path / "m", "-f", missing).refused()
    assert line == f"{missing}: No such file or directory"


@pytest.mark.parametrize("command", [RUN, TOKENIZE])
def test_prompts_that_cannot_be_read(
    cli: Cli, tiny: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    directory, latin = tmp_path, tmp_path / "latin"
    latin.write_bytes("naïve".encode("latin-1"))

    def refused(*options: object, stdin: bytes = b"") -> str:
        return cli(*command, "-m", tiny, *options, stdin=stdin).refused()

    assert refused("-f", directory) == f"{directory}: Is a directory"
    expected = "expected UTF-8, got byte 0xef at offset 2"
    assert refused("-f", latin) == f"{latin}: {expected}"
    assert refused(stdin=latin.read_bytes()) == f"standard input: {expected}"
    # Half a character at the end.
    assert refused(stdin=b"ab\xc3") == "standard input: expected UTF-8, got byte 0xc3 at offset 2"
    # Python decodes bytes of an argument that are not UTF-8 to lone surrogates.
    line = refused("-p", "a\udcff")
    assert line == "text cannot be encoded: lone surrogate '\\udcff' at character 1"
    # An empty name is not standard input.
    assert refused("-f", "", stdin=b"text").endswith(("No such file or directory", "directory"))


def test_empty_prompts_from_files(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "line").write_text("\n")
    for name in ("empty", "line"):
        line = cli("-m", tiny, "-f", tmp_path / name).refused()
        assert line == "the prompt is empty: expected at least one token"
    assert cli("-m", tiny, stdin=b"").refused().startswith("the prompt is empty")


@pytest.mark.parametrize("name", ["missing/graph.dot", "."])
def test_a_graph_that_cannot_be_written(cli: Cli, tiny: Path, tmp_path: Path, name: str) -> None:
    result = cli("graph", "-m", tiny, "--dot", tmp_path / name)
    assert result.refused().startswith(f"{tmp_path / name}: ")


def test_names_with_line_ends_stay_on_one_line(cli: Cli, tmp_path: Path) -> None:
    line = cli("-m", tmp_path / "two\nlines", "-p", "a").refused()
    assert line.endswith("No such file or directory")


def test_out_of_memory(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(self: object, states: object, extra: object) -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr("engine.backends.native.states.ArrayStates.allocate", allocate)
    line = cli("-m", tiny, "-p", "a").refused()
    assert line == "out of memory: Unable to allocate 9 GiB; lower -c, -ub, -np or -t"


def test_interrupted_before_the_first_token(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object, path: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GGUFFile, "__init__", interrupted)
    for command in (("-p", "a"), GRAPH, ("tokenize", "-p", "a")):
        assert cli(*command, "-m", tiny) == (130, "", "")


def test_verbose_shows_the_traceback_of_an_error(cli: Cli, tmp_path: Path) -> None:
    result = cli("-v", "-m", tmp_path / "none", "-p", "a")
    assert (result.status, result.out) == (1, "")
    first, *_, last = result.err.splitlines()
    assert first.startswith("Traceback")
    assert last.endswith("No such file or directory")
