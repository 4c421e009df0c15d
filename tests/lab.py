"""Pretend hosts on one machine, for tests of what crosses a network.

    with Lab(["sammy", "kenny", "papag"]) as lab:
        server = lab.popen("sammy", ["jobserver", "--bind", f"tcp://{lab.addr('sammy')}:4731"])
        worker = lab.popen("papag", ["dmap-worker", "--servers", "sammy"])  # names resolve
        lab.cut("papag")  # the cable is pulled
        lab.heal("papag")

A host is a network namespace with one interface; its address is 10.78.0.N. The hosts hang on one
bridge, which lies in a namespace of its own: labs can stand side by side, and nothing in a lab
reaches anything outside it. The machine's own network gets one route, for as long as a lab
stands: the labs' addresses are unreachable, so that a test which forgot to go inside sends nothing
out.

    sammy: eth0 10.78.0.1 ---.
    kenny: eth0 10.78.0.2 ---+--- br0
    papag: eth0 10.78.0.3 ---'

Leaving the block kills every process in the lab and removes its namespaces, also when the body
raised, and at exit. What a killed owner left is removed by the next lab.

Needs Linux, root and iproute2; `why_unavailable` says what is missing.
"""

import atexit
import contextlib
import ctypes
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SUBNET = "10.78.0"
ETC = Path("/etc/netns")  # `ip netns exec NAME` lays ETC/NAME/hosts over /etc/hosts
CLONE_NEWNET = 0x40000000
NAME = re.compile(r"dmaplab(\d+)-")  # pid of the owner
GONE_WITHIN = 5.0  # seconds that a killed process may take to end

numbers = itertools.count(1)


class Lab:
    """Stand up one host for each name; at most 200, each of one to nine letters and digits.

    Attributes:
        names: name -> address, of every host.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        for host in hosts:
            if not re.fullmatch("[a-z][a-z0-9]{0,8}", host):
                raise ValueError(f"not a host's name: {host!r}")
        sweep()
        self.names = {host: f"{SUBNET}.{n}" for n, host in enumerate(hosts, 1)}
        self._bridge = f"dmaplab{os.getpid()}-{next(numbers)}"
        self._owner = os.getpid()
        self._started: list[subprocess.Popen[Any]] = []
        atexit.register(self.close)
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        ip("route", "replace", "unreachable", f"{SUBNET}.0/24")
        ip("netns", "add", self._bridge)
        # No spanning tree and no delay: a port forwards as soon as it is up.
        bridge = ("type", "bridge", "stp_state", "0", "forward_delay", "0", "mcast_snooping", "0")
        ip("-n", self._bridge, "link", "add", "br0", *bridge)
        ip("-n", self._bridge, "link", "set", "br0", "up")
        hosts_file = "127.0.0.1 localhost\n" + "".join(
            f"{address} {host}\n" for host, address in self.names.items()
        )
        for host, address in self.names.items():
            space = self.namespace(host)
            (ETC / space).mkdir(parents=True)
            (ETC / space / "hosts").write_text(hosts_file)
            ip("netns", "add", space)
            ip("-n", self._bridge, *f"link add {host} type veth peer eth0 netns {space}".split())
            ip("-n", self._bridge, *f"link set {host} master br0 up".split())
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")

    def addr(self, host: str) -> str:
        """Return the host's address."""
        return self.names[host]

    def namespace(self, host: str) -> str:
        """Return the name of the host's network namespace, as `ip netns` lists it."""
        self.names[host]  # KeyError for a host that is not of this lab
        return f"{self._bridge}-{host}"

    def popen(self, host: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program on the host; `options` are those of `subprocess.Popen`.

        Its `pid` is the program's own. It is killed when the lab is closed.
        """
        program = subprocess.Popen(self._on(host, argv), **options)
        self._started.append(program)
        return program

    def run(
        self, host: str, argv: Sequence[str], **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Run a program on the host to its end; `options` are those of `subprocess.run`."""
        return subprocess.run(self._on(host, argv), **options)

    def _on(self, host: str, argv: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.namespace(host), *map(str, argv)]

    @contextlib.contextmanager
    def inside(self, host: str) -> Iterator[str]:
        """Have this thread, and threads that it starts, make their sockets on the host.

        A ZeroMQ context whose first socket is made here stays on the host, since its I/O thread is
        started then. Names do not resolve here: use `names`. Yields the host's address.
        """
        back = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self.namespace(host)}", os.O_RDONLY)
        try:
            enter(there)
            try:
                yield self.names[host]
            finally:
                enter(back)
        finally:
            os.close(there)
            os.close(back)

    def cut(self, host: str) -> None:
        """Pull the host's cable: it loses its carrier, and nothing passes."""
        self.names[host]
        ip("-n", self._bridge, "link", "set", host, "down")

    def blackhole(self, host: str) -> None:
        """Let all frames to and from the host vanish while its link looks well.

        Nobody is told: connections are half open.
        """
        self.names[host]
        ip("-n", self._bridge, "link", "set", host, "nomaster")

    def heal(self, host: str) -> None:
        """End the host's `cut` or `blackhole`."""
        self.names[host]
        ip("-n", self._bridge, "link", "set", host, "master", "br0", "up")

    def reset(self, host: str) -> None:
        """Tear every established TCP connection of the host; both ends get a reset."""
        self.run(host, ["ss", "-K", "-t", "state", "established"], check=True, capture_output=True)

    def close(self) -> None:
        """Kill every process in the lab and remove it. Does nothing the second time."""
        if os.getpid() != self._owner:  # a forked child runs its parent's exit handlers
            return
        atexit.unregister(self.close)
        for program in self._started:
            program.kill()  # one that has only just begun is not in its namespace yet
        for space in [*map(self.namespace, self.names), self._bridge]:
            remove(space)
        for program in self._started:
            program.wait(GONE_WITHIN)
            for stream in (program.stdin, program.stdout, program.stderr):
                if stream is not None:
                    stream.close()
        self._started.clear()
        unguard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @staticmethod
    @functools.cache
    def why_unavailable() -> str | None:
        """Return None if a lab can stand here, else a sentence that says why not."""
        if not sys.platform.startswith("linux"):
            return "a lab needs Linux"
        if os.geteuid() != 0:
            return "a lab needs root"
        if shutil.which("ip") is None or shutil.which("ss") is None:
            return "a lab needs ip and ss (apt-get install iproute2)"
        try:
            with Lab(["probe"]) as lab:
                lab.run("probe", ["true"], check=True, capture_output=True)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            return f"no lab can stand here: {error}"
        return None


def ip(*arguments: str) -> str:
    """Run `ip` and return what it prints; RuntimeError with what it says if it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def enter(namespace: int) -> None:
    """Move this thread to the network namespace that the file descriptor names."""
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns is of Python 3.12
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def labs() -> list[tuple[str, int]]:
    """Return each namespace of any lab on this machine with the pid of its owner."""
    spaces = [line.split()[0] for line in ip("netns", "list").splitlines()]
    return [(space, int(owner[1])) for space in spaces if (owner := NAME.match(space))]


def inhabitants(space: str) -> list[int]:
    """Return the pids of a namespace, but this process's own."""
    return [pid for pid in map(int, ip("netns", "pids", space).split()) if pid != os.getpid()]


def remove(space: str) -> None:
    """Kill what runs in a namespace of a lab and remove it, as far as it exists."""
    if Path("/run/netns", space).exists():
        deadline = time.monotonic() + GONE_WITHIN
        while pids := inhabitants(space):  # again until none is seen: one may have just forked
            if time.monotonic() > deadline:
                raise RuntimeError(f"still in {space} after SIGKILL: {pids}")
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        ip("netns", "del", space)
    shutil.rmtree(ETC / space, ignore_errors=True)


def sweep() -> None:
    """Remove the labs whose owner was killed before it could."""
    for space, owner in labs():
        if not Path(f"/proc/{owner}").exists():
            remove(space)
    unguard()


def unguard() -> None:
    """Give the labs' addresses back to the machine's other routes, after the last lab."""
    if not labs():
        with contextlib.suppress(RuntimeError):  # another owner was faster
            ip("route", "del", "unreachable", f"{SUBNET}.0/24")
        with contextlib.suppress(OSError):
            ETC.rmdir()
