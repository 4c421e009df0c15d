"""A private cluster on this machine, for who names no server.

The same programs as on a real cluster, on a unix socket in a folder that only this user can enter::

    this process --lifeline--> job server      ipc://FOLDER/server
          '--------lifeline--> supervisor ---> a worker process a core

They run in sessions of their own, so that a Ctrl-C in the terminal is this process's alone to
answer. When this process ends, however it does, the pipe that is their lifeline closes, and both
end at once; the server, which outlives the workers' need of it, removes the folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

from dmap.cores import n_cores
from dmap.errors import DmapError

START_TIMEOUT: Final = 20.0
"""Seconds until a server that has not come up is taken for broken."""
END_TIMEOUT: Final = 2.0
MAX_SOCKET_PATH: Final = 100
"""Bytes; the kernel's limit is 107 (103 on macOS)."""

_SERVE: Final = "import sys; from dmap.local import serve; sys.exit(serve(*sys.argv[1:]))"


class LocalCluster:
    """A job server and a supervisor of this process. Made, it is up.

    Args:
        n_processes: How many workers.

    Attributes:
        folder: Where its socket is.
        endpoint: The server's.

    Raises:
        DmapError: it did not come up; the message has what the server said.
    """

    def __init__(self, n_processes: int) -> None:
        self.folder = _make_folder()
        self.endpoint = f"ipc://{self.folder}/server"
        self._pid = os.getpid()
        self._read_fd, self._lifeline = os.pipe()
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
                # What jobs submit themselves goes to the same server.
                "DMAP_SERVERS": self.endpoint,
            }
            lifeline = str(self._read_fd)
            with (self.folder / "server.log").open("wb") as log:
                server = self._start(
                    [_SERVE, str(self.folder), lifeline], environment, log.fileno()
                )
            worker = "import sys; from dmap.supervisor import main; sys.exit(main())"
            arguments = ["--processes", str(n_processes), "--lifeline", lifeline]
            self._start([worker, *arguments], environment, None)
            self._wait_up(server)
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(self._read_fd)

    def is_usable(self) -> bool:
        """Tell whether it is there. In a forked child it is, for as long as the parent lives."""
        return (self.folder / "server").exists()

    def stop(self) -> None:
        """End it at once, and wait for that. Harmless a second time, and in a forked child."""
        self.let_go()
        if self._pid != os.getpid():
            return
        deadline = time.monotonic() + END_TIMEOUT
        for process in reversed(self._processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def let_go(self) -> None:
        """Close this process's end of the lifeline."""
        fd, self._lifeline = self._lifeline, -1
        if fd >= 0:
            os.close(fd)

    def _start(
        self, arguments: list[str], environment: dict[str, str], output: int | None
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(self._read_fd,),
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def _wait_up(self, server: subprocess.Popen[bytes]) -> None:
        # libzmq would look again only after a tenth of a second.
        deadline = time.monotonic() + START_TIMEOUT
        while not self.is_usable():
            if server.poll() is not None or time.monotonic() > deadline:
                said = (self.folder / "server.log").read_text(errors="replace")[-2000:]
                raise DmapError(
                    f"the local job server did not come up: {said.strip() or 'no word'}"
                )
            time.sleep(0.001)


def serve(folder: str, lifeline: str) -> int:
    """Run the server of a local cluster until its lifeline is cut, and remove its folder."""
    from jobserver.__main__ import main

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        return main(["--bind", f"ipc://{folder}/server", "--name", "local", "--lifeline", lifeline])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_cluster: LocalCluster | None = None
_lock = threading.Lock()


def require_cluster() -> LocalCluster:
    """Return this process's local cluster; start it, and say so, if there is none."""
    global _cluster
    with _lock:
        if _cluster is None or not _cluster.is_usable():
            if _cluster is not None:
                _cluster.stop()
            n_processes = n_cores()
            _cluster = LocalCluster(n_processes)
            workers = "1 worker" if n_processes == 1 else f"{n_processes} workers"
            print(
                f"dmap: no job server is named; started {workers} on this machine "
                "(set_job_servers() or DMAP_SERVERS name servers)",
                file=sys.stderr,
            )
        return _cluster


def stop_cluster() -> None:
    """End this process's local cluster, if there is one."""
    global _cluster
    with _lock:
        cluster, _cluster = _cluster, None
        if cluster is not None:
            cluster.stop()


def _make_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="dmap-")  # mode 0700
    if len(os.fsencode(folder)) + len("/server") > MAX_SOCKET_PATH:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="dmap-", dir="/tmp")
    return Path(folder)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    if _cluster is not None:
        # The cluster ends with the process that started it, whoever that forked.
        _cluster.let_go()


os.register_at_fork(after_in_child=_after_fork)
