"""The lab does to a network what its faults say, and is gone afterwards."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import ETC, Lab, ip, labs, sweep

pytestmark = pytest.mark.skipif(
    Lab.why_unavailable() is not None, reason=str(Lab.why_unavailable())
)

ECHO = """
import socket, sys
listener = socket.create_server((sys.argv[1], 7000))
print("up", flush=True)
while True:
    connection, _ = listener.accept()
    while block := connection.recv(4096):
        connection.sendall(block)
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(["sammy", "kenny"]) as lab:
        yield lab


@pytest.fixture
def echo(lab: Lab) -> None:
    """Have sammy send back what it hears, one connection after the other."""
    server = lab.popen(
        "sammy", [sys.executable, "-c", ECHO, lab.addr("sammy")], stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    server.stdout.readline()


@contextlib.contextmanager
def call(lab: Lab, patience: float = 5.0) -> Iterator[socket.socket]:
    with lab.inside("kenny"), socket.create_connection((lab.addr("sammy"), 7000), patience) as s:
        yield s


def answers(connection: socket.socket) -> bool:
    connection.sendall(b"hello")
    return connection.recv(4096) == b"hello"


@pytest.mark.usefixtures("echo")
def test_a_host_reaches_another_by_tcp(lab: Lab) -> None:
    with call(lab) as connection:
        assert connection.getsockname()[0] == lab.addr("kenny")
        assert answers(connection)


def test_a_hosts_name_resolves_on_every_host(lab: Lab) -> None:
    found = lab.run("kenny", ["getent", "hosts", "sammy"], capture_output=True, text=True)
    assert found.stdout.split() == [lab.addr("sammy"), "sammy"]


@pytest.mark.usefixtures("echo")
def test_from_outside_a_host_is_unreachable_at_once(lab: Lab) -> None:
    with pytest.raises(OSError) as refusal:
        socket.create_connection((lab.addr("sammy"), 7000), 5.0)
    assert refusal.value.errno == errno.EHOSTUNREACH


@pytest.mark.usefixtures("echo")
def test_a_cut_host_is_unreachable_until_it_is_healed(lab: Lab) -> None:
    lab.cut("sammy")
    with pytest.raises(OSError), call(lab, patience=0.3):
        pass
    lab.heal("sammy")
    with call(lab) as connection:
        assert answers(connection)


def test_a_cut_host_has_no_carrier_and_a_blackholed_one_has(lab: Lab) -> None:
    lab.cut("sammy")
    lab.blackhole("kenny")
    assert "NO-CARRIER" in ip("-n", lab.namespace("sammy"), "link", "show", "eth0")
    assert "NO-CARRIER" not in ip("-n", lab.namespace("kenny"), "link", "show", "eth0")


@pytest.mark.usefixtures("echo")
def test_a_blackhole_leaves_a_connection_half_open(lab: Lab) -> None:
    with call(lab) as connection:
        assert answers(connection)
        lab.blackhole("sammy")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            answers(connection)
        lab.heal("sammy")
        connection.settimeout(10.0)
        assert connection.recv(4096) == b"hello"  # TCP says it again


@pytest.mark.usefixtures("echo")
def test_a_reset_tears_connections(lab: Lab) -> None:
    with call(lab) as connection:
        assert answers(connection)
        lab.reset("sammy")
        with pytest.raises(ConnectionError):
            connection.recv(4096)


def standing(owner: int) -> list[str]:
    """Return what stands of an owner's labs: namespaces and hosts files."""
    files = [path.name for path in ETC.glob(f"dmaplab{owner}-*")]
    return files + [space for space, other in labs() if other == owner]


@pytest.mark.parametrize("wrong", [False, True])
def test_nothing_is_left_when_the_block_ends(wrong: bool) -> None:
    with contextlib.suppress(ZeroDivisionError), Lab(["sammy"]) as lab:
        sleeper = lab.popen("sammy", ["sh", "-c", "sleep 100 & sleep 100"])
        assert standing(os.getpid())
        if wrong:
            raise ZeroDivisionError
    assert standing(os.getpid()) == []
    assert sleeper.returncode == -signal.SIGKILL


def test_the_lab_of_a_killed_owner_is_swept() -> None:
    stand = """
from lab import Lab
import signal
lab = Lab(["sammy"])
sleeper = lab.popen("sammy", ["sleep", "100"])
print(sleeper.pid, flush=True)
signal.pause()
"""
    argv = [sys.executable, "-c", stand]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parent) as owner:
        assert owner.stdout is not None
        sleeper = int(owner.stdout.readline())
        owner.kill()
    assert standing(owner.pid)
    sweep()
    assert standing(owner.pid) == []
    assert not Path(f"/proc/{sleeper}/exe").exists()  # gone, or waits for init to bury it
