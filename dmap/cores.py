"""How many cores this process may use: not how many the machine has.

A container, a batch system or ``taskset`` gives a process fewer. Who starts a worker for each core
of the machine there has most of them wait for the others.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Final, NamedTuple

ROOT: Final = ""


class _Mount(NamedTuple):
    """A hierarchy of cgroups in the file system: the cgroup ``root`` is the folder ``folder``."""

    root: str
    folder: str

    def folders(self, path: str) -> list[str]:
        """Return the folders of a cgroup and those around it; just the outermost if it is not here.

        A path that leads out is another namespace's.
        """
        found = [self.folder]
        if self.has(path):
            for part in path[len(self.root) :].split("/"):
                if part:
                    found.append(f"{found[-1]}/{part}")
        return found

    def has(self, path: str) -> bool:
        """Tell whether this cgroup is in it."""
        return f"{path}/".startswith(f"{self.root.rstrip('/')}/") and ".." not in path.split("/")


def n_cores(root: str = ROOT) -> int:
    """Return how many cores this process may use, at least 1.

    That is what its affinity and the time that its cgroups are given allow; a part of a core counts
    as one. On macOS, which has neither, it is the number of the machine's cores.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    if hasattr(os, "sched_getaffinity"):
        n_allowed = len(os.sched_getaffinity(0))
    else:
        n_allowed = os.cpu_count() or 1
    return max(1, math.ceil(min(n_allowed, cgroup_cores(root))))


def cgroup_cores(root: str = ROOT) -> float:
    """Return how many cores' time the cgroups of this process are given; infinite if any.

    The least of the process's own cgroup and those around it, of both versions of cgroups.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    limits = [math.inf]
    for is_v2, path in _cgroups(root):
        for folder in _mount_of(root, path, is_v2=is_v2).folders(path):
            limits.append(_limit_v2(folder) if is_v2 else _limit_v1(folder))
    return min(limits)


def _cgroups(root: str) -> Iterator[tuple[bool, str]]:
    """Yield the cgroups that may limit this process: whether of version 2, and the path."""
    for line in _read(f"{root}/proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers or "cpu" in controllers.split(","):
            yield not controllers, path or "/"


def _mount_of(root: str, path: str, *, is_v2: bool) -> _Mount:
    """Return the mount that a cgroup is to be found in, or its version's first one."""
    mounts = list(_mounts(root, is_v2=is_v2))
    usual = _Mount("/", f"{root}/sys/fs/cgroup" if is_v2 else f"{root}/sys/fs/cgroup/cpu")
    return next((mount for mount in mounts if mount.has(path)), (*mounts, usual)[0])


def _mounts(root: str, *, is_v2: bool) -> Iterator[_Mount]:
    """Yield where a version's hierarchy is mounted."""
    for line in _read(f"{root}/proc/self/mountinfo").splitlines():
        # id parent device root folder options [tags] - type source options
        before, _, after = line.partition(" - ")
        words, last = before.split(" "), after.split(" ")
        if len(words) < 5 or len(last) < 3:
            continue
        kind, _, options = last[:3]
        if kind == ("cgroup2" if is_v2 else "cgroup") and (is_v2 or "cpu" in options.split(",")):
            yield _Mount(_unescaped(words[3]), root + _unescaped(words[4]))


def _unescaped(text: str) -> str:
    r"""Return a path of mountinfo as it is.

    >>> _unescaped(r"/sys/my\040cgroups")
    '/sys/my cgroups'
    """
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _limit_v2(folder: str) -> float:
    return _ratio(*[*_read(f"{folder}/cpu.max").split(), "", ""][:2])


def _limit_v1(folder: str) -> float:
    return _ratio(_read(f"{folder}/cpu.cfs_quota_us"), _read(f"{folder}/cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float:
    """Return how many cores a quota of time in each period is; infinite if there is no quota."""
    with suppress(ValueError):  # "max", or nothing that we know
        microseconds, of = int(quota), int(period)
        if microseconds > 0 and of > 0:
            return microseconds / of
    return math.inf


def _read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""
