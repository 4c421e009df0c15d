"""A private cluster on this machine, for who names no server.

The same programs as on a real cluster, on a unix socket in a folder that only this user can enter::

    this process --exec--> supervisor --fork--> job server       ipc://FOLDER/server
          |                  |   '------fork--> a worker process a core
          '---- lifeline ----+----------------> (the server has it too)

One program is started, and its interpreter and imports are paid for once; where a fork is not safe
it executes the others. All run in sessions of their own, so that a Ctrl-C in the terminal is this
process's alone to answer. When this process ends, however it does, the pipe that is their lifeline
closes, and both end at once; the server, which outlives the workers' need of it, removes the
folder.
"""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

from dmap.cores import n_cores
from jobserver.errors import DmapError

if TYPE_CHECKING:
    from dmap.start import Process

START_TIMEOUT: Final = 20.0
"""Seconds until a server that has not come up is taken for broken."""
END_TIMEOUT: Final = 2.0
MAX_SOCKET_PATH: Final = 100
"""Bytes; the kernel's limit is 107 (103 on macOS)."""

_RUN: Final = "import sys; from dmap.local import run; run(*sys.argv[1:])"
_SERVE: Final = "import sys; from dmap.local import serve; serve(*sys.argv[1:])"


class LocalCluster:
    """A job server and a supervisor of this process. Made, it is on its way; see ``wait_up``.

    Args:
        n_processes: How many workers.

    Attributes:
        folder: Where its socket is.
        endpoint: The server's.
        n_processes: As above.
    """

    def __init__(self, n_processes: int) -> None:
        self.folder = _make_folder()
        self.endpoint = f"ipc://{self.folder}/server"
        self.n_processes = n_processes
        self._pid = os.getpid()
        self._was_up = False
        self._process: subprocess.Popen[bytes] | None = None
        # The outputs are the workers'; what is said until then is said to the log.
        fds = [_output(1), _output(2)]
        read_fd, self._lifeline = map(_lifted, os.pipe())
        fds.append(read_fd)
        try:
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
                # What jobs submit themselves goes to the same server.
                "DMAP_SERVERS": self.endpoint,
            }
            with open(f"{self.folder}/server.log", "wb") as log:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-c", _RUN, self.folder, str(n_processes)),
                        *map(str, fds),
                    ],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=fds,
                    start_new_session=True,
                )
        except BaseException:
            self.stop()
            raise
        finally:
            for fd in fds:
                os.close(fd)

    def wait_up(self) -> None:
        """Wait until its server is there.

        Raises:
            DmapError: it did not come up; the message has what it said.
        """
        # libzmq would look again only after a tenth of a second.
        deadline = time.monotonic() + START_TIMEOUT
        while not self._has_socket():
            if self._has_ended() or time.monotonic() > deadline:
                with open(f"{self.folder}/server.log", errors="replace") as log:
                    said = log.read()[-2000:]
                raise DmapError(
                    f"the local job server did not come up: {said.strip() or 'no word'}"
                )
            # A path that appears wakes nobody; the start takes a hundred of these.
            time.sleep(0.001)
        self._was_up = True

    def is_usable(self) -> bool:
        """Tell whether it is there, or on its way.

        In a forked child it is for as long as the parent lives.
        """
        return self._has_socket() if self._was_up else not self._has_ended()

    def stop(self) -> None:
        """End it at once, and wait for that. Harmless a second time, and in a forked child."""
        self.let_go()
        if self._pid != os.getpid():
            return
        if self._process is not None:
            try:
                self._process.wait(END_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        _remove(self.folder)

    def let_go(self) -> None:
        """Close this process's end of the lifeline."""
        fd, self._lifeline = self._lifeline, -1
        if fd >= 0:
            os.close(fd)

    def _has_socket(self) -> bool:
        return os.path.exists(f"{self.folder}/server")

    def _has_ended(self) -> bool:
        """Tell whether its process has ended, where this one can know it."""
        if self._process is None or self._pid != os.getpid():
            return not os.path.exists(self.folder)
        return self._process.poll() is not None


# --- what runs there --------------------------------------------------------------------------


def run(folder: str, n_processes: str, output: str, errors: str, lifeline: str) -> NoReturn:
    """Be a local cluster: start its job server, and then be its supervisor.

    Args:
        folder: Where the server's socket is to be.
        n_processes: How many workers.
        output: The descriptor that is the workers' standard output.
        errors: The one for their errors, and the supervisor's.
        lifeline: A pipe's descriptor.
    """
    others = int(output), int(errors)
    gc.disable()  # imports leave nothing to collect, and to look costs a twelfth of their time
    server = _start_server(folder, lifeline, others)
    import dmap.worker  # noqa: F401  # for the children, if they are copies
    from dmap import supervisor

    gc.enable()
    # Children whose first try to connect fails wait for a tenth of a second.
    deadline = time.monotonic() + START_TIMEOUT
    while not os.path.exists(f"{folder}/server"):
        if server.poll() is not None or time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.001)  # as above
    for fd, other in enumerate(others, 1):
        os.dup2(other, fd)
        os.close(other)
    code = supervisor.run(
        supervisor.Supervisor([f"ipc://{folder}/server"], int(n_processes), lifeline=int(lifeline))
    )
    while os.read(int(lifeline), 4096):  # where a signal was what ended the supervisor
        pass
    deadline = time.monotonic() + END_TIMEOUT / 2
    while server.poll() is None:
        if time.monotonic() > deadline:
            server.send_signal(signal.SIGKILL)
        time.sleep(0.001)  # Popen.wait with a timeout sleeps for up to fifty of these
    os._exit(code)  # who waits for us need not wait until an interpreter is taken apart


def _start_server(folder: str, lifeline: str, others: tuple[int, ...]) -> Process:
    """Start the job server, which has none of the other descriptors."""
    from dmap import start

    if not start.can_fork():
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _SERVE, folder, lifeline],
            stdin=subprocess.DEVNULL,
            pass_fds=[int(lifeline)],
            start_new_session=True,
        )
    import jobserver.__main__  # noqa: F401  # for both

    pid = os.fork()
    if not pid:
        os.setsid()
        for fd in others:
            os.close(fd)
        serve(folder, lifeline)
    return start.Forked(pid)


def serve(folder: str, lifeline: str) -> NoReturn:
    """Be the server of a local cluster until its lifeline is cut, and remove its folder."""
    from jobserver.__main__ import main

    gc.enable()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        code = main(["--bind", f"ipc://{folder}/server", "--name", "local", "--lifeline", lifeline])
    finally:
        _remove(folder)
    os._exit(code)


# --- the one of this process ------------------------------------------------------------------

_cluster: LocalCluster | None = None
_lock = threading.Lock()


def begin_cluster() -> None:
    """Have this process's local cluster start, if there is none; do not wait for it."""
    with _lock:
        _require_begun()


def require_cluster() -> LocalCluster:
    """Return this process's local cluster; start it, and say so, if there is none."""
    global _cluster
    with _lock:
        cluster = _require_begun()
        if not cluster._was_up:
            try:
                cluster.wait_up()
            except BaseException:
                _cluster = None
                cluster.stop()
                raise
            n = cluster.n_processes
            workers = "1 worker" if n == 1 else f"{n} workers"
            print(
                f"dmap: no job server is named; started {workers} on this machine "
                "(set_job_servers() or DMAP_SERVERS name servers)",
                file=sys.stderr,
            )
        return cluster


def _require_begun() -> LocalCluster:
    global _cluster
    if _cluster is None or not _cluster.is_usable():
        if _cluster is not None:
            _cluster.stop()
        _cluster = LocalCluster(n_cores())
    return _cluster


def stop_cluster() -> None:
    """End this process's local cluster, if there is one."""
    global _cluster
    with _lock:
        cluster, _cluster = _cluster, None
        if cluster is not None:
            cluster.stop()


def _output(fd: int) -> int:
    """Return a copy of a standard descriptor; of nothing, if this process has closed it."""
    try:
        return _lifted(os.dup(fd))
    except OSError:
        return _lifted(os.open(os.devnull, os.O_WRONLY))


def _lifted(fd: int) -> int:
    """Move a descriptor out of the places of the standard ones, which a daemon may have closed."""
    if fd > 2:
        return fd
    lifted = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return lifted


def _make_folder() -> str:
    """Make a folder for this user alone. The module for this takes 5 ms to import."""
    named = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    for place in (*filter(None, named), "/tmp", "/var/tmp"):
        folder = os.path.join(os.path.abspath(place), f"dmap-{os.urandom(6).hex()}")
        if len(os.fsencode(folder)) + len("/server") <= MAX_SOCKET_PATH:
            with suppress(OSError):
                os.mkdir(folder, 0o700)
                return folder
    raise DmapError("there is no folder for temporary files: name one in TMPDIR, with a short path")


def _remove(folder: str) -> None:
    """Remove the folder with what is in it, unless that is done already."""
    with suppress(OSError):
        for name in os.listdir(folder):
            with suppress(OSError):
                os.unlink(f"{folder}/{name}")
        os.rmdir(folder)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    if _cluster is not None:
        # The cluster ends with the process that started it, whoever that forked.
        _cluster.let_go()


os.register_at_fork(after_in_child=_after_fork)
