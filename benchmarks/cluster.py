"""Job servers and workers in processes of their own, and a bare peer to speak to them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from benchmarks.peers import N_WORKERS
from jobserver import protocol as wire

WITHIN = 20.0
"""Seconds in which a server must listen, or answer."""


@contextmanager
def servers_up(n: int) -> Iterator[list[str]]:
    """Start so many job servers; yield their endpoints."""
    with tempfile.TemporaryDirectory(prefix="dmap-") as folder:
        paths = [Path(folder, f"server{number}") for number in range(n)]
        endpoints = [f"ipc://{path}" for path in paths]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "jobserver", "--bind", endpoint, "--name", path.name]
            )
            for endpoint, path in zip(endpoints, paths, strict=True)
        ]
        try:
            deadline = time.monotonic() + WITHIN
            while not all(path.exists() for path in paths):
                if time.monotonic() > deadline:
                    raise TimeoutError("the job servers do not listen")
                time.sleep(0.01)  # a path that appears wakes nobody
            yield endpoints
        finally:
            end(processes)


@contextmanager
def cluster_up(n_servers: int, n_workers: int = N_WORKERS) -> Iterator[list[str]]:
    """Start job servers, and workers for all of them; yield the servers' endpoints."""
    with servers_up(n_servers) as endpoints:
        argv = [str(Path(sys.executable).parent / "dmap-worker"), "--processes", str(n_workers)]
        worker = subprocess.Popen(
            [*argv, "--servers", ",".join(endpoints), "--import", "benchmarks.named"]
        )
        try:
            yield endpoints
        finally:
            end([worker])


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Let processes leave in order, or kill them."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Peer:
    """A connection that speaks the protocol and nothing else. Says Hello at once."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        role: wire.Role,
        child: int = 0,
    ):
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, int(WITHIN * 1000))
        self.socket.connect(endpoint)
        session = os.urandom(16)
        self.say(wire.Hello(wire.MAJOR, wire.MINOR, role, session, child=child))

    def say(self, message: wire.Message, body: bytes = b"") -> None:
        """Send a message."""
        header = wire.encode(message)
        self.socket.send_multipart([header, body] if body else [header])

    def hear(self) -> wire.Message:
        """Return the next message that is no heartbeat.

        Raises:
            zmq.Again: none came for long.
        """
        while True:
            message = wire.decode_to_peer(self.socket.recv_multipart()[0])
            if not isinstance(message, wire.Heartbeat):
                return message


def cpu_seconds(pids: list[int]) -> float:
    """Return the processor time that these processes have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
