"""Imports point one way: every module of the engine imports from its own layer or from lower ones.

The source is walked, so that imports inside functions and under TYPE_CHECKING count like any
other. A new module has to be given its place here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from engine.backends import REGISTRY
from engine.models import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent
# Lowest first; modules of one line may import each other, without cycles. A package's modules
# have its place.
ORDER = (
    {"errors", "version", "checks", "threads"},
    {"formats"},
    {"graph"},
    {"ops"},
    {"models"},
    {"kvcache"},
    {"text"},
    {"sampling"},
    {"backends"},
    {"placement"},
    {"config"},
    {"runtime"},
    {"planning"},
    {"engine"},
    {"api"},
    {"bench"},
    {"server"},
    {"commands"},
    {"__main__", "cli"},
)
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
# What only opens the package to its users is on top of the engine.
FACADE = "engine"
# What architectures share; every other file of models/ is an architecture of its own.
SHARED_BY_MODELS = {
    "attention",
    "base",
    "delta_net",
    "hparams",
    "hybrid",
    "kda_hybrid",
    "layers",
    "moe",
    "rope",
    "weights",
}


def modules(root: Path) -> dict[str, Path]:
    """The engine's modules, and the command line's, by dotted name."""
    found = {"cli": root / "cli.py"}
    for path in sorted((root / "engine").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = path
    return found


def part_of(module: str) -> str:
    """The part of the engine that a module belongs to: its first name under `engine`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def imports(module: str, path: Path, known: Iterable[str]) -> Iterator[str]:
    """The engine's modules that a module imports, wherever in it that happens."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        for name in _named(node, package):
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name:
                yield name


def _named(node: ast.AST, package: str) -> list[str]:
    """Modules, or names in modules, that one statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*(above if node.level else []), *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
        ("import_module", "__import__")
    ):
        return [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def graph_of(root: Path) -> dict[str, set[str]]:
    """Module -> modules it imports."""
    known = modules(root)
    return {name: set(imports(name, path, known)) - {name} for name, path in known.items()}


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    return graph_of(ROOT)


def violations(imported: dict[str, set[str]]) -> list[str]:
    """Imports that point upwards."""
    found = []
    for module, targets in imported.items():
        if module == FACADE:
            continue
        for target in targets:
            higher = target == FACADE or LEVEL[part_of(target)] > LEVEL[part_of(module)]
            if higher and part_of(module) not in ("cli", "commands"):
                found.append(f"{module} imports {target}")
    return sorted(found)


def cycle(imported: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, or none; a package imports its own modules."""
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> list[str]:
        if module in above:
            return [*above[above.index(module) :], module]
        if module in done:
            return []
        for target in sorted(imported[module]):
            if ring := visit(target, (*above, module)):
                return ring
        done.add(module)
        return []

    return next((ring for module in sorted(imported) if (ring := visit(module, ()))), [])


def test_every_module_has_its_place(imported: dict[str, set[str]]) -> None:
    placed = {part_of(module) for module in imported if module != FACADE}
    assert placed <= LEVEL.keys(), sorted(placed - LEVEL.keys())


def test_imports_point_one_way(imported: dict[str, set[str]]) -> None:
    assert violations(imported) == []


def test_no_modules_import_each_other_in_a_ring(imported: dict[str, set[str]]) -> None:
    assert cycle(imported) == []


def test_models_and_backends_do_not_know_each_other(imported: dict[str, set[str]]) -> None:
    for module, targets in imported.items():
        others = {part_of(target) for target in targets}
        assert not (part_of(module) == "models" and "backends" in others), module
        assert not (part_of(module) == "backends" and "models" in others), module


def test_architectures_do_not_import_each_other(imported: dict[str, set[str]]) -> None:
    architectures = {
        module
        for module in imported
        if module.startswith("engine.models.") and module.split(".")[2] not in SHARED_BY_MODELS
    }
    assert architectures == {model.__module__ for model in ARCHITECTURES.values()}
    for module in imported:
        if module.startswith("engine.models."):
            assert not imported[module] & architectures, module


def test_an_op_imports_no_other_op(imported: dict[str, set[str]]) -> None:
    """But for the decomposed delta rule, which is made of them."""
    shared = {"engine.ops.base", "engine.ops.rope"}
    for module, targets in imported.items():
        if module.startswith("engine.ops.") and module != "engine.ops.decomposed":
            others = {t for t in targets if part_of(t) == "ops"} - shared
            assert not others, (module, others)


def test_no_backend_s_name_decides_anything_elsewhere() -> None:
    """Options ask a backend's traits; only the option parser and the backends know names."""
    names = {r.name for r in REGISTRY}
    for module, path in modules(ROOT).items():
        if module.startswith("engine.backends") or module == "engine.commands.options":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant):
                assert node.value not in names, (module, node.lineno, node.value)


def test_only_the_server_needs_its_packages() -> None:
    """The engine itself, and what the server makes of texts, run without a web library."""
    packages = {"starlette", "uvicorn", "msgspec", "prometheus_client"}
    texts = {f"engine.server.{name}" for name in ("messages", "answers", "calls", "replays")}
    for module, path in modules(ROOT).items():
        named = {
            name.partition(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in _named(node, module)
        }
        is_server = module.startswith(("engine.server.", "engine.commands.serv"))
        assert not named & packages or (is_server and module not in texts), module


def write(root: Path, sources: dict[str, str]) -> Path:
    for name, source in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return root


@pytest.mark.parametrize(
    "statement",
    [
        "from engine.models import qwen35",
        "import engine.models.qwen35 as q",
        "def f():\n    from engine.models.qwen35 import Qwen35",
        "if TYPE_CHECKING:\n    from ..models.qwen35 import Qwen35",
        "from .. import models",
        "import importlib\nimportlib.import_module('engine.models.qwen35')",
        "from engine import Engine",
    ],
)
def test_every_way_to_import_upwards_is_seen(tmp_path: Path, statement: str) -> None:
    """The walker itself: an op that imports a model."""
    sources = {"cli.py": "", "engine/__init__.py": "", "engine/ops/__init__.py": ""}
    sources |= {"engine/models/__init__.py": "", "engine/models/qwen35.py": ""}
    root = write(tmp_path, sources | {"engine/ops/exp.py": statement})
    assert violations(graph_of(root))


def test_rings_are_seen(tmp_path: Path) -> None:
    sources = {"cli.py": "", "engine/__init__.py": "", "engine/ops/__init__.py": ""}
    sources |= {"engine/ops/a.py": "import engine.ops.b", "engine/ops/b.py": "from . import a"}
    ring = cycle(graph_of(write(tmp_path, sources)))
    assert set(ring) == {"engine.ops.a", "engine.ops.b"}
    assert violations(graph_of(tmp_path)) == []
