"""A child's end of the conversation about blobs."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from dmap import buffers
from dmap.buffers import (
    FD,
    INLINE_NBYTES,
    SMALL_NBYTES,
    Answer,
    Ask,
    ChildBlobs,
    Sealed,
    make_pair,
    open_sealed,
)
from jobserver import shared

if not hasattr(os, "memfd_create"):
    pytest.skip("this system has no memory that can be sealed", allow_module_level=True)

LARGE = bytes(range(256)) * 1024  # 256 KiB


def blob(number: int) -> bytes:
    return number.to_bytes(32, "little")


def n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def n_mapped() -> int:
    """Count the mappings of blobs that this process has."""
    return Path("/proc/self/maps").read_text().count("memfd:dmap-")


def is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


def seal(body: bytes) -> Sealed:
    return Sealed(shared.make([body]), len(body))


# --- sealed memory ----------------------------------------------------------------------------


def test_sealed_memory_is_viewed_without_its_descriptor() -> None:
    sealed = seal(LARGE)
    view = open_sealed(sealed.fd, sealed.nbytes)
    assert is_closed(sealed.fd)
    assert (view.readonly, view) == (True, LARGE)


@pytest.mark.parametrize("nbytes", [len(LARGE) - 1, len(LARGE) + 1])
def test_memory_that_is_refused_leaves_no_descriptor(nbytes: int) -> None:
    sealed = seal(LARGE)
    with pytest.raises(OSError, match="should have"):
        open_sealed(sealed.fd, nbytes)
    assert is_closed(sealed.fd)


# --- a child's end ----------------------------------------------------------------------------


class Ends:
    """A child's end, and what the test says and hears in the supervisor's place."""

    def __init__(self) -> None:
        self.supervisor, end = make_pair()
        self.child = ChildBlobs(end.detach())

    def asked(self) -> Ask:
        return msgspec.msgpack.decode(self.supervisor.recv(100_000), type=Ask)

    def asked_nothing(self) -> bool:
        try:
            self.supervisor.recv(100_000)
        except BlockingIOError:
            return True
        return False

    def answer(self, answer: Answer, *fds: int) -> None:
        controls = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, FD.pack(fd)) for fd in fds]
        self.supervisor.sendmsg([buffers.encode(answer)], controls)
        assert self.child.receive()

    def give(self, number: int, name: bytes, body: bytes) -> None:
        if len(body) < INLINE_NBYTES:
            self.answer(Answer(number, name, len(body), piece=body))
        else:
            sealed = seal(body)
            self.answer(Answer(number, name, len(body), is_sealed=True), sealed.fd)
            sealed.close()

    def want(self, *blobs: bytes) -> int:
        """Want these and have an ask for them; return its number."""
        self.child.want(0, "boot1", blobs)
        return self.asked().number


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.supervisor.close()
    made.child.close()


def test_a_child_asks_once_for_all_that_it_misses(ends: Ends) -> None:
    ends.child.want(2, "boot7", (blob(1), blob(2), blob(1)))
    ask = ends.asked()
    assert (ask.server, ask.boot, ask.blobs) == (2, "boot7", [blob(1), blob(2)])
    assert ends.asked_nothing()


def test_what_came_is_taken_in_the_order_of_the_job(ends: Ends) -> None:
    number = ends.want(blob(1), blob(2), blob(1))
    ends.give(number, blob(2), LARGE)
    assert ends.child.take() is None
    ends.give(number, blob(1), b"small")
    bodies = ends.child.take()
    assert bodies == [b"small", LARGE, b"small"]


def test_an_empty_blob_is_a_blob(ends: Ends) -> None:
    ends.give(ends.want(blob(1)), blob(1), b"")
    assert ends.child.take() == [b""]


def test_a_small_blob_is_kept_for_the_next_closure(ends: Ends) -> None:
    ends.give(ends.want(blob(1)), blob(1), b"sources")
    ends.child.take()
    ends.child.want(0, "boot1", (blob(1),))
    assert ends.asked_nothing()
    assert ends.child.take() == [b"sources"]


def test_small_blobs_are_kept_up_to_a_bound_the_least_used_go_first(ends: Ends) -> None:
    n = SMALL_NBYTES // (INLINE_NBYTES - 1)
    for number in range(n):
        ends.give(ends.want(blob(number)), blob(number), bytes(INLINE_NBYTES - 1))
    ends.child.want(0, "boot1", (blob(0),))
    ends.give(ends.want(blob(n)), blob(n), bytes(INLINE_NBYTES - 1))
    ends.child.want(0, "boot1", (blob(0),))
    assert ends.asked_nothing()
    ends.child.want(0, "boot1", (blob(1),))
    assert ends.asked().blobs == [blob(1)]


def test_a_large_blob_in_use_is_neither_asked_for_nor_mapped_again(ends: Ends) -> None:
    ends.give(ends.want(blob(1)), blob(1), LARGE)
    bodies = ends.child.take()
    ends.child.want(0, "boot1", (blob(1),))
    assert ends.asked_nothing()
    again = ends.child.take()
    assert again == bodies == [LARGE]
    assert n_mapped() == 1


def test_a_large_blob_that_nobody_uses_is_not_kept(ends: Ends) -> None:
    ends.give(ends.want(blob(1)), blob(1), LARGE)
    assert n_mapped() == 1
    ends.child.take()
    assert n_mapped() == 0
    assert ends.want(blob(1))


def test_what_is_wanted_no_longer_is_not_kept(ends: Ends) -> None:
    number = ends.want(blob(1), blob(2))
    ends.give(number, blob(1), LARGE)
    ends.child.forget()
    assert n_mapped() == 0


def test_an_answer_to_an_earlier_ask_is_dropped_with_its_descriptor(ends: Ends) -> None:
    number = ends.want(blob(1))
    ends.want(blob(2))
    before = n_descriptors()
    ends.give(number, blob(2), LARGE)
    ends.answer(Answer(number, b"", refusal="the server does not have it"))
    assert (ends.child.take(), ends.child.refusal) == (None, "")
    assert n_descriptors() == before


def test_pieces_become_one_again(ends: Ends) -> None:
    number = ends.want(blob(1), blob(2))
    for piece in (b"one", b"two"):
        ends.answer(Answer(number, blob(1), 6, piece=piece))
        ends.answer(Answer(number, blob(2), 4, piece=piece[:2]))
    bodies = ends.child.take()
    assert bodies == [b"onetwo", b"ontw"]
    assert all(memoryview(body).readonly for body in bodies)


def test_pieces_of_an_earlier_answer_are_forgotten(ends: Ends) -> None:
    ends.answer(Answer(ends.want(blob(1)), blob(1), 6, piece=b"one"))
    number = ends.want(blob(1))
    for piece in (b"one", b"two"):
        assert ends.child.take() is None
        ends.answer(Answer(number, blob(1), 6, piece=piece))
    assert ends.child.take() == [b"onetwo"]


def test_a_refusal_is_told_until_something_else_is_wanted(ends: Ends) -> None:
    ends.answer(Answer(ends.want(blob(1)), b"", refusal="the server does not have it"))
    assert ends.child.refusal == "the server does not have it"
    ends.want(blob(2))
    assert ends.child.refusal == ""


def test_memory_that_could_change_is_not_taken(ends: Ends) -> None:
    number = ends.want(blob(1))
    fd = os.memfd_create("dmap-test", os.MFD_ALLOW_SEALING)
    os.write(fd, LARGE)
    before = n_descriptors()
    ends.answer(Answer(number, blob(1), len(LARGE), is_sealed=True), fd)
    os.close(fd)
    assert "not sealed" in ends.child.refusal
    assert ends.child.take() is None
    assert n_descriptors() == before - 1


def test_a_descriptor_that_did_not_come_along_is_a_refusal(ends: Ends) -> None:
    ends.answer(Answer(ends.want(blob(1)), blob(1), len(LARGE), is_sealed=True))
    assert "too many open files" in ends.child.refusal


def test_programs_that_a_job_starts_do_not_get_the_descriptors(ends: Ends) -> None:
    sealed = seal(LARGE)
    os.set_inheritable(sealed.fd, True)
    ends.child.want(0, "boot1", (blob(1),))
    opened: list[bool] = []
    real = buffers.open_sealed
    with pytest.MonkeyPatch.context() as patch:

        def look(fd: int, nbytes: int) -> memoryview:
            opened.append(os.get_inheritable(fd))
            return real(fd, nbytes)

        patch.setattr(buffers, "open_sealed", look)
        answer = Answer(ends.asked().number, blob(1), len(LARGE), is_sealed=True)
        ends.answer(answer, sealed.fd)
    sealed.close()
    assert opened == [False]


def test_an_ask_that_the_socket_does_not_take_goes_later(ends: Ends) -> None:
    with socket.socket(fileno=os.dup(ends.child.fd)) as end, contextlib.suppress(BlockingIOError):
        while True:
            end.send(bytes(10_000))
    ends.child.want(0, "boot1", (blob(1),))
    while len(ends.supervisor.recv(20_000)) == 10_000:
        ends.child.flush()
    ends.child.flush()
    assert ends.asked_nothing()


def test_the_end_of_the_supervisor_is_told(ends: Ends) -> None:
    assert ends.child.receive()
    ends.supervisor.close()
    assert not ends.child.receive()
