"""Compare engine/data/llama-options.tsv with llama.cpp's own list of options.

    python tools/llama_options.py LLAMA_CPP

LLAMA_CPP: a folder with llama.cpp's sources, of which common/arg.cpp and
tools/llama-bench/llama-bench.cpp are read. llama-cpp-python's source distribution has them in
vendor/llama.cpp. Prints a line for each option that the data file lacks, has too much, or has with
another number of values or for other programs; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.commands.words import BENCH, EARLIER, rows

_STRING = r'"(?:\\.|[^"\\])*"'


class Option(NamedTuple):
    """All names of an option, and how many values it takes."""

    names: tuple[str, ...]
    n_values: int


Options = dict[Option, set[str]]  # An option -> the programs that have it.


def of_common(source: str) -> Options:
    """The options in the text of common/arg.cpp; the negative names of a switch are one more."""
    source, found = _without_comments(source), Options()
    for entry in re.split(r"\badd_opt\(\s*common_arg\(", source)[1:]:
        arguments = list(_arguments(entry))
        parameters = re.match(r"\[\]\s*\(([^)]*)\)", arguments[-1])
        assert parameters, arguments
        types = parameters[1].split(",")[1:]
        n_values = 0 if "bool" in " ".join(types) else len(types)
        for names in arguments[: 2 if arguments[1].startswith("{") else 1]:
            option = Option(_names(names), n_values)
            found.setdefault(option, set()).update(_programs(entry, source))
    return found


def of_bench(source: str) -> Options:
    """The options in the text of llama-bench.cpp, a chain of comparisons with `arg`."""
    branches = re.split(r"\bif \(([^{}]*\barg == \"-[^{}]*)\) \{", _without_comments(source))
    pairs = zip(branches[1::2], branches[2::2], strict=True)
    return {
        Option(_names(condition), int("++i" in body.split("} else {")[0])): {BENCH}
        for condition, body in pairs
    }


def _without_comments(source: str) -> str:
    comment = re.compile(rf"({_STRING})|//[^\n]*|/\*.*?\*/", re.S)
    return comment.sub(lambda match: match[1] or " ", source)


def _arguments(call: str) -> Iterator[str]:
    """The arguments of a call, from behind its parenthesis on."""
    depth, argument = 0, ""
    for part in re.findall(rf"{_STRING}|[^\"]", call, re.S):
        if depth == 0 and part in (",", ")"):
            yield argument.strip()
            argument = ""
            if part == ")":
                return
            continue
        depth += (part in ("(", "{", "[")) - (part in (")", "}", "]"))
        argument += part


def _names(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r'"(-[^"]*)"', text))


def _programs(entry: str, source: str) -> set[str]:
    """The programs of an entry; a list of them may have a name."""
    given = re.search(r"\.set_examples\(\s*(\{[^}]*\}|\w+)", entry)
    if given is None:
        return {"common"}
    listed = (
        re.search(rf"\b{given[1]}\s*=\s*(\{{[^}}]*\}})", source) if given[1][0] != "{" else given
    )
    assert listed, given[1]
    return {name.lower() for name in re.findall(r"LLAMA_EXAMPLE_(\w+)", listed[1])}


def differences(ours: Options, theirs: Options) -> list[str]:
    """What the data file lacks, has too much, or has otherwise than llama.cpp, a line each."""
    lines = []
    for what, some, others in (("missing", theirs, ours), ("surplus", ours, theirs)):
        lines += [f"{what}: {_shown(o)}" for o in some.keys() - others.keys()]
    for option in ours.keys() & theirs.keys():
        if ours[option] != theirs[option]:
            came = ",".join(sorted(ours[option]))
            expected = ",".join(sorted(theirs[option]))
            lines.append(f"programs of {_shown(option)}: expected {expected}, got {came}")
    return sorted(lines)


def _shown(option: Option) -> str:
    return f"{','.join(option.names)} ({option.n_values} values)"


def recorded() -> Options:
    """The options of the data file, without those that only earlier versions have."""
    return {
        Option(row.names, row.n_values): set(row.programs)
        for row in rows()
        if EARLIER not in row.programs
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="llama.cpp's sources")
    folder = parser.parse_args(argv).folder
    theirs = of_common((folder / "common/arg.cpp").read_text())
    bench = of_bench((folder / "tools/llama-bench/llama-bench.cpp").read_text())
    for option, programs in bench.items():
        theirs.setdefault(option, set()).update(programs)
    found = differences(recorded(), theirs)
    print("\n".join([*found, f"{len(theirs)} options, {len(found)} differences"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
