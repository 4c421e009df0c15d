"""Processes that a way has started: all of them, wherever they went, to stop, continue or end.

A way's runner adopts orphans (Linux), so that daemons of daemons stay among its descendants.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of its descendants that lose theirs. Elsewhere: nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Return the processes below this one, parents first; none where there is no /proc."""
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            # The name, in parentheses, may hold anything.
            parent = path.read_text(errors="replace").rpartition(")")[2].split()[1]
            children[int(parent)].append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children[one]
    return found[1:]


def signal_all(pids: Iterable[int], number: int) -> None:
    """Send a signal to each that is still there."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def end_descendants(pid: int, patience: float = 0.0, timeout: float = 5.0) -> None:
    """Kill what is below this process, also what it starts meanwhile, and wait for that.

    What this process itself has adopted is reaped.

    Args:
        pid: Of the process.
        patience: Seconds in which they may end by themselves.
        timeout: Seconds until those that cannot be killed are given up.
    """
    start = time.monotonic()
    while time.monotonic() < start + timeout:
        left = descendants(pid)
        if not left:
            return
        if time.monotonic() >= start + patience:
            signal_all(left, signal.SIGKILL)
        if pid == os.getpid():
            for child in left:
                with suppress(ChildProcessError):
                    os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)  # most are not our children, and cannot be waited for
