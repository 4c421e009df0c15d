"""The loop over real sockets: what it lets through and refuses, and whom it never waits for."""

import contextlib
import gc
import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import zmq

from jobserver import protocol as wire
from jobserver import shared
from jobserver.errors import InsecureBind
from jobserver.jobs import Limits, Send
from jobserver.machine import machine_id
from jobserver.pieces import Link
from jobserver.protocol import Body, Message
from jobserver.server import MAX_RETRY, PeerLog, Server
from jobserver.state import State
from jobserver.together import unfold

ROOT = Path(__file__).parent.parent
PATIENCE = 20.0  # seconds until a test gives up on what should be there in milliseconds
MIB = 2**20
ANY_PORT = "tcp://127.0.0.1:0"
M = TypeVar("M", bound=Message)


class Context:
    """Makes sockets and closes them all at its end."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []

    def dealer(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        self._sockets.append(socket)
        socket.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE))
        socket.setsockopt(zmq.SNDTIMEO, int(1000 * PATIENCE))
        # The kernel would hold 32 MiB for a peer that does not read; so it piles up sooner.
        socket.setsockopt(zmq.RCVBUF, 65_536)
        socket.connect(endpoint)
        return socket

    def close(self) -> None:
        for socket in self._sockets:
            socket.close(linger=0)
        self._context.term()


@pytest.fixture
def context() -> Iterator[Context]:
    with contextlib.closing(Context()) as context:
        yield context


class Live:
    """A server that runs in a thread."""

    def __init__(self, state: State, max_nbytes: int = 2**30) -> None:
        self.state = state
        self.server = Server(state, max_nbytes=max_nbytes)
        self.endpoint = self.server.bind(ANY_PORT)
        self.thread = threading.Thread(target=self.server.run, name="jobserver")
        self.thread.start()

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self.server.close()


@contextlib.contextmanager
def serving(limits: Limits | None = None, max_nbytes: int = 2**30) -> Iterator[Live]:
    live = Live(State("sammy", "b00t", limits=limits), max_nbytes)
    try:
        yield live
    finally:
        live.stop()
    live.state.check()


@pytest.fixture
def live() -> Iterator[Live]:
    with serving() as live:
        yield live


class Peer:
    """A client or a worker, as plain as it can be."""

    def __init__(self, context: Context, endpoint: str) -> None:
        self.socket = context.dealer(endpoint)
        self.link = Link(2**40)
        self.heard: deque[tuple[Message, tuple[Body, ...]]] = deque()

    def say(self, message: Message, *bodies: Body) -> None:
        for frames in self.link.outgoing(message, bodies):
            self.socket.send_multipart(frames)

    def hear(self) -> tuple[Message, tuple[Body, ...]]:
        """Return the next message but heartbeats."""
        deadline = time.monotonic() + PATIENCE
        while not self.heard:
            assert time.monotonic() < deadline, "nothing but heartbeats"
            header, *bodies = self.socket.recv_multipart()
            whole, answers = self.link.incoming(wire.decode_to_peer(header), tuple(bodies))
            for frames in answers:
                self.socket.send_multipart(frames)
            self.heard += (one for one in whole if not isinstance(one[0], wire.Heartbeat))
        return self.heard.popleft()

    def wait_for(self, kind: type[M]) -> tuple[M, tuple[Body, ...]]:
        """Return the next message of that kind, and pass over others."""
        while True:
            message, bodies = self.hear()
            if isinstance(message, kind):
                return message, bodies

    def wait_for_heartbeat(self) -> None:
        while not isinstance(wire.decode_to_peer(self.socket.recv()), wire.Heartbeat):
            pass

    def ask(self, request: int) -> None:
        self.say(wire.GetStatus(request))

    def answer(self) -> int:
        return self.wait_for(wire.StatusIs)[0].request


def client_of(context: Context, endpoint: str, session: bytes = b"c" * 16) -> Peer:
    peer = Peer(context, endpoint)
    peer.say(wire.Hello(wire.MAJOR, wire.MINOR, "client", session))
    peer.wait_for(wire.Welcome)
    return peer


def client(context: Context, live: Live, session: bytes = b"c" * 16) -> Peer:
    return client_of(context, live.endpoint, session)


def worker(context: Context, live: Live, session: bytes = b"w" * 16) -> Peer:
    """Return a lone worker that can do "f"."""
    peer = Peer(context, live.endpoint)
    peer.say(wire.Hello(wire.MAJOR, wire.MINOR, "worker", session))
    peer.wait_for(wire.Welcome)
    peer.say(wire.CanDo([wire.Ability("f")]))
    return peer


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.002)


def as_bytes(body: Body) -> bytes:
    return body if isinstance(body, bytes) else b"".join(body)


def run_one(client: Peer, worker: Peer, argument: bytes, result: bytes) -> tuple[bytes, bytes]:
    """Take one job there and back; return the argument and the result that arrived."""
    client.say(wire.SubmitJobs("f", [wire.JobSpec(1, len(argument))]), argument)
    client.wait_for(wire.JobsAccepted)
    worker.say(wire.GrabJobs(wait=True))
    assign, (got,) = worker.wait_for(wire.JobAssign)
    worker.say(wire.WorkComplete(1, [wire.WorkDone(assign.jobs[0].handle, len(result))]), result)
    worker.wait_for(wire.WorkAccepted)
    _, (back,) = client.wait_for(wire.JobComplete)
    client.say(wire.ResultsTaken([wire.Range(1, 1)]))
    return as_bytes(got), as_bytes(back)


# What goes through.


def test_a_job_goes_from_client_to_worker_and_back(context: Context, live: Live) -> None:
    one, other = client(context, live), worker(context, live)
    assert run_one(one, other, b"argument", b"result") == (b"argument", b"result")


def test_a_client_that_takes_it_hears_of_acceptance_and_end_in_one_message(
    context: Context, live: Live
) -> None:
    one, other = Peer(context, live.endpoint), worker(context, live)
    one.say(wire.Hello(wire.MAJOR, wire.MINOR, "client", b"c" * 16, together=True))
    one.wait_for(wire.Welcome)
    submit = wire.SubmitJobs("f", [wire.JobSpec(1, 1)])
    cancel = wire.CancelJobs([wire.Range(1, 1)])
    headers = [msgspec.Raw(wire.encode(message)) for message in (submit, cancel)]
    one.say(wire.Together(headers, 0), b"a")
    header = wire.decode_to_peer(one.socket.recv_multipart()[0])
    assert isinstance(header, wire.Together)
    said = [type(message) for message, _ in unfold(header, (), wire.decode_to_peer)]
    assert said == [wire.JobsAccepted, wire.JobFail]
    other.say(wire.GrabJobs())
    other.wait_for(wire.NoJob)


def test_an_acceptance_that_finds_no_company_goes_alone(context: Context, live: Live) -> None:
    one = client(context, live)
    one.say(wire.SubmitJobs("f", [wire.JobSpec(1, 1)]), b"a")
    assert isinstance(one.hear()[0], wire.JobsAccepted)


def test_jobs_leave_nothing_to_the_garbage_collector() -> None:
    """The command switches full collections off."""
    state = State("sammy", "b00t")
    client, worker = b"client", b"worker"

    def say(peer: bytes, message: Message, *bodies: bytes) -> list[Send]:
        return state.on_message(peer, message, bodies, 0.0)

    gc.collect()
    say(client, wire.Hello(wire.MAJOR, wire.MINOR, "client", b"c" * 16))
    say(worker, wire.Hello(wire.MAJOR, wire.MINOR, "worker", b"w" * 16))
    say(worker, wire.CanDo([wire.Ability("f")]))
    specs = [wire.JobSpec(ticket, 1, b"%d" % (ticket % 5)) for ticket in range(10)]
    say(client, wire.SubmitJobs("f", specs, merge=True), b"a" * 10)
    for seq in range(1, 4):
        [send] = say(worker, wire.GrabJobs())
        assign = send.message
        assert isinstance(assign, wire.JobAssign)
        done = wire.WorkDone(assign.jobs[0].handle, 1)
        say(worker, wire.WorkComplete(seq, [done]), b"r")
    say(worker, wire.GrabJobs())
    session = state.book.sessions[b"c" * 16]
    [held_by] = state.crew.workers
    for peer in (client, worker):
        say(peer, wire.Goodbye())
    del send, assign, done
    assert gc.collect() == 0
    # The collector does not look at jobs, so who is left must not be held by one either.
    assert sys.getrefcount(session) == sys.getrefcount(held_by) == 2


def test_forty_megabytes_go_through_in_pieces(context: Context, live: Live) -> None:
    one, other = client(context, live), worker(context, live)
    argument, result = os.urandom(40 * MIB), os.urandom(40 * MIB)
    assert run_one(one, other, argument, result) == (argument, result)
    assert not live.server._links


def test_small_messages_are_answered_while_a_large_one_is_under_way(
    context: Context, live: Live
) -> None:
    one = client(context, live)
    argument = bytes(40 * MIB)
    one.say(wire.SubmitJobs("f", [wire.JobSpec(1, len(argument))]), argument)
    one.ask(1)
    assert isinstance(one.hear()[0], wire.StatusIs)
    assert isinstance(one.hear()[0], wire.JobsAccepted)


def test_a_server_listens_on_several_endpoints(context: Context, live: Live) -> None:
    with Server(State("kenny", "b00t")) as server:
        endpoints = {server.bind(ANY_PORT), server.bind(ANY_PORT)}
        assert len(endpoints) == 2
        for endpoint in endpoints:
            peer = Peer(context, endpoint)
            peer.say(wire.Hello(wire.MAJOR, wire.MINOR, "client", b"c" * 16))
            while not peer.socket.poll(0):
                server.turn(0.01)


def test_a_server_listens_on_an_ipc_path_in_a_folder_of_ours(context: Context) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        command("--bind", f"ipc://{folder}/socket") as jobserver,
    ):
        endpoint = jobserver.wait_listening()
        assert endpoint == f"ipc://{folder}/socket"
        client_of(context, endpoint)


def test_a_server_does_not_listen_to_strangers_unless_it_is_told_to() -> None:
    with Server(State("sammy", "b00t")) as server:
        with pytest.raises(InsecureBind):
            server.bind("tcp://0.0.0.0:0")
        assert server.bind("tcp://0.0.0.0:0", insecure=True).startswith("tcp://0.0.0.0:")


def test_an_address_in_use_is_an_error_that_names_it(live: Live) -> None:
    with (
        Server(State("kenny", "b00t")) as server,
        pytest.raises(OSError, match=re.escape(live.endpoint)),
    ):
        server.bind(live.endpoint)


# What does not.


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b""], "bad_header"),
        ([b"\xc1 is never msgpack"], "bad_header"),
        ([b"\x93"], "bad_header"),
        ([b"\x91\xa3Foo"], "unknown_message"),
        ([wire.encode(wire.JobAssign([]))], "unknown_message"),
        ([wire.encode(wire.Heartbeat()), b"", b"", b""], "bad_frame"),
        ([wire.encode(wire.Heartbeat())] * 17, "bad_frame"),
        ([bytes(8 * MIB + 1)], "limit"),
        ([wire.encode(wire.WorkData(1)), bytes(MIB + 1)], "limit"),
        ([wire.encode(wire.Piece(2)), bytes(MIB)], "bad_frame"),
        ([wire.encode(wire.CanDo([]))], "role"),
    ],
)
def test_what_is_no_lawful_message_is_answered_by_an_error_and_counted(
    context: Context, live: Live, frames: list[bytes], code: str
) -> None:
    peer = client(context, live)
    peer.socket.send_multipart(frames)
    assert peer.wait_for(wire.Error)[0].code == code
    assert live.state.counters["malformed"] == 1
    peer.ask(5)
    assert peer.answer() == 5


def test_a_frame_beyond_the_limit_cuts_the_link_and_the_server_lives(
    context: Context, live: Live
) -> None:
    hostile = client(context, live, b"h" * 16)
    hostile.socket.send(bytes(wire.MAX_FRAME_NBYTES + 1))
    peer = client(context, live)
    peer.ask(1)
    assert peer.answer() == 1
    hostile.ask(2)  # on the new connection that libzmq made by itself
    assert hostile.wait_for(wire.Error)[0].code == "hello_first"


@pytest.mark.parametrize("message", [wire.GetStatus(1), wire.Offer(2, 5 * MIB), wire.Heartbeat()])
def test_a_peer_without_a_hello_is_asked_for_it(
    context: Context, live: Live, message: Message
) -> None:
    stranger = Peer(context, live.endpoint)
    stranger.socket.send(wire.encode(message))
    assert stranger.wait_for(wire.Error)[0].code == "hello_first"


def test_a_new_hello_forgets_transfers_under_way(context: Context, live: Live) -> None:
    peer = client(context, live)
    peer.socket.send(wire.encode(wire.Offer(2, 5 * MIB)))
    peer.socket.send(wire.encode(wire.Hello(wire.MAJOR, wire.MINOR, "client", b"c" * 16)))
    peer.socket.send(wire.encode(wire.Offer(2, 3 * MIB)))
    said = [wire.decode_to_peer(peer.socket.recv()) for _ in range(3)]
    assert [one for one in said if isinstance(one, wire.Grant)] == [
        wire.Grant(2, 5 * MIB),
        wire.Grant(2, 3 * MIB),
    ]


def granted(peer: Peer) -> wire.Grant:
    """Return the next grant that a peer gets, and pass over heartbeats."""
    return answered(peer, wire.Grant)


def answered(peer: Peer, kind: type[M]) -> M:
    """Return the next answer to an offer, and pass over heartbeats."""
    while not isinstance(message := wire.decode_to_peer(peer.socket.recv()), kind):
        assert isinstance(message, wire.Heartbeat | wire.Error)
    return message


def test_a_transfer_gets_the_room_of_one_that_was_refused(context: Context, live: Live) -> None:
    peer = client(context, live)
    peer.socket.send(wire.encode(wire.Offer(2, 16 * MIB)))  # all that a link has under way
    assert granted(peer) == wire.Grant(2, 16 * MIB)
    peer.socket.send(wire.encode(wire.Offer(4, MIB)))
    peer.socket.send_multipart([wire.encode(wire.Piece(2)), b"too small"])
    assert granted(peer) == wire.Grant(4, MIB)


def test_a_transfer_gets_the_room_of_one_that_ended(context: Context) -> None:
    with serving(max_nbytes=40 * MIB) as live:  # ten of them for transfers
        first, second = client(context, live, b"1" * 16), client(context, live, b"2" * 16)
        first.socket.send(wire.encode(wire.Offer(2, 8 * MIB)))
        assert granted(first) == wire.Grant(2, 8 * MIB)
        second.socket.send(wire.encode(wire.Offer(2, 8 * MIB)))
        first.socket.send_multipart([wire.encode(wire.Piece(2)), bytes(8 * MIB)])
        put_blob = wire.encode(wire.PutBlob(bytes(32)))
        first.socket.send(wire.encode(wire.Pieced(put_blob, (2,))))
        assert granted(second) == wire.Grant(2, 8 * MIB)


def test_what_a_gone_peer_had_reserved_is_free_again(context: Context) -> None:
    with serving(Limits(heartbeat=1e6), max_nbytes=40 * MIB) as live:
        gone, waiting = worker(context, live), client(context, live)
        gone.socket.send(wire.encode(wire.Offer(2, 10 * MIB)))
        assert granted(gone) == wire.Grant(2, 10 * MIB)
        waiting.socket.send(wire.encode(wire.Offer(2, 10 * MIB)))
        gone.wait_for_heartbeat()  # the first probe, which a living peer survives
        gone.socket.close(linger=0)
        assert granted(waiting) == wire.Grant(2, 10 * MIB)


def test_an_offer_beyond_the_limit_is_declined_and_not_counted(
    context: Context, live: Live
) -> None:
    peer = client(context, live)
    peer.socket.send(wire.encode(wire.Offer(2, 2**30 + 1)))
    assert answered(peer, wire.Declined).transfer == 2
    assert not live.state.counters["malformed"]


def client_and_worker_of_a_job(
    context: Context, live: Live, argument: bytes = b"x"
) -> tuple[Peer, Peer]:
    """Return two peers that take no more than 2 MiB at once; a job waits for the worker."""
    one, other = client(context, live), worker(context, live)
    one.say(wire.SubmitJobs("f", [wire.JobSpec(1, len(argument))]), argument)
    one.wait_for(wire.JobsAccepted)
    one.link, other.link = Link(2 * MIB), Link(2 * MIB)
    other.say(wire.GrabJobs(wait=True))
    return one, other


def untaken(live: Live) -> int:
    return sum(len(session.untaken) for session in live.state.book.sessions.values())


def test_a_result_that_its_client_declines_is_a_failure_which_it_can_acknowledge(
    context: Context, live: Live
) -> None:
    one, other = client_and_worker_of_a_job(context, live)
    handle = other.wait_for(wire.JobAssign)[0].jobs[0].handle
    other.say(wire.WorkComplete(1, [wire.WorkDone(handle, 3 * MIB)]), bytes(3 * MIB))
    other.wait_for(wire.WorkAccepted)
    fail, _ = one.wait_for(wire.JobFail)
    assert (fail.ticket, fail.code) == (1, "failed")
    assert "a body of 3145728 bytes" in fail.text
    one.say(wire.ResultsTaken([wire.Range(1, 1)]))
    wait_until(lambda: not untaken(live))


def test_an_exception_that_its_client_declines_is_a_failure(context: Context, live: Live) -> None:
    one, other = client_and_worker_of_a_job(context, live)
    handle = other.wait_for(wire.JobAssign)[0].jobs[0].handle
    other.say(wire.WorkException(1, handle, "E", "m", "t"), bytes(3 * MIB), b"")
    other.wait_for(wire.WorkAccepted)
    fail, _ = one.wait_for(wire.JobFail)
    assert (fail.ticket, fail.code) == (1, "failed")


def test_a_job_that_its_worker_declines_fails_and_the_worker_may_grab_again(
    context: Context, live: Live
) -> None:
    one, other = client_and_worker_of_a_job(context, live, bytes(3 * MIB))
    other.wait_for(wire.NoJob)
    fail, _ = one.wait_for(wire.JobFail)
    assert (fail.ticket, fail.code) == (1, "failed")
    assert "a body of 3145728 bytes" in fail.text


def test_a_blob_that_its_worker_declines_is_one_that_it_does_not_get(
    context: Context, live: Live
) -> None:
    blob = bytes(3 * MIB)
    name = hashlib.sha256(blob).digest()
    one, other = client(context, live), worker(context, live)
    one.say(wire.PutBlob(name), blob)
    one.wait_for(wire.BlobTaken)
    other.link = Link(2 * MIB)
    other.say(wire.FetchBlob(name))
    assert other.wait_for(wire.Blob)[0] == wire.Blob(name, False)


# --- memory that is named ---------------------------------------------------------------------


LARGE = os.urandom(MIB)
LARGE_ID = hashlib.sha256(LARGE).digest()
named = pytest.mark.skipif(not machine_id(), reason="this system has no memory that can be shared")


@pytest.fixture
def memory() -> Iterator[wire.Reference]:
    fd = shared.make([LARGE])
    yield shared.name(fd)
    with contextlib.suppress(OSError):  # a test may have closed it
        os.close(fd)


def descriptors_of(reference: wire.Reference) -> int:
    """Count the descriptors of a memory that this process, and so its server, has."""
    places = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum(os.path.islink(p) and reference.token.hex() in os.readlink(p) for p in places)


@named
def test_what_a_client_named_is_kept_when_the_client_has_ended(
    context: Context, live: Live, memory: wire.Reference
) -> None:
    one, other = client(context, live), worker(context, live)
    one.say(wire.PutBlob(LARGE_ID, memory))
    assert one.wait_for(wire.BlobTaken)[0] == wire.BlobTaken(LARGE_ID)
    os.close(memory.fd)
    other.say(wire.FetchBlob(LARGE_ID, named=True))
    answer, bodies = other.wait_for(wire.Blob)
    assert answer.memory is not None
    assert not bodies
    fd = shared.open(answer.memory)
    assert shared.map_private(fd) == LARGE
    os.close(fd)


@named
def test_who_cannot_open_what_a_client_named_gets_its_bytes(
    context: Context, live: Live, memory: wire.Reference
) -> None:
    one, other = client(context, live), worker(context, live)
    one.say(wire.PutBlob(LARGE_ID, memory))
    one.wait_for(wire.BlobTaken)
    other.say(wire.FetchBlob(LARGE_ID))
    answer, (body,) = other.wait_for(wire.Blob)
    assert (answer.memory, b"".join(body) if isinstance(body, tuple) else body) == (None, LARGE)


@named
@pytest.mark.parametrize(
    ("forged", "why"),
    [
        ({"token": bytes(16)}, "something else"),
        ({"nbytes": 1}, "should have 1"),
        ({"fd": 10**6}, "cannot be opened"),
        ({"pid": 2**40}, "cannot be opened"),
    ],
    ids=["token", "size", "descriptor", "process"],
)
def test_memory_that_is_not_as_it_is_named_is_not_opened(
    context: Context, live: Live, memory: wire.Reference, forged: dict[str, Any], why: str
) -> None:
    one = client(context, live)
    one.say(wire.PutBlob(LARGE_ID, memory._replace(**forged)))
    taken = one.wait_for(wire.BlobTaken)[0]
    assert (taken.blob, taken.send) == (LARGE_ID, True)
    assert why in taken.text
    assert descriptors_of(memory) == 1


@named
def test_memory_that_its_client_could_still_change_is_not_opened(
    context: Context, live: Live
) -> None:
    fd = os.memfd_create("dmap-" + "0" * 32, os.MFD_ALLOW_SEALING)
    os.write(fd, LARGE)
    one = client(context, live)
    one.say(wire.PutBlob(LARGE_ID, shared.name(fd)))
    assert "not sealed" in one.wait_for(wire.BlobTaken)[0].text
    os.close(fd)


@named
def test_memory_under_a_wrong_digest_is_refused_and_let_go(
    context: Context, live: Live, memory: wire.Reference
) -> None:
    one = client(context, live)
    one.say(wire.PutBlob(b"?" * 32, memory))
    taken = one.wait_for(wire.BlobTaken)[0]
    assert "sha256" in taken.text
    assert not taken.send, "its bytes would be the same"
    one.ask(1)
    one.answer()  # the server is through with it
    gc.collect()
    assert descriptors_of(memory) == 1


@named
def test_for_a_stranger_nothing_is_opened(
    context: Context, live: Live, memory: wire.Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[wire.Reference] = []
    monkeypatch.setattr(shared, "open", opened.append)
    stranger = Peer(context, live.endpoint)
    stranger.say(wire.PutBlob(LARGE_ID, memory))
    assert stranger.wait_for(wire.Error)[0].code == "hello_first"
    assert not opened


@named
def test_what_the_budget_has_no_room_for_any_more_is_let_go(
    context: Context, memory: wire.Reference
) -> None:
    with serving(Limits(blob_nbytes=MIB)) as live:
        one = client(context, live)
        one.say(wire.PutBlob(LARGE_ID, memory))
        one.wait_for(wire.BlobTaken)
        assert descriptors_of(memory) == 2
        one.say(wire.PutBlob(hashlib.sha256(b"small").digest()), b"small")
        one.wait_for(wire.BlobTaken)
        one.ask(1)
        one.answer()
        assert descriptors_of(memory) == 1


def test_a_peer_is_complained_about_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    peers = PeerLog()
    for tenth in range(15):
        peers.warn(tenth / 10, b"peer", "did it %s", "again")
    assert len(caplog.records) == 2


def test_many_peers_together_are_complained_about_twenty_times_a_second(
    caplog: pytest.LogCaptureFixture,
) -> None:
    peers = PeerLog()
    for number in range(1000):
        peers.warn(0.5, bytes([number % 256, number // 256]), "did it")
    assert len(caplog.records) == 20


def test_what_a_peer_sent_is_escaped_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    PeerLog().warn(0.0, b"peer", "said %s", "\x1b[2J\nERROR all is lost")
    assert caplog.messages == ["peer 70656572 said '\\x1b[2J\\nERROR all is lost'"]


# Who does not read.


def ask_for_much(context: Context, live: Live, n: int) -> Peer:
    """Return a client that asked ``n`` times for some kilobytes, and reads nothing."""
    slow, other = client(context, live, b"s" * 16), client(context, live, b"o" * 16)
    specs = [wire.JobSpec(ticket, 0) for ticket in range(30)]
    other.say(wire.SubmitJobs("f", specs), b"")
    other.wait_for(wire.JobsAccepted)
    for request in range(n):
        slow.say(wire.Show(request, "jobs"))
    other.ask(1)
    assert other.answer() == 1  # nobody else waits
    return slow


def fill(context: Context, live: Live, n: int) -> Peer:
    """Return a client for which more is parked than any buffer holds."""
    slow = ask_for_much(context, live, n)
    slow.say(wire.OpenLane(1))  # when this is heard, all of it is
    wait_until(lambda: bool(live.state.book.sessions[b"s" * 16].lanes))
    assert live.server._parked
    return slow


def test_a_slow_reader_gets_all_of_it_later_and_in_order(context: Context, live: Live) -> None:
    n = 4000
    slow = fill(context, live, n)
    assert [slow.wait_for(wire.Shown)[0].request for _ in range(n)] == list(range(n))
    wait_until(lambda: not live.server._parked)


def test_a_drained_server_waits_for_a_slow_reader(context: Context, live: Live) -> None:
    n = 4000
    slow = fill(context, live, n)
    live.server.drain()  # and so the ready jobs are refused
    assert [slow.wait_for(wire.Shown)[0].request for _ in range(n)] == list(range(n))
    slow.wait_for(wire.Draining)
    live.thread.join(PATIENCE)
    assert not live.thread.is_alive()


def test_a_peer_that_floods_without_reading_is_cut_and_the_others_are_served(
    context: Context, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobserver.server.MAX_PARKED", 500)
    flooder = ask_for_much(context, live, 4000)
    session = live.state.book.sessions[b"s" * 16]
    wait_until(lambda: session.peer is None)
    other = client(context, live)
    other.ask(1)
    assert other.answer() == 1
    assert all(len(parked.entries) <= 501 for parked in live.server._parked.values())
    assert flooder.wait_for(wire.Error)[0].code == "hello_first"
    flooder.say(wire.Hello(wire.MAJOR, wire.MINOR, "client", b"s" * 16))
    assert flooder.wait_for(wire.Welcome)[0].resumed


# Who is gone.


def test_the_heartbeat_finds_out_that_a_client_is_gone(context: Context) -> None:
    with serving(Limits(heartbeat=0.02)) as live:
        peer = client(context, live)
        peer.socket.close(linger=0)
        wait_until(lambda: live.state.book.sessions[b"c" * 16].peer is None)


class Recorder:
    """A state that sends what a test gives it, and writes down what it is told."""

    drained = False

    def __init__(self) -> None:
        self.told: list[object] = []
        self.to_send: list[Send] = []
        self.peers: list[bytes] = []

    def on_message(
        self, peer: bytes, message: Message, bodies: tuple[Body, ...], now: float
    ) -> list[Send]:
        self.peers.append(peer)
        return []

    def on_malformed(self, peer: bytes, error: wire.Malformed, now: float) -> list[Send]:
        return []

    def on_gone(self, peer: bytes, now: float) -> list[Send]:
        self.told.append(peer)
        return []

    def on_undelivered(self, peer: bytes, message: Message, now: float) -> list[Send]:
        self.told.append((peer, message))
        return [Send(self.peers[-1], wire.Noop())] if self.peers[-1] != peer else []

    def on_tick(self, now: float) -> list[Send]:
        sends, self.to_send = self.to_send, []
        return sends

    def next_deadline(self) -> float | None:
        return 0.0 if self.to_send else None

    def takes_together(self, peer: bytes) -> bool:
        return False

    def drain(self, now: float) -> list[Send]:
        return []


def met(context: Context, server: Server, state: Recorder, endpoint: str) -> Peer:
    peer = Peer(context, endpoint)
    peer.say(wire.PreSleep())
    n_before = len(state.peers)
    while len(state.peers) == n_before:
        server.turn(0.1)
    return peer


def turn_until(server: Server, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        server.turn(0.01)


def test_a_message_that_meets_a_gone_link_comes_back_and_what_that_sends_goes_out(
    context: Context,
) -> None:
    state = Recorder()
    with Server(state) as server:
        endpoint = server.bind(ANY_PORT)
        met(context, server, state, endpoint).socket.close(linger=0)
        other = met(context, server, state, endpoint)
        gone = state.peers[0]
        assign = wire.JobAssign([])

        def is_told() -> bool:
            state.to_send = [] if state.told else [Send(gone, assign)]
            return bool(state.told)

        turn_until(server, is_told)
        assert state.told == [(gone, assign)]
        assert isinstance(other.hear()[0], wire.Noop)


def test_of_a_peer_that_is_cut_the_state_is_told_that_it_is_gone(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobserver.server.MAX_PARKED", 5)
    state = Recorder()
    with Server(state) as server:
        met(context, server, state, server.bind(ANY_PORT))

        def is_told() -> bool:
            state.to_send = [Send(state.peers[0], wire.Noop(), (bytes(10_000),))] * 10
            return bool(state.told)

        turn_until(server, is_told)
        assert state.told == [state.peers[0]]


def test_what_is_parked_for_a_peer_that_goes_comes_back_newest_first(context: Context) -> None:
    state = Recorder()
    with Server(state) as server:
        peer = met(context, server, state, server.bind(ANY_PORT))
        [routing_id] = state.peers
        body = bytes(10_000)
        while server._retry < MAX_RETRY:  # until no buffer takes more, again and again
            if not server._parked:
                state.to_send = [Send(routing_id, wire.JobAssign([]), (body,))]
            server.turn(0)
        last = [wire.CancelJob(1, number) for number in range(3)]
        state.to_send = [Send(routing_id, message) for message in (*last, wire.Heartbeat())]
        server.turn(0)
        peer.socket.close(linger=0)
        turn_until(server, lambda: bool(state.told))
        assert state.told[:3] == [(routing_id, message) for message in reversed(last)]
        assert not server._parked


# How it ends.


def test_a_drained_server_leaves_by_itself(context: Context) -> None:
    with serving() as live:
        peer = client(context, live)
        live.server.drain()
        peer.wait_for(wire.Draining)
        live.thread.join(PATIENCE)
        assert not live.thread.is_alive()


class Command:
    """The command, as a process."""

    def __init__(self, *arguments: str, fds: tuple[int, ...] = ()) -> None:
        argv = [sys.executable, "-m", "jobserver", *arguments]
        self.process = subprocess.Popen(
            argv, cwd=ROOT, stderr=subprocess.PIPE, text=True, pass_fds=fds
        )
        self.lines: list[str] = []

    def wait_listening(self) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"listening on (\S+)", line):
                return found[1]
        raise AssertionError(f"it does not listen: {self.lines}")

    def wait(self) -> int:
        return self.process.wait(PATIENCE)


@contextlib.contextmanager
def command(*arguments: str, fds: tuple[int, ...] = ()) -> Iterator[Command]:
    started = Command(*arguments, fds=fds)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


def assigned(context: Context, endpoint: str) -> tuple[Peer, Peer, int]:
    """Return a client, a worker, and the handle of the one's job that the other has."""
    one, other = client_of(context, endpoint), Peer(context, endpoint)
    other.say(wire.Hello(wire.MAJOR, wire.MINOR, "worker", b"w" * 16))
    other.say(wire.CanDo([wire.Ability("f")]))
    one.say(wire.SubmitJobs("f", [wire.JobSpec(1, 1)]), b"a")
    one.wait_for(wire.JobsAccepted)
    other.say(wire.GrabJobs(wait=True))
    return one, other, other.wait_for(wire.JobAssign)[0].jobs[0].handle


def test_sigterm_lets_the_server_finish_what_it_has(context: Context) -> None:
    with command("--bind", ANY_PORT) as jobserver:
        one, other, handle = assigned(context, jobserver.wait_listening())
        jobserver.process.send_signal(signal.SIGTERM)
        one.wait_for(wire.Draining)
        other.say(wire.WorkComplete(1, [wire.WorkDone(handle, 1)]), b"r")
        assert one.wait_for(wire.JobComplete)[1] == (b"r",)
        assert jobserver.process.poll() is None
        one.say(wire.ResultsTaken([wire.Range(1, 1)]))
        assert jobserver.wait() == 0


def test_a_second_signal_ends_the_server_at_once(context: Context) -> None:
    with command("--bind", ANY_PORT) as jobserver:
        one, _, _ = assigned(context, jobserver.wait_listening())
        jobserver.process.send_signal(signal.SIGTERM)
        one.wait_for(wire.Draining)
        jobserver.process.send_signal(signal.SIGINT)
        assert jobserver.wait() == 0


def test_a_server_ends_with_the_other_end_of_its_lifeline(context: Context) -> None:
    near, far = os.pipe()
    with command("--bind", ANY_PORT, "--lifeline", str(near), fds=(near,)) as jobserver:
        os.close(near)
        assigned(context, jobserver.wait_listening())
        os.close(far)
        assert jobserver.wait() == 0


def test_a_server_tells_its_name_and_a_new_boot_each_time(context: Context) -> None:
    boots = set()
    for _ in range(2):
        with command("--bind", ANY_PORT, "--name", "sammy") as jobserver:
            peer = Peer(context, jobserver.wait_listening())
            peer.say(wire.Hello(wire.MAJOR, wire.MINOR, "client", b"c" * 16))
            welcome, _ = peer.wait_for(wire.Welcome)
            assert welcome.name == "sammy"
            boots.add(welcome.boot)
    assert len(boots) == 2


def test_an_insecure_server_warns(context: Context) -> None:
    with command("--bind", "tcp://0.0.0.0:0", "--insecure") as jobserver:
        jobserver.wait_listening()
        assert "WARNING" in jobserver.lines[0]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--bind", "tcp://0.0.0.0:0"], 1, "--insecure"),
        (["--bind", "ipc:///nowhere/at/all/socket", "--insecure"], 1, "cannot listen on"),
        (["--bind", "sammy:port"], 2, "not a port"),
        (["--name", ""], 2, "1 to 256"),
        (["--max-jobs", "0"], 2, "above 0"),
    ],
)
def test_a_server_that_cannot_start_says_why(arguments: list[str], code: int, text: str) -> None:
    with command(*arguments) as jobserver:
        _, stderr = jobserver.process.communicate(timeout=PATIENCE)
    assert jobserver.process.returncode == code
    assert text in stderr
    assert "Traceback" not in stderr
