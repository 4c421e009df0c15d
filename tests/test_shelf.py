"""What a supervisor keeps of blobs: each comes to the host once, whoever wants it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from select import select
from typing import Any

import pytest
from cluster import Cluster, wait_for
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dmap import Client, shelf
from dmap.buffers import INLINE_NBYTES, ChildBlobs, make_pair
from dmap.shelf import MAX_FETCHING, PATIENCE, Shelf
from jobserver import shared
from jobserver.protocol import Body, Reference

LARGE = bytes(range(256)) * 1024  # 256 KiB
sealed_memory = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="this system has no memory that can be sealed"
)


def blob(number: int) -> bytes:
    return number.to_bytes(32, "little")


def mapped() -> dict[str, int]:
    """Return the mappings of blobs that this process has: inode -> how many."""
    found: dict[str, int] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:dmap-" in line:
            inode = line.split()[4]
            found[inode] = found.get(inode, 0) + 1
    return found


def n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Host:
    """A shelf with children, in front of servers that the test plays."""

    def __init__(self, n_children: int = 2, n_servers: int = 1, **options: Any) -> None:
        self.shelf = Shelf(n_servers, self.fetch, **options)
        self.is_there = [True] * n_servers  # whether it can be asked
        self.asked: deque[tuple[int, bytes]] = deque()  # (server, blob) that were asked for
        self.named: list[bool] = []  # of each: whether a name would do
        self.boots = ["boot1"] * n_servers
        self.now = 1000.0
        self.children: dict[int, ChildBlobs] = {}
        for number in range(1, n_children + 1):
            ours, theirs = make_pair()
            self.shelf.add(number, ours)
            self.children[number] = ChildBlobs(theirs.detach())

    def fetch(self, server: int, name: bytes, named: bool) -> bool:
        if self.is_there[server]:
            self.asked.append((server, name))
            self.named.append(named)
        return self.is_there[server]

    def turn(self) -> None:
        self.shelf.turn(self.now)
        self.shelf.check()
        while self.shelf.next_deadline() == 0.0:
            self.shelf.turn(self.now)
            self.shelf.check()

    def want(self, child: int, *blobs: bytes, server: int = 0, boot: str = "boot1") -> None:
        self.children[child].want(server, boot, blobs)
        self.turn()

    def give(self, name: bytes, body: Body | Reference | None, server: int = 0) -> None:
        """Have a server answer."""
        self.shelf.on_blob(server, self.boots[server], name, body, self.now)
        self.turn()

    def welcome(self, server: int = 0, boot: str = "boot2") -> None:
        self.boots[server] = boot
        self.is_there[server] = True
        self.shelf.on_welcome(server, self.now)
        self.turn()

    def take(self, child: int) -> list[bytes | memoryview] | None:
        end = self.children[child]
        assert end.receive()
        return end.take()

    def refusal(self, child: int) -> str:
        end = self.children[child]
        assert end.receive()
        return end.refusal

    def remove(self, child: int) -> None:
        """Have a child die."""
        self.children.pop(child).close()
        self.turn()
        self.shelf.remove(child)
        self.shelf.check()

    def close(self) -> None:
        self.shelf.close()
        for child in self.children.values():
            child.close()


@pytest.fixture
def make_host() -> Iterator[Callable[..., Host]]:
    before = n_descriptors()
    hosts: list[Host] = []

    def make(*arguments: Any, **options: Any) -> Host:
        hosts.append(Host(*arguments, **options))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()
    assert n_descriptors() == before, "no descriptor is left"


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    return make_host()


# --- fetching ---------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"small", LARGE, (LARGE, LARGE)], ids=["small", "large", "huge"])
def test_what_two_children_want_is_fetched_once(host: Host, body: Body) -> None:
    host.want(1, blob(1))
    host.want(2, blob(1))
    host.give(blob(1), body)
    whole = body if isinstance(body, bytes) else b"".join(body)
    assert host.take(1) == host.take(2) == [whole]
    assert list(host.asked) == [(0, blob(1))]


def test_who_asks_later_gets_what_is_kept(host: Host) -> None:
    host.want(1, blob(1), blob(2))
    host.give(blob(1), b"small")
    host.give(blob(2), LARGE)
    host.asked.clear()
    host.want(2, blob(2), blob(1))
    assert host.take(2) == [LARGE, b"small"]
    assert not host.asked


def test_all_that_a_job_names_is_asked_for_at_once(host: Host) -> None:
    host.want(1, blob(1), blob(2), blob(3))
    assert [name for _, name in host.asked] == [blob(1), blob(2), blob(3)]


def test_a_server_is_asked_for_a_few_blobs_at_a_time(host: Host) -> None:
    names = [blob(number) for number in range(MAX_FETCHING + 5)]
    host.want(1, *names)
    assert len(host.asked) == MAX_FETCHING
    host.give(names[3], b"small")
    assert len(host.asked) == MAX_FETCHING + 1
    for name in names:
        host.give(name, b"small")
    assert host.take(1) == [b"small"] * len(names)


def test_a_server_that_cannot_be_asked_now_is_asked_later(host: Host) -> None:
    host.is_there[0] = False
    host.want(1, blob(1))
    assert not host.asked
    host.is_there[0] = True
    host.turn()
    assert list(host.asked) == [(0, blob(1))]


def test_each_job_s_own_server_is_asked(make_host: Callable[..., Host]) -> None:
    host = make_host(n_servers=2)
    host.want(1, blob(1), server=0)
    host.want(2, blob(1), server=1)
    assert list(host.asked) == [(0, blob(1)), (1, blob(1))]
    host.give(blob(1), b"small", server=1)
    assert host.take(1) == host.take(2) == [b"small"]
    host.give(blob(1), b"small", server=0)
    assert host.shelf.nbytes == 5


def test_what_one_server_brings_is_not_asked_of_another_that_is_away(
    make_host: Callable[..., Host],
) -> None:
    host = make_host(n_servers=2)
    host.is_there[0] = False
    host.want(1, blob(1), server=0)
    host.want(2, blob(1), server=1)
    host.give(blob(1), b"small", server=1)
    assert host.take(1) == [b"small"]
    host.welcome(server=0)
    assert list(host.asked) == [(1, blob(1))]


def test_what_nobody_asked_for_is_not_kept(host: Host) -> None:
    host.give(blob(1), LARGE)
    assert host.shelf.nbytes == 0


def test_a_new_ask_takes_the_place_of_the_earlier_one(host: Host) -> None:
    names = [blob(number) for number in range(MAX_FETCHING + 1)]
    host.want(1, *names)
    host.want(1, blob(99))
    for name in names:  # all but the last were on their way
        host.give(name, b"small")
    assert [name for _, name in host.asked] == [*names[:-1], blob(99)]
    host.give(blob(99), b"new")
    assert host.take(1) == [b"new"]


# --- servers that do not have it, or go -------------------------------------------------------


def test_that_a_server_does_not_have_it_is_told_to_all_who_asked_it(
    make_host: Callable[..., Host],
) -> None:
    host = make_host(n_children=3, n_servers=2)
    host.want(1, blob(1), blob(2))
    host.want(2, blob(1))
    host.want(3, blob(1), server=1)
    host.give(blob(1), None, server=0)
    assert "does not have" in host.refusal(1)
    assert "does not have" in host.refusal(2)
    assert host.refusal(3) == ""
    host.give(blob(1), b"small", server=1)
    assert host.take(3) == [b"small"]


def test_what_a_server_did_not_have_is_asked_for_anew_by_the_next(host: Host) -> None:
    host.want(1, blob(1))
    host.give(blob(1), None)
    host.want(2, blob(1))
    assert len(host.asked) == 2
    host.give(blob(1), b"small")
    assert host.take(2) == [b"small"]


def test_after_its_welcome_a_server_is_asked_again(host: Host) -> None:
    host.want(1, blob(1))
    host.want(2, blob(2))
    host.give(blob(2), b"small")
    host.asked.clear()
    host.welcome()
    assert list(host.asked) == [(0, blob(1))]
    host.give(blob(1), b"small")
    assert host.take(1) == [b"small"]


def test_another_life_of_the_server_says_nothing_of_a_job_s(host: Host) -> None:
    """The child has yet to hear of the restart, or it has heard of it before the supervisor."""
    host.want(1, blob(1), boot="boot2")
    host.give(blob(1), None)
    assert host.refusal(1) == ""
    host.welcome(boot="boot2")
    assert len(host.asked) == 2
    host.give(blob(1), b"small")
    assert host.take(1) == [b"small"]


def test_who_is_of_this_life_asks_again_what_another_one_was_not_told(host: Host) -> None:
    host.want(1, blob(1), boot="boot0")
    host.give(blob(1), None)
    host.want(2, blob(1))
    assert len(host.asked) == 2
    host.give(blob(1), None)
    assert "does not have" in host.refusal(2)
    assert host.refusal(1) == ""


def test_a_silent_server_is_not_waited_for(host: Host) -> None:
    host.want(1, blob(1))
    host.now += PATIENCE - 0.001
    host.turn()
    assert host.refusal(1) == ""
    assert host.shelf.next_deadline() == pytest.approx(host.now + 0.001)
    host.now = host.shelf.next_deadline()
    host.turn()
    assert "silent for 30 seconds" in host.refusal(1)


def test_the_silence_of_a_server_counts_from_its_welcome(host: Host) -> None:
    host.is_there[0] = False
    host.want(1, blob(1))
    host.now += PATIENCE - 1
    host.welcome()
    host.now += PATIENCE - 1
    host.turn()
    assert host.refusal(1) == ""


def test_a_server_that_is_away_is_not_waited_for_for_ever(host: Host) -> None:
    host.is_there[0] = False
    host.want(1, blob(1))
    host.now += PATIENCE
    host.turn()
    assert "silent" in host.refusal(1)


def test_a_server_that_sends_a_large_blob_is_waited_for(host: Host) -> None:
    host.want(1, blob(1))
    host.now += PATIENCE - 1
    host.shelf.on_heard(0, host.now)
    host.now += PATIENCE - 1
    host.turn()
    assert host.refusal(1) == ""
    host.now += 1
    host.turn()
    assert host.refusal(1)


def test_a_server_that_sends_other_blobs_first_is_waited_for(host: Host) -> None:
    host.want(1, blob(1), blob(2))
    host.now += PATIENCE - 1
    host.give(blob(2), b"small")
    host.now += PATIENCE - 1
    host.turn()
    assert host.refusal(1) == ""


# --- children ---------------------------------------------------------------------------------


def test_a_child_that_dies_in_a_fetch_takes_nothing_with_it(host: Host) -> None:
    host.want(1, blob(1))
    host.want(2, blob(1))
    host.remove(1)
    host.give(blob(1), b"small")
    assert host.take(2) == [b"small"]


def test_what_was_on_its_way_when_its_child_died_is_kept(host: Host) -> None:
    host.want(1, blob(1))
    host.remove(1)
    host.give(blob(1), b"small")
    host.want(2, blob(1))
    assert host.take(2) == [b"small"]
    assert len(host.asked) == 1


def test_what_a_dead_child_wanted_is_not_asked_for_again(host: Host) -> None:
    host.want(1, blob(1))
    host.remove(1)
    host.welcome()
    assert len(host.asked) == 1


def test_a_child_that_does_not_read_costs_nobody_else(host: Host) -> None:
    names = [blob(number) for number in range(64)]
    host.want(1, *names)
    host.want(2, *names)
    taken = None
    for name in names:
        host.give(name, bytes(INLINE_NBYTES - 1))
        taken = taken or host.take(2)
    assert taken == [bytes(INLINE_NBYTES - 1)] * 64
    for _ in names:  # now it reads, and the rest follows
        host.turn()
        taken = host.take(1)
        if taken is not None:
            break
    assert taken == [bytes(INLINE_NBYTES - 1)] * 64
    assert len(host.asked) == 64
    host.turn()
    assert not select([host.shelf], [], [], 0)[0], "it waits for nobody to read any more"


def test_what_was_dropped_before_a_child_had_read_is_fetched_again(
    make_host: Callable[..., Host],
) -> None:
    host = make_host(n_children=1, max_blobs=2)
    names = [blob(number) for number in range(30)]
    host.want(1, *names)
    n_asked = 0
    taken = None
    for _ in range(100):
        while host.asked:
            _, name = host.asked.popleft()
            host.give(name, name * 1000)
            n_asked += 1
        taken = host.take(1)
        if taken is not None:
            break
        host.turn()
    assert taken == [name * 1000 for name in names]
    assert n_asked > len(names)


@pytest.mark.parametrize("server", [-1, 1])
def test_a_child_that_asks_what_makes_no_sense_is_heard_no_more(host: Host, server: int) -> None:
    host.want(1, blob(1), server=server)
    assert not host.asked
    assert not host.children[1].receive()
    host.want(2, blob(1))
    assert host.asked


@pytest.mark.parametrize("packed", [b"?", bytes(100_000)])
def test_bytes_that_are_no_ask_harm_nobody(host: Host, packed: bytes) -> None:
    with socket.socket(fileno=os.dup(host.children[1].fd)) as end:
        end.send(packed)
    host.turn()
    assert not host.children[1].receive()


def test_a_poller_sees_that_a_child_asks(host: Host) -> None:
    import zmq

    poller = zmq.Poller()
    poller.register(host.shelf.fileno(), zmq.POLLIN)
    assert not poller.poll(0)
    host.children[1].want(0, "boot1", (blob(1),))
    assert poller.poll(0)
    host.turn()
    assert not poller.poll(0)


# --- large blobs ------------------------------------------------------------------------------


@sealed_memory
def test_children_map_the_same_memory(host: Host) -> None:
    host.want(1, blob(1))
    host.want(2, blob(1))
    host.give(blob(1), (LARGE, LARGE))
    taken = host.take(1), host.take(2)
    assert list(mapped().values()) == [2]
    assert taken == ([LARGE * 2], [LARGE * 2])


@sealed_memory
def test_a_large_blob_is_written_a_piece_a_turn(host: Host) -> None:
    host.want(1, blob(1))
    host.shelf.on_blob(0, "boot1", blob(1), (LARGE,) * 3, host.now)
    for _ in range(3):
        assert host.shelf.next_deadline() == 0.0
        assert host.take(1) is None
        host.shelf.turn(host.now)
        host.shelf.check()
    assert host.take(1) == [LARGE * 3]
    assert host.shelf.next_deadline() > host.now


@sealed_memory
def test_a_large_blob_is_written_down_once_when_two_servers_send_it(
    make_host: Callable[..., Host],
) -> None:
    host = make_host(n_servers=2)
    for number in (1, 2):
        host.want(number, blob(1), server=number - 1)
    for server in (0, 1):
        host.shelf.on_blob(server, "boot1", blob(1), (LARGE, LARGE), host.now)
    host.turn()
    taken = host.take(1), host.take(2)
    assert len(mapped()) == 1
    assert taken == ([LARGE * 2], [LARGE * 2])


@sealed_memory
def test_what_arrives_while_its_child_dies_is_kept(host: Host) -> None:
    host.want(1, blob(1))
    host.shelf.on_blob(0, "boot1", blob(1), (LARGE, LARGE), host.now)
    host.remove(1)
    host.turn()
    host.want(2, blob(1))
    assert host.take(2) == [LARGE * 2]


@sealed_memory
def test_who_asks_while_it_is_written_down_gets_it(host: Host) -> None:
    host.want(1, blob(1))
    host.shelf.on_blob(0, "boot1", blob(1), (LARGE, LARGE, LARGE), host.now)
    host.children[2].want(0, "boot1", (blob(1),))
    host.shelf.turn(host.now)
    host.turn()
    assert host.take(2) == [LARGE * 3]
    assert len(host.asked) == 1


@pytest.fixture
def memory() -> Iterator[Reference]:
    fd = shared.make([LARGE])
    yield shared.name(fd)
    os.close(fd)


@sealed_memory
def test_what_the_server_names_is_the_memory_that_children_map(
    host: Host, memory: Reference
) -> None:
    host.want(1, blob(1))
    host.want(2, blob(1))
    host.give(blob(1), memory)
    taken = host.take(1), host.take(2)
    assert taken == ([LARGE], [LARGE])
    assert mapped() == {str(os.fstat(memory.fd).st_ino): 2}
    assert host.named == [True]
    assert host.shelf.nbytes == len(LARGE)


@sealed_memory
def test_the_bytes_come_where_a_name_cannot_be_opened_until_the_next_welcome(
    host: Host, memory: Reference
) -> None:
    host.want(1, blob(1))
    host.give(blob(1), memory._replace(token=bytes(16)))
    assert list(host.asked) == [(0, blob(1))] * 2
    host.give(blob(1), (LARGE,))
    assert host.take(1) == [LARGE]
    host.want(1, blob(2))
    host.welcome()
    assert host.named == [True, False, False, True]


@sealed_memory
def test_what_two_servers_name_is_opened_once(
    make_host: Callable[..., Host], memory: Reference
) -> None:
    host = make_host(n_servers=2)
    host.want(1, blob(1), server=0)
    host.want(2, blob(1), server=1)
    host.give(blob(1), memory, server=0)
    before = n_descriptors()
    host.give(blob(1), memory, server=1)
    assert n_descriptors() == before
    assert host.take(1) == host.take(2) == [LARGE]


def test_where_no_memory_can_be_sealed_each_child_gets_a_copy(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    host.want(1, blob(1))
    host.want(2, blob(1))
    host.give(blob(1), (LARGE, b"end"))
    taken: list[Any] = [None, None]
    while None in taken:
        taken = [had or host.take(child) for child, had in zip((1, 2), taken, strict=True)]
        host.turn()
    assert taken == [[LARGE + b"end"]] * 2
    assert not mapped()


class NoDescriptors(socket.socket):
    """A socket that takes no more descriptors, as when too many are under way."""

    def sendmsg(self, parts: Any, controls: Any = (), *rest: Any) -> int:
        if controls:
            raise OSError(errno.ETOOMANYREFS, "too many references")
        return super().sendmsg(parts, controls, *rest)


@sealed_memory
def test_a_child_that_can_be_sent_no_descriptor_gets_a_copy(host: Host) -> None:
    ours, theirs = make_pair()
    host.shelf.add(3, NoDescriptors(fileno=ours.detach()))
    host.children[3] = ChildBlobs(theirs.detach())
    host.want(3, blob(1))
    host.give(blob(1), (LARGE, b"end"))
    taken = None
    while taken is None:
        taken = host.take(3)
        host.turn()
    assert taken == [LARGE + b"end"]
    assert not mapped()


@sealed_memory
def test_a_blob_for_which_there_is_no_memory_is_refused(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: object, part: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(shared.Sealing, "write", write)
    host.want(1, blob(1))
    host.give(blob(1), LARGE)
    assert "no memory" in host.refusal(1)
    assert host.shelf.nbytes == 0


# --- what is kept -----------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(make_host: Callable[..., Host]) -> None:
    host = make_host(max_nbytes=3 * len(LARGE))
    for number in range(3):
        host.want(1, blob(number))
        host.give(blob(number), LARGE)
    host.want(2, blob(0))
    host.want(1, blob(3))
    host.give(blob(3), LARGE)
    host.asked.clear()
    host.want(1, blob(0), blob(2), blob(3))
    assert not host.asked
    host.want(1, blob(1))
    assert list(host.asked) == [(0, blob(1))]


def test_blobs_are_bounded_in_number(make_host: Callable[..., Host]) -> None:
    host = make_host(max_blobs=2)
    for number in range(3):
        host.want(1, blob(number))
        host.give(blob(number), b"small")
    assert host.shelf.nbytes == 2 * len(b"small")


@sealed_memory
def test_descriptors_are_bounded(
    make_host: Callable[..., Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "MAX_SEALED", 2)
    host = make_host()
    before = n_descriptors()
    for number in range(4):
        host.want(1, blob(number))
        host.give(blob(number), LARGE)
        host.take(1)
    assert n_descriptors() == before + 2


@sealed_memory
def test_what_a_child_has_mapped_survives_that_it_is_dropped(
    make_host: Callable[..., Host],
) -> None:
    host = make_host(max_nbytes=len(LARGE))
    host.want(1, blob(1))
    host.give(blob(1), LARGE)
    taken = host.take(1)
    host.want(1, blob(2))
    host.give(blob(2), LARGE[::-1])
    assert host.shelf.nbytes == len(LARGE)
    assert taken == [LARGE]


def test_one_that_is_larger_than_all_room_is_given_all_the_same(
    make_host: Callable[..., Host],
) -> None:
    host = make_host(max_nbytes=10)
    host.want(1, blob(1))
    host.give(blob(1), LARGE)
    assert host.take(1) == [LARGE]


# --- in any order -----------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Children want, read and die; servers answer, restart and fall silent; room is scarce."""

    bodies = (b"", b"small", bytes(INLINE_NBYTES - 1), LARGE, (LARGE, LARGE))

    def __init__(self) -> None:
        super().__init__()
        self.host = Host(n_children=4, n_servers=2, max_nbytes=len(LARGE) * 2, max_blobs=3)
        self.waiting: dict[int, tuple[bytes, ...]] = {}  # child -> what it wants

    names = st.lists(st.integers(0, 4).map(blob), min_size=1, max_size=4)

    @rule(child=st.integers(1, 4), names=names, server=st.integers(0, 1), old=st.booleans())
    def want(self, child: int, names: list[bytes], server: int, old: bool) -> None:
        if child in self.host.children:
            boot = "boot0" if old else self.host.boots[server]
            self.host.children[child].want(server, boot, tuple(names))
            self.waiting[child] = tuple(names)

    @rule()
    def turn(self) -> None:
        self.host.shelf.turn(self.host.now)

    @precondition(lambda self: self.host.asked)
    @rule(known=st.booleans())
    def answer(self, known: bool) -> None:
        server, name = self.host.asked.popleft()
        body = self.bodies[name[0]] if known else None
        self.host.shelf.on_blob(server, self.host.boots[server], name, body, self.host.now)

    @rule(child=st.integers(1, 4))
    def read(self, child: int) -> None:
        if child in self.host.children:
            names = self.waiting.get(child, ())
            taken = self.host.take(child)
            if taken:
                del self.waiting[child]
                whole = [self.bodies[name[0]] for name in names]
                assert taken == [b if isinstance(b, bytes) else b"".join(b) for b in whole]
            elif self.host.children[child].refusal:
                self.waiting.pop(child, None)

    @rule(server=st.integers(0, 1))
    def restart(self, server: int) -> None:
        self.host.asked = deque(ask for ask in self.host.asked if ask[0] != server)
        self.host.boots[server] += "+"
        self.host.shelf.on_welcome(server, self.host.now)

    @rule(child=st.integers(1, 4))
    def die(self, child: int) -> None:
        if child in self.host.children:
            self.host.children.pop(child).close()
            self.waiting.pop(child, None)

    @rule(seconds=st.sampled_from([1.0, PATIENCE]))
    def pass_time(self, seconds: float) -> None:
        self.host.now += seconds

    @invariant()
    def holds(self) -> None:
        self.host.shelf.check()

    def teardown(self) -> None:
        try:
            for _ in range(200):  # in the end everybody has what it wants, or is told why not
                self.host.turn()
                while self.host.asked:
                    self.answer(True)
                for child in self.host.children:
                    self.read(child)
                if not self.waiting:
                    break
                self.host.now += 1.0
            assert not self.waiting
        finally:
            self.host.close()


TestAnyOrder = AnyOrder.TestCase


# --- over real processes ----------------------------------------------------------------------


@pytest.mark.slow
@sealed_memory
def test_four_workers_of_a_host_share_an_array_that_a_closure_captured() -> None:
    np = pytest.importorskip("numpy")
    large = np.arange(2**22)  # 32 MiB

    def look(folder: str) -> tuple[int, str, int]:
        """Return this process, and where the array lies, once four processes have it."""
        import os
        import time

        os.mkdir(f"{folder}/{os.getpid()}")
        while len(os.listdir(folder)) < 4:
            time.sleep(0.005)
        address = large.ctypes.data
        with open("/proc/self/maps") as maps:
            for line in maps:
                span, _, _, _, inode, *name = line.split()
                start, end = (int(number, 16) for number in span.split("-"))
                if start <= address < end:
                    return os.getpid(), f"{inode} {name}", int(large[-1])
        raise AssertionError("an array lies nowhere")

    with Cluster() as cluster, tempfile.TemporaryDirectory(prefix="dmap-") as folder:
        cluster.start_worker(n_processes=4)
        with Client(cluster.endpoints) as client:
            found = client.dmap(look, [folder] * 4)
    pids, places, values = zip(*found, strict=True)
    assert len(set(pids)) == 4
    assert len(set(places)) == 1
    assert "memfd:dmap-" in places[0]
    assert set(values) == {2**22 - 1}


# Leaves a job in the background, says its handle, and dies at once.
LEAVES = """
import os, signal, sys
import numpy as np
from dmap import Client

large = np.arange(2**20)
with Client(sys.argv[1]) as client:
    print(client.background(lambda n: int(large[n]), 7), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def holders(place: str) -> set[int]:
    """Return the processes that have a descriptor of memory whose name has that, or map it."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            names = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
            names.append(Path(f"/proc/{pid}/maps").read_text())
        except OSError:  # it has ended, or is not ours
            continue
        if any(place in name for name in names):
            found.add(int(pid))
    return found


@pytest.mark.slow
@sealed_memory
def test_a_job_whose_client_was_killed_has_its_array_and_nothing_outlives_who_has_it() -> None:
    pytest.importorskip("numpy")
    with Cluster() as cluster:
        (endpoint,) = cluster.endpoints
        left = subprocess.run([sys.executable, "-c", LEAVES, endpoint], stdout=subprocess.PIPE)
        assert left.returncode == -signal.SIGKILL
        with Client(endpoint) as client:
            job = client.attach(left.stdout.decode().strip())
            (server,) = cluster.servers
            names = [os.readlink(fd) for fd in Path(f"/proc/{server.popen.pid}/fd").iterdir()]
            (name,) = [name for name in names if name.startswith("/memfd:dmap-")]
            worker = cluster.start_worker(1)
            assert job.result(60) == 7
            assert len(holders(name)) == 3  # the server, the supervisor and its child
            for process in (worker, server):
                process.kill()
            wait_for(lambda: not holders(name))


@pytest.mark.slow
@sealed_memory
def test_where_nobody_can_open_what_is_named_the_bytes_come_as_from_another_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    np = pytest.importorskip("numpy")
    large = np.arange(2**20)
    name = shared.name
    monkeypatch.setattr(shared, "name", lambda fd: name(fd)._replace(token=bytes(16)))
    with Cluster() as cluster, Client(cluster.endpoints) as client:
        cluster.start_worker(1)
        assert client.dmap(lambda n: int(large[n]), [7, 8]) == [7, 8]
        (server,) = cluster.servers
        places = [os.readlink(fd) for fd in Path(f"/proc/{server.popen.pid}/fd").iterdir()]
        assert not [place for place in places if place.startswith("/memfd:dmap-")]
