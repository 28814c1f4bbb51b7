"""Installations: which kernels a checkout takes, what can't run says so, and `--version`.

The installations are copies of the package; nothing is compiled here.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine import __version__, version
from engine.backends.native import library
from engine.commands.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DEPENDENCIES = [entry for entry in sys.path if entry.endswith("-packages")]
BACKEND = ROOT / "tools" / "packaging" / "backend.py"


def copy(folder: Path, native: bool) -> Path:
    """A copy of the package in a folder, with or without its kernels."""
    ignored = shutil.ignore_patterns("native", "__pycache__", "data")
    shutil.copytree(ROOT / "engine", folder / "engine", ignore=ignored)
    # The pattern leaves out engine/backends/native as well.
    backend = Path("engine", "backends", "native")
    shutil.copytree(ROOT / backend, folder / backend)
    if native:
        (folder / "engine" / "native").mkdir()
        for path in library.built().values():
            (folder / "engine" / "native" / path.name).symlink_to(path)
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which nothing is built."""
    copy(tmp_path / "checkout", native=False)
    shutil.copy(ROOT / "cli.py", tmp_path / "checkout")
    return tmp_path / "checkout"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages with an installed engine."""
    return copy(tmp_path / "site", native=True)


def run(cwd: Path, *argv: object, path: list[Any]) -> subprocess.CompletedProcess[str]:
    """Run Python with packages of `path` alone: -S leaves out those of the tests' own Python."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-S", *map(str, argv)], cwd=cwd, env=env, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def completion(tiny: Path) -> tuple[object, ...]:
    return "-m", tiny, "-p", "a", "-n", 1


@pytest.mark.parametrize("program", [("cli.py",), ("-m", "engine")])
def test_a_checkout_takes_the_kernels_of_an_installation(
    checkout: Path, site: Path, tiny: Path, program: tuple[str, ...]
) -> None:
    done = run(checkout, *program, *completion(tiny), path=[site, *DEPENDENCIES])
    assert (done.returncode, done.stdout[:1]) == (0, "a")


def test_kernels_of_other_sources_are_refused(checkout: Path, site: Path, tiny: Path) -> None:
    with (site / "engine" / "ops" / "cpu" / "kernels.h").open("a") as header:
        header.write("\n")
    done = run(checkout, "cli.py", *completion(tiny), path=[site, *DEPENDENCIES])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {checkout}/engine shadows the installed {site}/engine, whose CPU kernels were "
        f"built from other sources: run `pip install {checkout}` again\n"
    )
    # The installed package itself runs from any other folder.
    done = run(Path("/"), "-m", "engine", *completion(tiny), path=[site, *DEPENDENCIES])
    assert done.returncode == 0


def test_without_kernels(checkout: Path, tiny: Path) -> None:
    done = run(checkout, "cli.py", *completion(tiny), path=DEPENDENCIES)
    line = f"error: the CPU kernels are not built: run `pip install -e {checkout}`\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


@pytest.mark.parametrize("has_venv", [False, True])
def test_without_packages(checkout: Path, has_venv: bool) -> None:
    """As with a system's Python, after `make demo` has set up .venv."""
    python = checkout / ".venv" / "bin" / "python"
    if has_venv:
        python.parent.mkdir(parents=True)
        python.touch()
    done = run(checkout, "cli.py", "graph", path=[])
    how = f"run {python} {checkout}/cli.py" if has_venv else "pip install numpy"
    line = f"error: expected the package numpy, which {sys.executable} does not have: {how}\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


@pytest.mark.parametrize("program", ["gdn", "cli.py"])
def test_help_and_errors_name_the_command_as_it_was_called(tmp_path: Path, program: str) -> None:
    script = tmp_path / program
    script.write_text("import sys\nfrom engine.commands.main import main\nsys.exit(main())\n")
    done = run(tmp_path, script, "--help", path=[ROOT, *DEPENDENCIES])
    assert done.stdout.startswith(f"usage: {program} [-h] ")
    # Lines break at spaces and at hyphens.
    assert all(f"{program}{c}" in "".join(done.stdout.split()) for c in COMMANDS)
    done = run(tmp_path, script, "graph", "-x", path=[ROOT, *DEPENDENCIES])
    expected = f"{program} graph: unknown option -x (see {program} graph --help)\n"
    assert (done.returncode, done.stderr) == (2, expected)


# The commit.


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package of which `commit` speaks."""
    (tmp_path / "engine" / "native").mkdir(parents=True)
    monkeypatch.setattr(version, "__file__", str(tmp_path / "engine" / "version.py"))
    return tmp_path / "engine"


def git(root: Path, *argv: str) -> str:
    who = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    return subprocess.check_output(["git", "-C", root, *who, *argv], text=True).strip()


def test_the_commit_of_a_checkout(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = package.parent
    git(root, "init", "-q")
    # Before the first commit, git has nothing to say.
    assert version.commit() == ""
    (root / "file").write_text("1")
    git(root, "add", "file")
    git(root, "commit", "-qm", "one")
    git(root, "tag", "-m", "", "v1")
    monkeypatch.setenv("GIT_DIR", str(root / "none"))
    monkeypatch.setenv("GIT_WORK_TREE", str(root / "none"))
    expected = git(root, "--git-dir=.git", "rev-parse", "--short", "HEAD")
    assert version.commit() == expected
    (root / "file").write_text("2")
    assert version.commit() == f"{expected}-dirty"
    monkeypatch.setenv("PATH", "")
    assert version.commit() == ""


def test_the_commit_of_an_installed_package(package: Path) -> None:
    assert version.commit() == ""
    # An environment may lie in somebody's checkout.
    git(package.parent.parent, "init", "-q")
    (package / "native" / "commit").write_text("38ab9b7\n")
    assert version.commit() == "38ab9b7"


def test_the_version_has_the_commit(checkout: Path, site: Path) -> None:
    (site / "engine" / "native" / "commit").write_text("38ab9b7")
    done = run(site, "-m", "engine", "--version", path=[site, *DEPENDENCIES])
    assert done.stdout.startswith(f"gdn-engine {__version__} (38ab9b7): ")
    # A checkout without git may have changed since the installation was built.
    done = run(checkout, "cli.py", "--version", path=[site, *DEPENDENCIES])
    assert done.stdout.startswith(f"gdn-engine {__version__}: ")


# Where it can't be built.


@pytest.mark.parametrize(
    ("system", "cxx", "words"),
    [
        ("win32", "", "expected Linux (on Windows: WSL), got Fake"),
        ("darwin", "", "expected Linux (on Windows: WSL), got Fake"),
        ("linux", "", "expected a C++17 compiler, found no g++ or c++ or clang++ (PATH): apt-get "
         "install g++"),
        ("linux", "no-such -m64", "expected a C++17 compiler, found no no-such -m64 (CXX): apt-get "
         "install g++"),
    ],
)  # fmt: skip
def test_an_installation_that_can_t_be_built_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, system: str, cxx: str, words: str
) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.system", lambda: "Fake")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(BACKEND))
    assert stopped.value.code == f"gdn-engine: {words}"


@pytest.mark.parametrize(("cxx", "chosen"), [("", "clang++"), ("a-cxx -m64", "a-cxx -m64")])
def test_the_build_takes_the_compiler_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cxx: str, chosen: str
) -> None:
    for name in ("clang++", "a-cxx"):
        (tmp_path / name).touch(mode=0o755)
    build = ModuleType("scikit_build_core.build")
    build.build_wheel = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "scikit_build_core", ModuleType("scikit_build_core"))
    monkeypatch.setitem(sys.modules, "scikit_build_core.build", build)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", cxx)
    assert "build_wheel" in runpy.run_path(str(BACKEND))
    assert os.environ["CXX"] == chosen
