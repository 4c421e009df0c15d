"""Which processes can open each other's memory.

They run under one kernel, see each other's process ids in ``/proc``, and belong to one user. What
tells that is one text, which peers say in their ``Hello``: those that say the same may share.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from pathlib import Path
from typing import Final

SWITCH: Final = "DMAP_SHARED"
"""An environment variable; 0 says that this process shares no memory with others."""


@functools.cache
def machine_id() -> str:
    """Return what all say who can open each other's memory; empty: nobody can, or should."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return ""
    if os.environ.get(SWITCH) == "0":
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pids = os.readlink("/proc/self/ns/pid")
        is_ours = os.path.samefile(f"/proc/{os.getpid()}", "/proc/self")
    except OSError:
        return ""
    if not is_ours:  # this /proc is of other processes
        return ""
    digest = hashlib.blake2b(f"{boot} {pids} {os.getuid()}".encode(), digest_size=16)
    return digest.hexdigest()
