"""How many cores a process may use, read from folders that look like /proc and /sys."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmap.cores import cgroup_cores, n_cores

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs rw,mode=755\n"
    "36 31 0:32 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "37 31 0:33 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def say(root: Path, path: str, text: str) -> None:
    """Let a file say something."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def in_v2(root: Path, cgroup: str, mountinfo: str = V2) -> None:
    say(root, "proc/self/cgroup", f"0::{cgroup}\n")
    say(root, "proc/self/mountinfo", mountinfo)


def in_v1(root: Path, cgroup: str, mounted: str = "/") -> None:
    say(root, "proc/self/cgroup", f"5:cpuset:/\n4:cpu,cpuacct:{cgroup}\n0::/\n")
    say(root, "proc/self/mountinfo", V1.format(root=mounted))


def quota(root: Path, folder: str, microseconds: int, period: int = 100_000) -> None:
    """Limit a cgroup of version 1."""
    say(root, f"{folder}/cpu.cfs_quota_us", f"{microseconds}\n")
    say(root, f"{folder}/cpu.cfs_period_us", f"{period}\n")


def test_without_cgroups_there_is_no_limit(root: Path) -> None:
    assert cgroup_cores(str(root)) == math.inf


def test_a_cgroup_without_a_quota_is_no_limit(root: Path) -> None:
    in_v2(root, "/jobs")
    say(root, "sys/fs/cgroup/jobs/cpu.max", "max 100000\n")
    assert cgroup_cores(str(root)) == math.inf


def test_the_quota_of_its_own_cgroup_limits_a_process(root: Path) -> None:
    in_v2(root, "/jobs/mine")
    say(root, "sys/fs/cgroup/jobs/mine/cpu.max", "150000 100000\n")
    assert cgroup_cores(str(root)) == 1.5


@pytest.mark.parametrize("folder", ["", "/jobs", "/jobs/mine"])
def test_the_least_quota_on_the_way_up_limits_a_process(root: Path, folder: str) -> None:
    in_v2(root, "/jobs/mine")
    for each in ("", "/jobs", "/jobs/mine"):
        say(root, f"sys/fs/cgroup{each}/cpu.max", "800000 100000\n")
    say(root, f"sys/fs/cgroup{folder}/cpu.max", "200000 100000\n")
    assert cgroup_cores(str(root)) == 2


def test_what_lies_above_the_mount_is_none_of_its_cgroups(root: Path) -> None:
    in_v2(root, "/")
    say(root, "sys/fs/cgroup/cpu.max", "400000 100000\n")
    say(root, "sys/fs/cpu.max", "100000 100000\n")
    assert cgroup_cores(str(root)) == 4


def test_without_a_word_of_mounts_they_are_where_they_usually_are(root: Path) -> None:
    in_v2(root, "/jobs", mountinfo="")
    say(root, "sys/fs/cgroup/jobs/cpu.max", "300000 100000\n")
    assert cgroup_cores(str(root)) == 3


def test_a_mount_elsewhere_is_found(root: Path) -> None:
    in_v2(root, "/jobs", V2.replace("/sys/fs/cgroup", r"/mnt/my\040cgroups"))
    say(root, "mnt/my cgroups/jobs/cpu.max", "300000 100000\n")
    assert cgroup_cores(str(root)) == 3


def test_a_cgroup_of_another_namespace_counts_as_the_mounted_one(root: Path) -> None:
    in_v2(root, "/../../elsewhere")
    say(root, "sys/fs/cgroup/cpu.max", "100000 100000\n")
    assert cgroup_cores(str(root)) == 1


def test_version_1_has_quota_and_period_in_two_files(root: Path) -> None:
    in_v1(root, "/jobs/mine")
    quota(root, "sys/fs/cgroup/cpu,cpuacct/jobs/mine", 125_000, 50_000)
    assert cgroup_cores(str(root)) == 2.5


def test_a_quota_of_minus_one_is_none(root: Path) -> None:
    in_v1(root, "/")
    quota(root, "sys/fs/cgroup/cpu,cpuacct", -1)
    assert cgroup_cores(str(root)) == math.inf


def test_a_container_of_version_1_has_its_own_cgroup_mounted_as_the_root(root: Path) -> None:
    in_v1(root, "/docker/77", mounted="/docker/77")
    quota(root, "sys/fs/cgroup/cpu,cpuacct", 200_000)
    assert cgroup_cores(str(root)) == 2


def test_where_both_versions_are_the_lesser_limit_holds(root: Path) -> None:
    in_v1(root, "/")
    say(root, "proc/self/mountinfo", V1.format(root="/") + V2.replace("/cgroup ", "/unified "))
    quota(root, "sys/fs/cgroup/cpu,cpuacct", 600_000)
    say(root, "sys/fs/unified/cpu.max", "500000 100000\n")
    assert cgroup_cores(str(root)) == 5


@pytest.mark.parametrize("text", ["", "many", "0 0", "1 0", "-5 100000"])
def test_what_is_no_quota_limits_nothing(root: Path, text: str) -> None:
    in_v2(root, "/")
    say(root, "sys/fs/cgroup/cpu.max", text)
    assert cgroup_cores(str(root)) == math.inf


def test_of_several_mounts_the_one_that_has_the_cgroup_counts(root: Path) -> None:
    other = V2.replace("0:26 / /sys/fs/cgroup", "0:26 /other /mnt")
    in_v2(root, "/jobs", other + V2)
    say(root, "mnt/cpu.max", "100000 100000\n")
    say(root, "sys/fs/cgroup/jobs/cpu.max", "300000 100000\n")
    assert cgroup_cores(str(root)) == 3


def run(code: str) -> str:
    code = f"import os\nfrom pathlib import Path\nfrom dmap.cores import n_cores\n{code}"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    return said.stdout.strip()


def test_the_affinity_limits_a_process(root: Path) -> None:
    first = "{min(os.sched_getaffinity(0))}"
    code = f"os.sched_setaffinity(0, {first}); print(n_cores(Path({str(root)!r})))"
    assert run(code) == "1"


@pytest.mark.parametrize("microseconds", [1_000, 50_000, 100_000])
def test_a_part_of_a_core_counts_as_one(root: Path, microseconds: int) -> None:
    in_v2(root, "/")
    say(root, "sys/fs/cgroup/cpu.max", f"{microseconds} 100000\n")
    assert n_cores(str(root)) == 1


@pytest.mark.skipif(n_cores() < 2, reason="there is one core only")
def test_a_core_and_a_part_of_one_count_as_two(root: Path) -> None:
    in_v2(root, "/")
    say(root, "sys/fs/cgroup/cpu.max", "100001 100000\n")
    assert n_cores(str(root)) == 2


def test_without_affinity_and_cgroups_there_are_the_machines_cores(root: Path) -> None:
    code = f"del os.sched_getaffinity; print(n_cores(Path({str(root)!r})) == os.cpu_count())"
    assert run(code) == "True"


def test_this_machine_has_at_least_one_and_no_more_than_it_has() -> None:
    assert 1 <= n_cores() <= (os.cpu_count() or 1)
