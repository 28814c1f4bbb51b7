"""Build the corpus that travels to the machine that trains: text, vocabulary, held-out text.

    python tools/train_demo/corpus.py -o build/demo-corpus

The text is the standard library of the Python that runs this (PSF licence): the topics of its
reference, docstrings, and source. Tasks are not in it: training draws them as it goes.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import hashlib
import importlib
import inspect
import json
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.train_demo.questions import is_held_out
from tools.train_demo.rows import (
    KINDS_OF_TEXT,
    conversation,
    memory_document,
    plain,
    recall_document,
    tools_document,
)
from tools.train_demo.smalltalk import PAIRS
from tools.train_demo.tokenizer import END_OF_TEXT, normal_text, train_tokenizer

_SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "ensurepip", "turtledemo",
    "pydoc_data", "__pycache__", "__phello__", "_pyrepl", "distutils",
}  # fmt: skip
_MAX_HELD_OUT = 95_000
_SAMPLED = (conversation, plain, recall_document, tools_document, memory_document)
_DOCUMENTED = (
    "builtins", "math", "random", "os", "os.path", "string", "textwrap", "itertools", "functools",
    "collections", "json", "time", "re", "shutil", "statistics", "heapq", "bisect", "copy",
    "str", "list", "dict", "set", "bytes", "int", "float", "tuple",
)  # fmt: skip


def modules() -> Iterator[tuple[str, str]]:
    """Name and source of every module of the standard library, tests and tables left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and not parts[0].startswith(("config-", "_sysconfig")):
            yield ".".join(parts), path.read_text("utf-8", "replace")


def docstrings(name: str, source: str) -> str:
    """The docstrings of a module's source, each under the name of what it is for."""
    found: list[str] = []

    def visit(node: ast.AST, path: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner = f"{path}.{child.name}"
                arguments = "" if isinstance(child, ast.ClassDef) else f"({_arguments(child)})"
                if doc := ast.get_docstring(child):
                    found.append(f"{inner}{arguments}\n\n{doc}")
                visit(child, inner)

    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(source)
    if doc := ast.get_docstring(tree):
        found.append(f"{name}\n\n{doc}")
    visit(tree, name)
    return "\n\n".join(found)


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return ", ".join(a.arg for a in function.args.args)


def documents() -> Iterator[tuple[str, str, str]]:
    """(kind, name, text) of all documents; what one name has is held out or trained together."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield "topics", name, text
    for name, source in modules():
        if len(docs := docstrings(name, source)) > 200:
            yield "docstrings", name, docs
        yield "source", name, source


def questions_about_python() -> list[tuple[str, str]]:
    """What functions do: their names and the first lines of their docstrings."""
    found: dict[str, str] = {}
    for owner_name in _DOCUMENTED:
        builtin = getattr(builtins, owner_name, None)
        owner = builtin or importlib.import_module(owner_name)
        for name, member in sorted(vars(owner).items()):
            if name.startswith("_") or not callable(member):
                continue
            full = name if owner_name == "builtins" else f"{owner_name}.{name}"
            line = re.split(r"(?<=\.)\s|\n\n", inspect.getdoc(member) or "")[0]
            line = " ".join(line.split())
            if line.endswith(".") and 15 < len(line) < 100 and line.isascii() and "->" not in line:
                found[full] = line
    return sorted(found.items())


def build(out: Path) -> None:
    """Write tokenizer.json, text.npz, python.json, heldout.txt and corpus.json to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    kept: dict[str, list[str]] = {kind: [] for kind in KINDS_OF_TEXT}
    held_out: list[str] = []
    for kind, name, text in documents():
        if name in _DOCUMENTED or not is_held_out(f"text {name}"):
            kept[kind].append(text)
        elif kind != "source" and len(text) < 15_000:
            held_out.append(text)
    Random(0).shuffle(held_out)
    held_out_text = "\n\n".join(held_out)[:_MAX_HELD_OUT]
    python = questions_about_python()
    rng, sample = Random("vocabulary"), []
    for _ in range(4000):
        for text, _ in rng.choice(_SAMPLED)(rng, python):
            sample += normal_text(text)
    # Twice: what people read is rarer than source.
    prose = [*kept["topics"], *kept["docstrings"]] * 2
    pipeline = train_tokenizer(
        [*prose, *kept["source"], *sample, *(a for pair in PAIRS for a in pair)]
    )
    pipeline.save(str(out / "tokenizer.json"))
    arrays: dict[str, Any] = {}
    for kind, texts in kept.items():
        encoded = [[END_OF_TEXT, *e.ids] for e in pipeline.encode_batch(texts)]
        arrays[kind] = np.concatenate([np.array(ids, np.uint16) for ids in encoded])
    np.savez_compressed(out / "text.npz", **arrays)
    (out / "python.json").write_text(json.dumps(python, indent=0))
    (out / "heldout.txt").write_text(held_out_text)
    facts = {
        "source": f"standard library of Python {platform.python_version()} (PSF licence)",
        "characters": {kind: sum(map(len, texts)) for kind, texts in kept.items()},
        "tokens": {kind: len(ids) for kind, ids in arrays.items()},
        "held_out_characters": len(held_out_text),
        "sha256": {
            name: hashlib.sha256((out / name).read_bytes()).hexdigest()
            for name in ("tokenizer.json", "python.json", "heldout.txt")
        },
    }
    (out / "corpus.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts, indent=1))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("build/demo-corpus"))
    build(parser.parse_args().out)


if __name__ == "__main__":
    main()
