"""The number of cores that a process may use: made-up files of /proc and of cgroups."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from engine import threads
from engine.threads import cpu_quota, n_cores


def process(root: Path, groups: str, mounts: list[tuple[str, str, str, str]]) -> Path:
    """A folder like /proc/self. groups: its file `cgroup`; mounts: (root, folder below `root`,
    type, options of the file system)."""
    lines = ["22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw"]
    for i, (its_root, folder, kind, options) in enumerate(mounts):
        lines.append(
            f"{30 + i} 22 0:{i} {its_root} {root / folder} rw,nosuid - {kind} none {options}"
        )
    (root / "cgroup").write_text(groups)
    (root / "mountinfo").write_text("\n".join(lines) + "\n")
    return root


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("cpu_", "cpu.", 1)).write_text(text + "\n")


V2 = ("/", "v2", "cgroup2", "rw")
V1 = ("/", "v1", "cgroup", "rw,cpu,cpuacct")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", math.inf), ("150000 100000", 1.5), ("20000 10000", 2.0), ("0 100000", math.inf),
     ("5 0", math.inf), ("nonsense", math.inf)],
)  # fmt: skip
def test_version_2(tmp_path: Path, text: str, expected: float) -> None:
    put(tmp_path / "v2/a/b", cpu_max=text)
    assert cpu_quota(process(tmp_path, "0::/a/b\n", [V2])) == expected


def test_the_least_of_a_path_counts(tmp_path: Path) -> None:
    for folder, text in (("v2/a", "300000 100000"), ("v2/a/b", "max 100000"), ("v2/c", "1 1000")):
        put(tmp_path / folder, cpu_max=text)
    assert cpu_quota(process(tmp_path, "0::/a/b/session.scope\n", [V2])) == 3


@pytest.mark.parametrize(("quota", "expected"), [("-1", math.inf), ("250000", 2.5)])
def test_version_1(tmp_path: Path, quota: str, expected: float) -> None:
    """The controller's own path and folder."""
    put(tmp_path / "v1/job", cpu_cfs_quota_us=quota, cpu_cfs_period_us="100000")
    put(tmp_path / "v1/other", cpu_cfs_quota_us="1000", cpu_cfs_period_us="100000")
    groups = "5:memory:/other\n4:cpu,cpuacct:/job\n0::/\n"
    mounts = [("/", "other", "cgroup", "rw,memory"), V1]
    assert cpu_quota(process(tmp_path, groups, mounts)) == expected


def test_both_versions(tmp_path: Path) -> None:
    put(tmp_path / "v1/job", cpu_cfs_quota_us="400000", cpu_cfs_period_us="100000")
    put(tmp_path / "v2/job", cpu_max="200000 100000")
    assert cpu_quota(process(tmp_path, "4:cpu:/job\n0::/job\n", [V1, V2])) == 2


@pytest.mark.parametrize("group", ["/docker/1/inner", "/docker/1", "/elsewhere", "/../../other"])
def test_in_a_container(tmp_path: Path, group: str) -> None:
    """Its own folder is mounted, whatever path the process is told."""
    put(tmp_path / "v2", cpu_max="200000 100000")
    put(tmp_path / "v2/inner", cpu_max="100000 100000")
    expected = 1 if group.endswith("inner") else 2
    mounted = ("/docker/1", "v2", "cgroup2", "rw")
    assert cpu_quota(process(tmp_path, f"0::{group}\n", [mounted])) == expected


def test_no_files(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "missing") == math.inf
    assert cpu_quota(process(tmp_path, "0::/a\n4:cpu:/a\n", [V1, V2])) == math.inf


@pytest.mark.parametrize(
    ("quota", "affinity", "expected"),
    [(math.inf, 8, 8), (2.5, 8, 3), (4.0, 2, 2), (0.1, 8, 1), (16.0, 8, 8)],
)
def test_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float, affinity: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    monkeypatch.setattr(threads, "cpu_quota", lambda process: quota)
    assert n_cores() == expected
