"""Compiles the kernels of engine/ops/cuda for the host, once for each state of their sources.

Of one source comes one library. The sources are mirrored by links into a folder where the
emulator's primitives.cuh lies beside them: includes are looked up there first.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.backends import nvrtc

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "cuda_emulator"
_FLAGS = (
    "-std=c++17 -O1 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas "
    "-Wno-attributes"
).split()
# Errors of the launch, see runtime.cpp; libubsan is not linked.
_CHECKS = ["-fsanitize=bounds,alignment,null", "-fno-sanitize-recover=all"]


class BuildError(Exception):
    """What the compiler said."""


@functools.cache
def compiler() -> str | None:
    """The C++ compiler: of CXX, or the first of the usual names."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((name for name in names if name and shutil.which(name)), None)


def sources(directory: Path) -> dict[str, Path]:
    """The .cu files below a directory by name, as nvrtc.sources has them."""
    return {str(p.relative_to(directory))[:-3]: p for p in sorted(directory.rglob("*.cu"))}


@functools.cache
def runtime() -> Path:
    """The library that launches kernels."""
    texts = [*sorted(HERE.glob("include/*")), HERE / "context.h", HERE / "runtime.cpp"]
    path = BUILD / f"runtime-{_digest(texts)}.so"
    with _lock():
        if not path.exists():
            _compile(path, [*_FLAGS, "-fvisibility=default", str(HERE / "runtime.cpp")])
    return path


def kernels(directory: Path = nvrtc.SOURCES) -> dict[str, Callable[[], Path]]:
    """For each source a function that gives its library or raises BuildError.

    All that is missing is compiled first, on two cores; other processes wait.
    """
    found, mirror = sources(directory), BUILD / f"mirror-{_digest([HERE], directory.name)}"
    headers = sorted({*nvrtc.SOURCES.rglob("*.cuh"), *directory.rglob("*.cuh")})
    common = [*headers, *sorted(HERE.glob("include/*"))]
    paths = {n: BUILD / f"{n.replace('/', '-')}-{_digest([*common, p])}.so" for n, p in found.items()}
    with _lock():
        missing = [n for n in found if not paths[n].exists()]
        if missing:
            _mirror(mirror, directory)
            with ThreadPoolExecutor(2) as pool:
                work = {n: pool.submit(_build, mirror, n, paths[n]) for n in missing}
    errors = {n: w.exception() for n, w in work.items()} if missing else {}

    def library(name: str) -> Path:
        if error := errors.get(name):
            raise error
        return paths[name]

    return {n: functools.partial(library, n) for n in found}


def _build(mirror: Path, name: str, target: Path) -> None:
    source, flags = mirror / f"{name}.cu", [f"-I{mirror}", f"-I{HERE / 'include'}"]
    object_file = target.with_suffix(f".{os.getpid()}.o")
    compile_only = [f for f in _FLAGS if f != "-shared"]
    _run([*compile_only, *_CHECKS, *flags, "-c", "-x", "c++", str(source), "-o", str(object_file)])
    # Linked without the flags of the checks: runtime.cpp has what they call.
    _compile(target, ["-shared", str(object_file)])
    object_file.unlink()


def _compile(target: Path, arguments: list[str]) -> None:
    for old in target.parent.glob(f"{target.stem.rpartition('-')[0]}-????????????.so"):
        old.unlink()
    temporary = target.with_suffix(f".{os.getpid()}")
    _run([*arguments, "-o", str(temporary)])
    temporary.replace(target)


def _run(arguments: list[str]) -> None:
    name = compiler()
    assert name is not None, "no C++ compiler"
    done = subprocess.run([name, *arguments], capture_output=True, text=True)
    if done.returncode or done.stderr:
        raise BuildError(done.stdout + done.stderr)


def _mirror(mirror: Path, directory: Path) -> None:
    shutil.rmtree(mirror, ignore_errors=True)
    for root in dict.fromkeys((nvrtc.SOURCES, directory)):
        for path in (*root.rglob("*.cu"), *root.rglob("*.cuh")):
            target = mirror / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.symlink_to(path)
    (mirror / "primitives.cuh").unlink()
    (mirror / "primitives.cuh").symlink_to(HERE / "include" / "primitives.cuh")


def _digest(paths: list[Path], *more: str) -> str:
    name = compiler()
    assert name is not None, "no C++ compiler"
    parts = [str(name), _version(name), *_FLAGS, *_CHECKS, *more]
    parts += [p.read_text() if p.is_file() else str(p) for p in paths]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@functools.cache
def _version(name: str) -> str:
    return subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout


class _lock:  # noqa: N801 - a context, used like a function
    """One process at a time builds."""

    def __enter__(self) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        self._file = (BUILD / "lock").open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()
