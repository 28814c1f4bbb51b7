"""Compiles the kernels of engine/ops/cuda for the host, once for each state of their sources.

Each source becomes one library. A folder of links mirrors the sources; the emulator's
primitives.cuh and the generated constants.cuh lie there too, and includes are found there first.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.backends.cuda import kernels as cuda_kernels
from engine.backends.cuda import nvrtc

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[2] / "build" / "cuda_emulator"
# NVRTC's warnings are the ones that count.
_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w"]
# A third of the time is spent here, in switches from thread to thread.
_RUNTIME_FLAGS = ["-O2", "-shared", "-fvisibility=default"]
_DIGITS = 12
# Where includes are, the emulator's own first.
_INCLUDES = (HERE / "include", nvrtc.SOURCES, nvrtc.OPS_FOLDER)
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
    source = HERE / "runtime.cpp"
    path = BUILD / f"runtime-{_digest(source, [HERE, *_INCLUDES])}.so"
    with _lock():
        if not path.exists():
            mirror = _mirror(nvrtc.SOURCES)
            _compile(path, [*_FLAGS, *_RUNTIME_FLAGS, f"-I{mirror}", str(source)])
    return path


def kernels(directory: Path = nvrtc.SOURCES) -> dict[str, Callable[[], Path]]:
    """For each source a function that gives its library or raises BuildError.

    All that is missing is compiled first, on two cores; other processes wait.
    """
    found, folders = sources(directory), [*_INCLUDES, directory]
    stems = {n: f"{n.replace('/', '-')}-{_digest(p, folders)}" for n, p in found.items()}
    paths = {n: BUILD / f"{stem}.so" for n, stem in stems.items()}
    with _lock():
        missing = [n for n in found if not paths[n].exists()]
        if missing:
            mirror = _mirror(directory)
            with ThreadPoolExecutor(2) as pool:
                work = {n: pool.submit(_build, mirror, n, paths[n]) for n in missing}
    errors = {n: w.exception() for n, w in work.items()} if missing else {}

    def library(name: str) -> Path:
        if error := errors.get(name):
            raise error
        return paths[name]

    return {n: functools.partial(library, n) for n in found}


def _build(mirror: Path, name: str, target: Path) -> None:
    source, part = mirror / f"{name}.cu", target.with_suffix(f".{os.getpid()}.o")
    try:
        _run([*_FLAGS, *_CHECKS, f"-I{mirror}", "-c", "-x", "c++", str(source), "-o", str(part)])
        # Linked without the flags of the checks: runtime.cpp has what they call.
        _compile(target, ["-shared", str(part)])
    finally:
        part.unlink(missing_ok=True)


def _compile(target: Path, arguments: list[str]) -> None:
    """Make a library in place of those of earlier states of its sources."""
    for old in target.parent.glob(f"{target.stem.rpartition('-')[0]}-{'?' * _DIGITS}.so"):
        old.unlink()
    temporary = target.with_suffix(f".{os.getpid()}")
    _run([*arguments, "-o", str(temporary)])
    temporary.replace(target)


def _run(arguments: list[str]) -> None:
    name = compiler()
    assert name is not None, "no C++ compiler"
    done = subprocess.run([name, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(done.stdout + done.stderr)


def _mirror(directory: Path) -> Path:
    """A folder of links to all sources and headers of both places, and the generated header."""
    mirror = BUILD / f"mirror-{hashlib.sha256(str(directory).encode()).hexdigest()[:_DIGITS]}"
    shutil.rmtree(mirror, ignore_errors=True)
    for root in (nvrtc.OPS_FOLDER, nvrtc.SOURCES, directory, HERE / "include"):
        for pattern in ("*.h",) if root == nvrtc.OPS_FOLDER else ("**/*.cu", "**/*.cuh", "**/*.h"):
            for path in root.glob(pattern):
                target = mirror / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                target.symlink_to(path)
    (mirror / cuda_kernels.HEADER).write_text(cuda_kernels.header())
    return mirror


def _digest(source: Path, folders: list[Path]) -> str:
    """Of what a library is made from: compiler, flags, a source and what it includes."""
    name = compiler()
    assert name is not None, "no C++ compiler"
    parts = [name, _version(name), *_FLAGS, *_RUNTIME_FLAGS, *_CHECKS, cuda_kernels.header()]
    files = [source]
    for path in files:
        parts.append(text := path.read_text())
        for included in re.findall(r'^#include "(.+)"', text, re.MULTILINE):
            candidates = (folder / included for folder in folders)
            found = next((p for p in candidates if p.exists()), None)
            if found is not None and found not in files:
                files.append(found)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_DIGITS]


@functools.cache
def _version(name: str) -> str:
    return subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout


class _lock:
    """One process at a time builds."""

    def __enter__(self) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        self._file = (BUILD / "lock").open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()
