"""How many threads there may be; threads of Python's: each starts, or is refused in one line."""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from engine.errors import has_memory, thread_refused

_STACK_BYTES = 8 << 20  # The C library's, unless `ulimit -s` says otherwise.
_FIRST_CALLS_BYTES = 4 << 20  # Two arenas of Python's small objects, and as much again.


def n_cores() -> int:
    """The number of cores that this process may keep busy: those of its affinity, and no more than
    its CPU quota, rounded up."""
    n = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(n, cpu_quota(Path("/proc/self")))))


def cpu_quota(process: Path) -> float:
    """The cores' worth of time that cgroups (version 1 or 2) grant a process, the least along its
    path; infinite where there is no limit. process: its folder in /proc."""
    try:
        mounts = (process / "mountinfo").read_text().splitlines()
        lines = (process / "cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    groups: dict[str, str] = {}  # By controller; version 2 has one group for all, under "".
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1):
        groups |= dict.fromkeys(controllers.split(","), path)
    quota = math.inf
    for mount in mounts:
        left, _, right = mount.partition(" - ")
        root, folder = left.split()[3:5]
        kind, *_, options = right.split(" ", 2)
        names = {"cgroup2": [""], "cgroup": options.split(",")}.get(kind, [])
        for group in {groups[name] for name in names if name in groups}:
            quota = min(quota, *map(_quota_of, _folders(Path(folder), root, group)))
    return quota


def _folders(mounted: Path, root: str, group: str) -> list[Path]:
    """A group's folder and those above it, where `root` of the groups is mounted. A process in a
    container may see a group's path outside of it, and only the container's own folder."""
    below = PurePosixPath(group)
    if ".." in below.parts or not below.is_relative_to(root):
        return [mounted]
    inner = below.relative_to(root)
    return [mounted / inner, *(mounted / above for above in inner.parents)]


def _quota_of(folder: Path) -> float:
    """The cores' worth of time of one group; infinite where its files name none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{x}_us").read_text() for x in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number.
        return math.inf


def start(thread: threading.Thread, expected: str) -> None:
    """Start a thread, or raise `NotEnoughMemoryError` that names what was expected."""
    with _starting(expected):
        thread.start()


@contextmanager
def pool(expected: str, n_threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that all run, or `NotEnoughMemoryError` that names what was expected."""
    with ThreadPoolExecutor(n_threads) as threads:
        all_run = threading.Event()
        try:
            for _ in range(n_threads):  # None is idle, so each task starts a thread.
                with _starting(expected):
                    threads.submit(all_run.wait)
        finally:
            all_run.set()
        yield threads


@contextmanager
def _starting(expected: str) -> Iterator[None]:
    """`Thread.start` waits for the thread to say that it runs: for ever, if that one finds no
    memory to say so. What it takes has to be there before."""
    if not has_memory(_STACK_BYTES + _FIRST_CALLS_BYTES):
        raise thread_refused(expected, os.strerror(errno.ENOMEM))
    try:
        yield
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        raise thread_refused(expected, error) from None
