"""When and on what the benchmarks ran."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from benchmarks.peers import N_WORKERS, PEERS


def circumstances() -> dict[str, Any]:
    """Return the date, the machine, and the versions of all that is measured."""
    import zmq

    found = {name: peer.version() for name, peer in PEERS.items() if peer.distribution}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(),
            "n_cores": N_WORKERS,
            "system": platform.platform(),
            "memory_gib": round(memory() / 2**30, 1),
            "load_average": [round(load, 2) for load in os.getloadavg()],
        },
        "versions": {
            "python": platform.python_version(),
            "libzmq": zmq.zmq_version(),
            **{name: importlib.metadata.version(name) for name in ("pyzmq", "msgspec")},
            **{PEERS[name].distribution: version for name, version in found.items() if version},
        },
    }


def processor() -> str:
    """Return what the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def memory() -> int:
    """Return the machine's bytes of memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
