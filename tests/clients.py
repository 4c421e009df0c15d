"""Client processes: scripts that use dmap, run to their end or killed on the way.

with Clients(tmp_path, cluster.endpoints) as clients:
    client = clients.start("import dmap; print(dmap.dmap(abs, [-1]))")
    assert client.answer() == [1]  # the JSON that it printed
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from cluster import wait_for

WITHIN = 60.0  # seconds in which a script must have come to its end, on any machine


class ClientProcess:
    """A script that runs, with its arguments in ``sys.argv`` and the folder as its own."""

    def __init__(self, script: Path, servers: Sequence[str], arguments: Sequence[object]) -> None:
        self.folder = script.parent
        self.popen = subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **({"DMAP_SERVERS": ",".join(servers)} if servers else {})},
        )

    def wait_for(self, name: str) -> None:
        """Wait until a file is there that the script, or one of its jobs, makes."""

        def is_there() -> bool:
            has_ended = self.popen.poll() is not None
            found = (self.folder / name).exists()
            assert found or not has_ended, f"it ended before there was {name}"
            return found

        wait_for(is_there)

    def answer(self) -> Any:
        """Wait for the end, which must be a good one; return what it printed, read as JSON."""
        said, _ = self.popen.communicate(timeout=WITHIN)
        assert self.popen.returncode == 0
        return json.loads(said)

    def kill(self) -> None:
        """Kill it, if it still runs, and wait for that."""
        self.popen.kill()
        self.popen.wait()
        assert self.popen.stdout is not None
        self.popen.stdout.close()


class Clients:
    """Client processes in a folder; those that still run are killed at the end.

    Args:
        folder: where they run.
        servers: endpoints; if there are none, each has its own local cluster.
    """

    def __init__(self, folder: Path, servers: Sequence[str] = ()) -> None:
        self.folder = folder
        self.servers = servers
        self._started: list[ClientProcess] = []

    def start(self, script: str, *arguments: object) -> ClientProcess:
        """Start a script."""
        path = self.folder / f"client{len(self._started)}.py"
        path.write_text(script)
        client = ClientProcess(path, self.servers, arguments)
        self._started.append(client)
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for client in self._started:
            client.kill()
