"""Compiles CUDA sources with NVIDIA's run-time compiler.

The compiler comes with CuPy's wheels or a CUDA toolkit and needs no GPU. Machine code is cached on
disk, by the digest of sources and headers, target and compiler version.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from engine.backends.cuda import kernels
from engine.errors import EngineError

OPS_FOLDER = Path(__file__).resolve().parents[2] / "ops"
SOURCES = OPS_FOLDER / "cuda"
_OPTIONS = ("--std=c++17", "--fmad=true", "-default-device")


class CompileError(EngineError):
    """No compiler, or a source that it refuses."""


def sources() -> list[str]:
    """Names of all sources, without `.cu`; those of fusions are `fused/<name>`."""
    return sorted(str(p.relative_to(SOURCES))[:-3] for p in SOURCES.rglob("*.cu"))


@cache
def _headers() -> dict[str, str]:
    """Headers by the names that sources include; some are shared with the CPU's kernels."""
    found = {
        str(p.relative_to(root)): p.read_text()
        for root, pattern in ((OPS_FOLDER, "*.h"), (SOURCES, "**/*.cuh"))
        for p in sorted(root.glob(pattern))
    }
    return found | {kernels.HEADER: kernels.header()}


def compile_source(name: str, target: str, more_options: tuple[str, ...] = ()) -> bytes:
    """Machine code (a cubin) of one source for a target such as sm_90a. Raises CompileError with
    the compiler's log; warnings are errors too."""
    text = (SOURCES / f"{name}.cu").read_text()
    lib, options = _library(), (*_OPTIONS, f"--gpu-architecture={target}", *more_options)
    headers = _headers()
    keys, values = list(headers), list(headers.values())
    program = ctypes.c_void_p()
    _check(lib, lib.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), f"{name}.cu".encode(), len(keys),
        _strings(values), _strings(keys),
    ))  # fmt: skip
    try:
        status = lib.nvrtcCompileProgram(program, len(options), _strings(options))
        log = _bytes(lib, "ProgramLog", program).decode(errors="replace").strip("\0\n ")
        if status or "warning" in log:
            raise CompileError(f"{name}.cu for {target}: {log or 'the compiler gave no reason'}")
        return _bytes(lib, "CUBIN", program)
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def cached(name: str, target: str) -> bytes | None:
    """The machine code that the disk cache has of a source in its present state."""
    try:
        return _cache_path(name, target).read_bytes()
    except OSError:
        return None


def compile_and_keep(name: str, target: str) -> bytes:
    """As `compile_source`; writes the result to the disk cache where that can be written."""
    code, path = compile_source(name, target), _cache_path(name, target)
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(code)
        temporary.replace(path)
    except OSError:
        pass
    return code


def _cache_path(name: str, target: str) -> Path:
    parts = [(SOURCES / f"{name}.cu").read_text(), target, *_OPTIONS, version()]
    parts += [x for item in _headers().items() for x in item]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "gdn-engine" / f"{name.replace('/', '-')}-{target}-{digest}.cubin"


def version() -> str:
    """The compiler's version, such as 13.0."""
    lib, major, minor = _library(), ctypes.c_int(), ctypes.c_int()
    _check(lib, lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def _strings(values: tuple[str, ...] | list[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*(v.encode() for v in values))


def _bytes(lib: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(lib, getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(lib, getattr(lib, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(lib: ctypes.CDLL, status: int) -> None:
    if status:
        raise CompileError(f"NVRTC: {lib.nvrtcGetErrorString(status).decode()}")


@cache
def _library() -> ctypes.CDLL:
    for path in _candidates():
        try:
            lib = ctypes.CDLL(path)
        except OSError:
            continue
        lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        return lib
    raise CompileError(
        "NVRTC, CUDA's run-time compiler: expected libnvrtc.so of CUDA 12 or 13, found none; "
        "install the extra cuda12 or cuda13"
    )


def _candidates() -> Iterator[str]:
    """Paths of wheels, then of the system."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        found = Path(root).glob("*/lib/libnvrtc.so.1[23]*")
        yield from map(str, sorted(found, reverse=True))
    if home := os.environ.get("CUDA_PATH", os.environ.get("CUDA_HOME")):
        yield from map(str, sorted(Path(home).glob("lib64/libnvrtc.so.1[23]"), reverse=True))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12")
    yield from map(str, sorted(Path("/usr/local/cuda/lib64").glob("libnvrtc.so.1[23]")))
