"""Documents name files that exist, and docs/design.md has one line for every module."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DESIGN = ROOT / "docs" / "design.md"
DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "tests" / "README.md")
    # It names files of earlier versions too.
    if path.name != "CHANGELOG.md"
)
# A file or folder of the repository in backticks, without placeholders.
_PATH = re.compile(r"`((?:engine|tests|tools|docs)/[\w./-]*)`")
# Stems of the files that docs/adding-*.md tell a reader to write.
_EXAMPLES = {"squared_relu", "toy"}
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def section(text: str, title: str) -> str:
    """The text under a heading of the second level, up to the next one."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def module_lines(text: str) -> list[str]:
    """The files that have a line in a `### folder/` part of a section, as paths."""
    found, folder = [], ""
    for line in text.splitlines():
        if match := re.match(r"### (\S+/)", line):
            folder = match[1]
        elif line.startswith("### "):
            folder = ""
        elif folder and (match := re.match(r"- `([\w.]+)`: \S", line)):
            found.append(folder + match[1])
    return found


def has_statements(path: Path) -> bool:
    """Whether a module is more than a docstring."""
    body = ast.parse(path.read_text()).body
    return any(not isinstance(node, ast.Expr | ast.ImportFrom) for node in body)


def test_every_module_has_one_line() -> None:
    lines = module_lines(section(DESIGN.read_text(), "Modules"))
    paths = [p for p in (ROOT / "engine").rglob("*.py") if p.name != "__init__.py"]
    paths += [p for p in (ROOT / "engine").rglob("__init__.py") if has_statements(p)]
    modules = {p.relative_to(ROOT).as_posix() for p in paths} - {"engine/__init__.py"}
    missing, gone = modules - set(lines), {n for n in lines if not (ROOT / n).is_file()}
    assert (sorted(missing), sorted(gone)) == ([], [])
    assert [name for name, n in Counter(lines).items() if n > 1] == []


def test_the_pages_of_flow_name_each_file_once() -> None:
    """The call chain ends at both kernels; the page on text names no file twice."""
    chain = _PATH.findall(section(DESIGN.read_text(), "From a prompt to a kernel"))
    assert chain[0] == "engine/commands/main.py"
    for kernel in ("engine/ops/cpu/gated_delta_net.cpp", "engine/ops/cuda/gated_delta_net.cu"):
        assert kernel in chain
    named = _PATH.findall(section(DESIGN.read_text(), "From a prompt to text"))
    twice = {name for name, n in Counter(named).items() if n > 1}
    assert twice == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_documents_name_files_that_exist(path: Path) -> None:
    text = path.read_text()
    paths = _PATH.findall(text)
    named = [(ROOT, name) for name in paths if Path(name).stem not in _EXAMPLES]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    named += [(path.parent, name) for name in _LINK.findall(prose)]
    assert sorted({name for base, name in named if not (base / name).exists()}) == []


def test_the_glossary_is_alphabetical() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    words = [w.lower().replace("-", " ") for w in re.findall(r"^\*\*([^*,]+)", text, re.M)]
    assert words == sorted(words)
    assert len(set(words)) == len(words)


def test_a_missing_module_is_seen() -> None:
    text = "\n### engine/ops/: ops\n\n- `a.py`: one.\n- `b.py`:\n\n### Choices\n\n- `c.py`: no.\n"
    assert module_lines(text) == ["engine/ops/a.py"]
