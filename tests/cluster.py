"""Real job servers and workers on this machine, each a process, gone when the block is left.

with Cluster(n_servers=3) as cluster:
    cluster.start_worker(n_processes=2)
    with Client(cluster.endpoints) as client:
        ...
    cluster.servers[0].kill()
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from dmap.cli.ask import ask
from jobserver.protocol import Show

WITHIN = 20.0  # seconds in which a process must have come up, on any machine


class Process:
    """A process that is killed and waited for at the end."""

    def __init__(self, argv: list[str], environment: dict[str, str] | None = None) -> None:
        self.argv = argv
        self.environment = environment
        self.start()

    def start(self) -> None:
        self.popen = subprocess.Popen(
            self.argv, stdin=subprocess.DEVNULL, env={**os.environ, **(self.environment or {})}
        )

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def end(self) -> None:
        """Let it leave in order."""
        self.popen.terminate()
        try:
            self.popen.wait(WITHIN)
        except subprocess.TimeoutExpired:
            self.kill()


class Cluster:
    def __init__(self, n_servers: int = 1) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dmap-"))
        self.names = ["sammy", "kenny", "papag"][:n_servers]
        self.endpoints = [f"ipc://{self.folder}/{name}" for name in self.names]
        self.workers: list[Process] = []
        self.servers: list[Process] = []
        try:
            self.servers = [
                Process([sys.executable, "-m", "jobserver", "--bind", endpoint, "--name", name])
                for name, endpoint in zip(self.names, self.endpoints, strict=True)
            ]
            for name in self.names:
                wait_for((self.folder / name).exists)
        except BaseException:
            self.close()
            raise

    def start_worker(
        self, n_processes: int = 2, *arguments: str, path: Path | None = None
    ) -> Process:
        """Start a supervisor that finds the tests' own functions, and modules in ``path``."""
        servers = ",".join(self.endpoints)
        folders = [str(folder) for folder in (Path(__file__).parent, path) if folder is not None]
        environment = {"DMAP_SERVERS": servers, "PYTHONPATH": os.pathsep.join(folders)}
        argv = [sys.executable, "-m", "dmap.supervisor", "--servers", servers]
        argv += ["--processes", str(n_processes), *arguments]
        worker = Process(argv, environment)
        self.workers.append(worker)
        return worker

    def rows(self, number: int, what: Literal["status", "workers", "jobs"]) -> list[dict[str, Any]]:
        """Return what one of the servers shows, as ``dmap status`` and its like do."""
        (answer,) = ask([self.endpoints[number]], lambda welcome: Show(1, what), WITHIN)
        assert isinstance(answer.bodies[0], bytes)
        found: list[dict[str, Any]] = msgspec.msgpack.decode(answer.bodies[0])
        return found

    def wait_asleep(self, n_workers: int) -> None:
        """Wait until so many worker processes, and no others, sleep at every server."""

        def states() -> list[str]:
            return [row["state"] for n in range(len(self.names)) for row in self.rows(n, "workers")]

        wait_for(lambda: states() == ["asleep"] * n_workers * len(self.names))

    def close(self) -> None:
        for process in (*self.workers, *self.servers):
            process.popen.terminate()
        for process in (*self.workers, *self.servers):
            with contextlib.suppress(ProcessLookupError):
                process.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def wait_for(condition: object, within: float = WITHIN) -> None:
    """Wait until a condition holds; fail when it does not in time."""
    assert callable(condition)
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not come true within {within} s"
        time.sleep(0.002)
