"""Size budgets: how long functions and files may be, and the engine as a whole.

Complexity, numbers of arguments and branches are ruff's to check (pyproject.toml), import levels
tests/test_layering.py's.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FUNCTION_LINES, MAX_FILE_LINES = 50, 400
# Of engine/ and cli.py without the server, and of the server; lines of code are those without blank
# lines, comments and docstrings.
BUDGETS = {"engine": (22_900, 16_000), "server": (3_200, 2_380)}
KERNEL_SUFFIXES = {".h", ".cpp", ".cuh", ".cu"}


def python_files(root: Path = ROOT) -> list[Path]:
    """The Python files of the engine and of the command line."""
    return [root / "cli.py", *sorted((root / "engine").rglob("*.py"))]


def kernel_files() -> list[Path]:
    """The C++ and CUDA sources of the engine."""
    files = (ROOT / "engine").rglob("*")
    return sorted(path for path in files if path.suffix in KERNEL_SUFFIXES)


def long_functions(path: Path) -> Iterator[str]:
    """Functions with too many lines, as `file:line name: lines`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            n_lines = (node.end_lineno or 0) - node.lineno + 1
            if n_lines > MAX_FUNCTION_LINES:
                yield f"{path.name}:{node.lineno} {node.name}: {n_lines} lines"


def n_code_lines(text: str) -> int:
    """Lines of a module that are neither blank nor comments nor docstrings."""
    documented = set[int]()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        match first:
            case ast.Expr(value=ast.Constant(value=str())):
                documented |= set(range(first.lineno, (first.end_lineno or 0) + 1))
    lines = (line.strip() for line in text.split("\n"))
    return sum(
        bool(line) and not line.startswith("#") and i not in documented
        for i, line in enumerate(lines, 1)
    )


def test_functions_are_short() -> None:
    assert [found for path in python_files() for found in long_functions(path)] == []


def test_files_are_short() -> None:
    sizes = {path: path.read_text().count("\n") for path in (*python_files(), *kernel_files())}
    long = {p.relative_to(ROOT).as_posix(): n for p, n in sizes.items() if n > MAX_FILE_LINES}
    assert long == {}


def is_of_server(path: Path) -> bool:
    """The server's room, and the command that runs it."""
    return path.parent.name == "server" or path.name in ("serve.py", "serving.py")


@pytest.mark.parametrize("part", BUDGETS)
def test_each_part_is_within_its_budget(part: str) -> None:
    paths = [p for p in python_files() if is_of_server(p) == (part == "server")]
    texts = [path.read_text() for path in paths]
    n_lines, n_code = sum(t.count("\n") for t in texts), sum(map(n_code_lines, texts))
    most_lines, most_code = BUDGETS[part]
    assert n_lines <= most_lines, f"{n_lines} lines ({n_code} of code)"
    assert n_code <= most_code, f"{n_code} lines of code ({n_lines} in all)"


def test_lines_of_code_are_counted_without_words() -> None:
    text = '"""One.\n\ntwo."""\n\n# three\nx = 1  # one\n\n\n'
    text += 'def f():\n    """Doc."""\n    return """\n"""\n'
    assert n_code_lines(text) == 4


def test_a_long_function_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES)
    assert list(long_functions(path)) == [f"a.py:1 f: {MAX_FUNCTION_LINES + 1} lines"]
