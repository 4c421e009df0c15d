"""Large arrays on one host: by shared memory, by the socket, and the limit of this machine.

    python benchmarks/shared.py [rounds]

Results are arrays of 16 MB that jobs make; arguments are such arrays that jobs sum up. The limit is
what two forked processes need that make the arrays and copy each once into fresh shared memory; or,
for arguments, one process that copies them so and two that map and sum them. All take turns.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dmap import dmap

N = 2_000_000  # doubles
N_RESULTS = 64
N_ARGUMENTS = 32
KINDS = ("results", "arguments")
_ASK = struct.Struct("i")
_ANSWER = struct.Struct("id")


def make(n: int) -> Any:
    """Return an array of 16 MB."""
    return np.full(N, float(n))


def copy_once(array: Any) -> int:
    """Copy an array into fresh shared memory; return its descriptor."""
    fd = os.memfd_create("limit", os.MFD_CLOEXEC)
    view = memoryview(array).cast("B")
    while view.nbytes:
        view = view[os.write(fd, view) :]
    return fd


def limit_of_results() -> float:
    """Return the seconds that two processes need, which keep all the memory until then."""
    done, say = os.pipe()
    began = time.perf_counter()
    pids = []
    for first in range(2):
        pids.append(os.fork())
        if not pids[-1]:
            for n in range(first, N_RESULTS, 2):
                copy_once(make(n))
            os.write(say, b"x")
            signal.pause()
    n_done = 0
    while n_done < 2:
        n_done += len(os.read(done, 2))
    seconds = time.perf_counter() - began
    _end(pids)
    os.close(done)
    os.close(say)
    return seconds


def limit_of_arguments(arrays: Sequence[Any]) -> float:
    """Return the seconds that this process needs to copy all, and two others to sum them."""
    summers = [_start_summer() for _ in range(2)]
    todo, idle, n_out = list(arrays), list(summers), 0
    began = time.perf_counter()
    while todo or n_out:
        while todo and idle:
            _, ask, _ = idle.pop()
            os.write(ask, _ASK.pack(copy_once(todo.pop())))
            n_out += 1
        ready = select.select([answer for _, _, answer in summers], [], [])[0]
        for summer in summers:
            if summer[2] in ready:
                os.close(_ANSWER.unpack(os.read(summer[2], _ANSWER.size))[0])
                idle.append(summer)
                n_out -= 1
    seconds = time.perf_counter() - began
    _end([pid for pid, _, _ in summers])
    for _, ask, answer in summers:
        os.close(ask)
        os.close(answer)
    return seconds


def _start_summer() -> tuple[int, int, int]:
    """Fork a process that sums what it is told; return its pid and the ends of two pipes."""
    asked, ask = os.pipe()
    answer, say = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        while True:
            (number,) = _ASK.unpack(os.read(asked, _ASK.size))
            fd = os.open(f"/proc/{parent}/fd/{number}", os.O_RDONLY)
            memory = mmap.mmap(fd, 8 * N, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
            os.close(fd)
            os.write(say, _ANSWER.pack(number, np.frombuffer(memory).sum()))
    os.close(asked)
    os.close(say)
    return pid, ask, answer


def _end(pids: Sequence[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def serve() -> None:
    """Time dmap, once for each line of input that says of what."""
    arrays = [make(n) for n in range(N_ARGUMENTS)]
    dmap(make, range(4))
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        values = dmap(make, range(N_RESULTS)) if line == "results\n" else dmap(np.sum, arrays)
        seconds = time.perf_counter() - began
        del values
        print(seconds, flush=True)


def main(rounds: int) -> None:
    """Print the medians, and how far from the limit dmap is."""
    servers = {
        way: subprocess.Popen(
            [sys.executable, __file__, "serve"],
            env={**os.environ, "DMAP_SHARED": switch, "DMAP_SERVERS": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for way, switch in (("shared", "1"), ("socket", "0"))
    }
    arrays = [make(n) for n in range(N_ARGUMENTS)]
    seconds: dict[tuple[str, str], list[float]] = {}
    for server in servers.values():
        assert server.stdout is not None
        server.stdout.readline()
    for _ in range(rounds):
        seconds.setdefault(("results", "limit"), []).append(limit_of_results())
        seconds.setdefault(("arguments", "limit"), []).append(limit_of_arguments(arrays))
        for way, server in servers.items():
            assert server.stdin is not None
            assert server.stdout is not None
            for kind in KINDS:
                print(kind, file=server.stdin, flush=True)
                seconds.setdefault((kind, way), []).append(float(server.stdout.readline()))
    for server in servers.values():
        server.communicate()
    for kind in KINDS:
        limit = statistics.median(seconds[kind, "limit"])
        for way in ("limit", "shared", "socket"):
            found = seconds[kind, way]
            median = statistics.median(found)
            print(
                f"{kind:10} {way:8} {median:6.3f} s ({min(found):.3f} to {max(found):.3f}), "
                f"{limit / median:.0%} of the limit"
            )


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 7)
