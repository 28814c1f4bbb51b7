"""The native libraries: one for each instruction set, all built from the same sources.

The best one that the machine can run is loaded. Calls release the GIL.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Callable
from ctypes import c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from importlib.util import find_spec
from pathlib import Path

from engine.backends.native.views import CONSTANTS
from engine.errors import EngineError

# Best first, with the processor's features (as Linux names them) that each needs.
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c")
ISAS = {
    "amx": (*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),
    "avx512": _AVX512,
    "avx2": ("avx2", "fma", "f16c"),
    "portable": (),
}


_HERE = Path(__file__).resolve().parents[2]  # The package, with the sources of its kernels.


class LibraryError(EngineError):
    """A native library that is missing or that the machine can't run."""


@functools.cache
def processor_features() -> frozenset[str]:
    """Flags of the first processor, as Linux names them; empty where it lists none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    return frozenset(next(flags, ()))


@functools.cache
def built() -> dict[str, Path]:
    """Libraries by instruction set, best first: this package's, or those of an installed one that
    it shadows and that has the same sources of kernels."""
    if found := _libraries(_own_folders()):
        return found
    same = (p for p in _shadowed() if _sources(p) == _sources(_HERE))
    return next((_libraries([p]) for p in same), {})


def _own_folders() -> list[Path]:
    """This package's folders. In an editable installation, sources and libraries lie apart."""
    package = find_spec("engine")
    assert package is not None
    return [Path(p).resolve() for p in package.submodule_search_locations or ()]


def _libraries(folders: list[Path]) -> dict[str, Path]:
    found = {}
    for isa in ISAS:
        paths = (folder / "native" / f"libgdn_cpu_{isa}.so" for folder in folders)
        if path := next((p for p in paths if p.exists()), None):
            found[isa] = path
    return found


def _shadowed() -> list[Path]:
    """Installed packages with libraries, which Python would import if this one were not first."""
    folders = (Path(entry).resolve() / "engine" for entry in sys.path)
    others = [p for p in folders if p not in _own_folders() and (p / "__init__.py").exists()]
    return [p for p in others if _libraries([p])]


def _sources(package: Path) -> dict[Path, bytes]:
    """The sources of a package's kernels."""
    files = (p for folder in ("ops", "backends/cpu") for p in (package / folder).rglob("*"))
    return {p.relative_to(package): p.read_bytes() for p in files if p.suffix in (".h", ".cpp")}


def _not_built() -> str:
    if others := _shadowed():
        return (
            f"{_HERE} shadows the installed {others[0]}, whose CPU kernels were built from other "
            f"sources: run `pip install {_HERE.parent}` again"
        )
    return f"the CPU kernels are not built: run `pip install -e {_HERE.parent}`"


def usable() -> list[str]:
    """Instruction sets that are built and that this machine has, best first."""
    has = processor_features()
    return [isa for isa in built() if has.issuperset(ISAS[isa]) and _library(isa).allowed()]


@functools.cache
def _library(isa: str) -> Library:
    return Library(isa, built()[isa])


@functools.cache
def load(isa: str | None = None) -> Library:
    """The library of an instruction set, or the best one. Raises LibraryError."""
    if isa is not None and isa not in ISAS:
        raise LibraryError(f"cpu_isa: expected one of {', '.join(ISAS)}, got {isa}")
    if not built():
        raise LibraryError(_not_built())
    # Where the machine can run none, the error names what the last one that is built lacks.
    isa = isa or [*built(), *usable()[:1]][-1]
    if isa not in built():
        raise LibraryError(f"cpu_isa: expected one of {', '.join(built())} (built), got {isa}")
    if missing := sorted(set(ISAS[isa]) - processor_features()):
        raise LibraryError(f"cpu_isa {isa}: this {platform.machine()} has no {', '.join(missing)}")
    if not _library(isa).allowed():
        raise LibraryError(f"cpu_isa {isa}: the operating system does not allow its use")
    return _library(isa)


class Library:
    """The functions of one library, as engine/backends/cpu/executor.cpp exports them. Where
    `team_create` returns None and `run` -1, ctypes.get_errno() says why."""

    allowed: Callable[[], int]
    team_create: Callable[[int], int | None]
    team_free: Callable[[int], None]
    team_threads: Callable[[int | None], int]
    run: Callable[[int | None, int, int, int, int | None, int, float], int]
    layout_of: Callable[[int], int]
    panel_bytes: Callable[[int, int], int]
    pack: Callable[[int, int, int, int, float, int, int, int], None]
    _kernel: Callable[[bytes], int | None]
    _constant: Callable[[bytes], int]

    def __init__(self, isa: str, path: Path) -> None:
        self.isa, lib = isa, ctypes.CDLL(str(path), use_errno=True)
        for name, result, arguments in (
            ("allowed", c_int, []),
            ("team_create", c_void_p, [c_int]),
            ("team_free", None, [c_void_p]),
            ("team_threads", c_int, [c_void_p]),
            ("_kernel", c_void_p, [c_char_p]),
            ("_constant", c_int64, [c_char_p]),
            ("run", c_int64, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_double]),
            ("layout_of", c_int32, [c_int]),
            ("panel_bytes", c_int64, [c_int32, c_int64]),
            (
                "pack",
                None,
                [c_int, c_void_p, c_int64, c_int64, c_float, c_void_p, c_int64, c_int64],
            ),
        ):
            # `run` is gdn_run of executor.cpp, `_kernel` gdn_kernel, and so on.
            function = getattr(lib, f"gdn_{name.lstrip('_')}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        its = {name: self.constant(name) for name in CONSTANTS}
        assert its == CONSTANTS, its

    def constant(self, name: str) -> int:
        """A constant of the kernels; `gdn_constant` lists their names."""
        value = self._constant(name.encode())
        assert value >= 0, name
        return value

    def kernel_address(self, name: str) -> int:
        address = self._kernel(name.encode())
        assert address, name
        return address
