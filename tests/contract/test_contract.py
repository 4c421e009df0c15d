"""What client, worker and server agree on, over a net in memory, over sockets, and with a process.

Each conversation is written once, in the words of ``fake_net``, and held against

* the state alone, on the fake net that the other tests of the state use;
* a server with sockets, in a thread of this process;
* a server that is a process.

So what the fake says is what a server does. Over sockets, ``deliver`` comes back when the server
has taken the message and every peer has all that it was sent for it: a peer that asks what is
answered at once hears the answer behind all else. Only time passes by itself there.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from fake_net import Client, Net, Peer, Supervisor, Worker

from jobserver import protocol as wire
from jobserver.pieces import Link
from jobserver.protocol import Body, Message
from jobserver.server import Server
from jobserver.state import State

WITHIN = 20.0  # seconds in which what must come comes, on any machine


class ContractNet(Net):
    """What a conversation needs beside what the fake net has."""

    def cut(self, peer: Peer) -> None:
        """Break the peer's link. The server learns of it soon."""
        raise NotImplementedError

    def restart(self) -> None:
        """Have another boot of the server in its place, which knows nobody; all links break."""
        raise NotImplementedError

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Let time pass until a condition holds; fail if it does not in time."""
        raise NotImplementedError

    def boot_of(self, peer: Peer) -> str:
        """Return the boot that the peer was told last."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave nothing behind."""


class FakeNet(ContractNet):
    """The state alone."""

    def cut(self, peer: Peer) -> None:
        peer.cut()

    def restart(self) -> None:
        self.peers.clear()
        self.state = State("sammy", self.state.boot + "+")

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = self.now + WITHIN
        while not condition():
            assert self.now < deadline, "it did not come to that"
            self.tick(0.05)

    def boot_of(self, peer: Peer) -> str:
        return self.state.boot


class Line:
    """A connection, and what has come over it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.role: wire.Role | None = None  # as which the server has welcomed it
        self.boot = ""
        self._inbox: list[tuple[Message, tuple[Body, ...]]] = []
        self._requests = itertools.count(2**60)
        self._link = Link(2**40)
        self._socket = context.socket(zmq.DEALER)
        self._socket.connect(endpoint)

    def close(self) -> None:
        self._socket.close(linger=0)

    def say(self, message: Message, *bodies: Body) -> None:
        self._send(message, *bodies)
        if self.role is None:  # whatever a stranger says is answered
            self._pump_until(lambda: bool(self._inbox))
            answer = self._inbox[0][0]
            if isinstance(message, wire.Hello) and isinstance(answer, wire.Welcome):
                self.role, self.boot = message.role, answer.boot
        elif isinstance(message, wire.Goodbye):
            self._send(wire.Heartbeat())
            self._pump_to(_is_for_strangers)

    def sync(self) -> None:
        """Take in all that the server has sent so far."""
        if self.role is None:
            return
        request = next(self._requests)
        blob = hashlib.sha256(str(request).encode()).digest()
        if self.role == "worker":
            self._send(wire.FetchBlob(blob))
            self._pump_to(lambda said: said == wire.Blob(blob, False))
        elif self.role == "client":
            self._send(wire.GetStatus(request, 2**62))
            self._pump_to(lambda said: isinstance(said, wire.StatusIs) and said.request == request)
        else:  # nothing is answered but what is out of its role
            self._send(wire.PreSleep())
            self._pump_to(lambda said: isinstance(said, wire.Error) and said.code == "role")
        self._pump_until(lambda: self._link.idle)

    def take_all(self) -> list[tuple[Message, tuple[Body, ...]]]:
        """Return what has come, but heartbeats."""
        came, self._inbox = self._inbox, []
        return came

    def _send(self, message: Message, *bodies: Body) -> None:
        for frames in self._link.outgoing(message, bodies):
            self._socket.send_multipart(frames)
        self._pump_until(lambda: self._link.idle)

    def _pump_to(self, is_it: Callable[[Message], bool]) -> None:
        """Take in what comes up to this answer, or up to the word that we are a stranger now."""

        def is_answered() -> bool:
            if self._find(_is_for_strangers):
                self.role = None
            return self.role is None or self._find(is_it)

        self._pump_until(is_answered)

    def _find(self, is_it: Callable[[Message], bool]) -> bool:
        """Take out a message, if it has come."""
        for place, (message, _) in enumerate(self._inbox):
            if is_it(message):
                del self._inbox[place]
                return True
        return False

    def _pump_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WITHIN
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, f"it did not come to that; there are {self._inbox}"
            if not self._socket.poll(int(1000 * left) + 1):
                continue
            header, *bodies = self._socket.recv_multipart()
            message = wire.decode_to_peer(header)
            whole, answers = self._link.incoming(message, tuple(bodies))
            for frames in answers:
                self._socket.send_multipart(frames)
            self._inbox += (one for one in whole if not isinstance(one[0], wire.Heartbeat))


def _is_for_strangers(message: Message) -> bool:
    return isinstance(message, wire.Error) and message.code == "hello_first"


class SocketNet(ContractNet):
    """A server behind a socket. Where it runs is for those below to say."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.endpoint = f"ipc://{folder}/sammy"
        self._lines: dict[bytes, Line] = {}  # what a peer takes for its routing id -> connection
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def routing_id(self) -> bytes:
        name = super().routing_id()
        self._lines[name] = Line(self._context, self.endpoint)
        return name

    def deliver(self, peer: bytes, message: Message, *bodies: Body) -> None:
        self._lines[peer].say(message, *bodies)
        self._lines[peer].sync()  # now the server has taken it
        self._sync()

    def _sync(self) -> None:
        for name, line in self._lines.items():
            line.sync()
            if name in self.peers:
                self.peers[name].inbox += line.take_all()

    def cut(self, peer: Peer) -> None:
        del self.peers[peer.id]
        self._lines.pop(peer.id).close()

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + WITHIN
        while not condition():
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.005)
            self._sync()

    def boot_of(self, peer: Peer) -> str:
        return self._lines[peer.id].boot

    def break_links(self) -> None:
        self.peers.clear()
        for line in self._lines.values():
            line.close()
        self._lines.clear()

    def close(self) -> None:
        self.break_links()
        self._context.term()


class ThreadNet(SocketNet):
    """A server with its sockets in a thread."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._start()

    def _start(self) -> None:
        self._server = Server(self.state)
        self._server.bind(self.endpoint)
        self._thread = threading.Thread(target=self._server.run, name="jobserver")
        self._thread.start()

    def _stop(self) -> None:
        self._server.stop()
        self._thread.join(WITHIN)
        assert not self._thread.is_alive()
        self._server.close()
        self.state.check()

    def restart(self) -> None:
        self.break_links()
        self._stop()
        self.state = State("sammy", self.state.boot + "+")
        self._start()

    def close(self) -> None:
        self._stop()
        super().close()


class ProcessNet(SocketNet):
    """A server that is a process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        del self.state  # it has its own
        self._start()

    def _start(self) -> None:
        argv = [sys.executable, "-m", "jobserver", "--bind", self.endpoint, "--name", "sammy"]
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self.break_links()
        self._kill()
        self._start()

    def close(self) -> None:
        self._kill()
        super().close()


@pytest.fixture(
    params=[
        "fake",
        pytest.param("thread", marks=pytest.mark.slow),
        pytest.param("process", marks=pytest.mark.slow),
    ]
)
def net(request: pytest.FixtureRequest) -> Iterator[ContractNet]:
    with tempfile.TemporaryDirectory(prefix="dmap-") as name:
        folder = Path(name)
        kinds: dict[str, Callable[[], ContractNet]] = {
            "fake": FakeNet,
            "thread": lambda: ThreadNet(folder),
            "process": lambda: ProcessNet(folder),
        }
        with contextlib.closing(kinds[request.param]()) as net:
            yield net
            net.quiet()


# --- Hello --------------------------------------------------------------------------------------


def test_a_stranger_is_told_to_say_hello_first(net: ContractNet) -> None:
    client = Client(net)
    client.say(wire.Goodbye())
    client.submit()
    assert client.take(wire.Error).code == "hello_first"


def test_another_major_version_is_refused_by_name(net: ContractNet) -> None:
    peer = Peer(net, wire.Hello(9, 0, "client", b"c" * 16))
    error = peer.take(wire.Error)
    assert error.code == "version"
    assert "9.0" in error.text


def test_what_is_out_of_role_changes_nothing(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    client.submitted()
    client.say(wire.GrabJobs())
    assert client.take(wire.Error).code == "role"
    worker.grab()


# --- one job, and many --------------------------------------------------------------------------


def test_a_job_goes_to_a_worker_and_its_result_comes_back(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted(argument=b"7")
    worker.say(wire.GrabJobs())
    assign, bodies = worker.take_with_bodies(wire.JobAssign)
    (job,) = assign.jobs
    assert (job.handle, job.function, job.attempt, bodies) == (handle, "f", 1, (b"7",))
    assert job.origin == wire.Origin(client.session, 1)
    worker.complete(handle, b"49")
    assert client.result() == (1, b"49")
    worker.grab_nothing()


def test_a_batch_is_accepted_in_a_range_and_comes_back_in_one_message(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    specs = [wire.JobSpec(ticket, ticket) for ticket in (1, 2, 3)]
    client.say(wire.SubmitJobs("f", specs), b"abbccc")
    (accepted,) = client.take(wire.JobsAccepted).jobs
    assert (accepted.ticket, accepted.n) == (1, 3)
    done = []
    for argument in (b"a", b"bb", b"ccc"):
        worker.say(wire.GrabJobs())
        assign, bodies = worker.take_with_bodies(wire.JobAssign)
        assert bodies == (argument,)
        done.append(wire.WorkDone(assign.jobs[0].handle, len(argument)))
    worker.say(wire.WorkComplete(1, done), b"ABBCCC")
    assert worker.take(wire.WorkAccepted).seqs == [wire.Range(1, 1)]
    complete, bodies = client.take_with_bodies(wire.JobComplete)
    assert [(job.ticket, job.nbytes) for job in complete.jobs] == [(1, 1), (2, 2), (3, 3)]
    assert bodies == (b"ABBCCC",)


def test_a_submit_said_twice_is_one_job(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()
    assert client.submitted(ticket=1) == handle
    worker.grab()
    worker.grab_nothing()


def test_large_bodies_come_through_in_pieces(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    argument = bytes(range(256)) * 80_000
    handle = client.submitted(argument=argument)
    worker.say(wire.GrabJobs())
    _, (body,) = worker.take_with_bodies(wire.JobAssign)
    assert whole(body) == argument
    worker.complete(handle, argument[::-1])
    assert whole(client.result()[1]) == argument[::-1]


def whole(body: Body) -> bytes:
    return body if isinstance(body, bytes) else b"".join(body)


def test_an_exception_reaches_its_client_with_both_bodies(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f", host="papag", pid=12)
    handle = client.submitted(n_items=5)
    worker.grab()
    worker.say(wire.WorkException(1, handle, "ValueError", "bad", "tb", 2), b"pickle", b"results")
    worker.take(wire.WorkAccepted)
    raised, bodies = client.take_with_bodies(wire.JobException)
    assert (raised.type_name, raised.message, raised.n_items) == ("ValueError", "bad", 2)
    assert (raised.host, raised.pid, raised.attempt) == ("papag", 12, 1)
    assert bodies == (b"pickle", b"results")


def test_a_chunk_may_come_home_in_part(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted(n_items=10)
    assert worker.grab().n_items == 10
    worker.complete(handle, b"abc", n_items=3)
    assert client.take(wire.JobComplete).jobs == [wire.Completed(1, 3, 3)]
    worker.grab_nothing()


# --- order --------------------------------------------------------------------------------------


def test_priorities_hold_across_functions(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f", "g")
    low = client.submitted("f", priority=wire.LOW)
    normal = client.submitted("g")
    high = client.submitted("f", priority=wire.HIGH)
    assert [worker.grab().handle for _ in range(3)] == [high, normal, low]


def test_lanes_take_turns(net: ContractNet) -> None:
    client, neighbour, worker = Client(net), Client(net, 2), Worker(net, "f")
    for _ in range(20):
        client.submitted(lane=1)
    handle = neighbour.submitted()
    assert handle in [worker.grab().handle for _ in range(2)]


def test_a_delayed_job_waits_for_its_time(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    worker.sleep()
    handle = client.submitted(not_before=0.3)
    client.say(wire.GetStatus(1, handle))
    assert not client.take(wire.StatusIs).running
    net.wait_for(lambda: worker.inbox)
    worker.take(wire.Noop)
    assert worker.grab().handle == handle


# --- sleep --------------------------------------------------------------------------------------


def test_a_sleeper_is_woken_and_grabs(net: ContractNet) -> None:
    client, worker, other = Client(net), Worker(net, "f"), Worker(net, "f", number=2)
    worker.sleep()
    other.sleep()
    handle = client.submitted()
    worker.take(wire.Noop)
    assert worker.grab().handle == handle
    other.nothing()


def test_who_would_sleep_through_work_is_woken_at_once(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    client.submitted()
    worker.say(wire.PreSleep())
    worker.take(wire.Noop)


def test_a_woken_worker_that_is_gone_has_another_woken(net: ContractNet) -> None:
    client, dying, other = Client(net), Worker(net, "f"), Worker(net, "f", number=2)
    dying.sleep()
    other.sleep()
    handle = client.submitted()
    dying.take(wire.Noop)
    net.cut(dying)
    net.wait_for(lambda: other.inbox)
    other.take(wire.Noop)
    assert other.grab().handle == handle


def test_a_woken_child_that_is_lost_has_another_woken(net: ContractNet) -> None:
    client, supervisor = Client(net), Supervisor(net)
    child, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    child.sleep()
    other.sleep()
    client.submitted()
    child.take(wire.Noop)
    supervisor.say(wire.ChildLost(1, [], 0, 0, "SIGKILL"))
    other.take(wire.Noop)


def test_a_waiting_grab_is_answered_when_work_comes(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    worker.say(wire.GrabJobs(wait=True))
    worker.nothing()
    handle = client.submitted()
    assert worker.take(wire.JobAssign).jobs[0].handle == handle


# --- merging ------------------------------------------------------------------------------------


def test_equal_requests_share_one_run_also_while_it_runs(net: ContractNet) -> None:
    one, two, late = Client(net), Client(net, 2), Client(net, 3)
    worker = Worker(net, "report", merge=True)
    handle = one.submitted("report", b"first", uniq=b"u")
    assert two.submitted("report", b"second", uniq=b"u") == handle
    worker.say(wire.GrabJobs())
    assert worker.take_with_bodies(wire.JobAssign)[1] == (b"first",)
    worker.say(wire.WorkStatus(handle, 3, 10))
    assert one.take(wire.JobStatus) == two.take(wire.JobStatus) == wire.JobStatus(1, 3, 10)
    assert late.submitted("report", uniq=b"u") == handle
    assert late.take(wire.JobStatus) == wire.JobStatus(1, 3, 10)
    worker.complete(handle, b"r")
    assert [client.result()[1] for client in (one, two, late)] == [b"r"] * 3
    worker.grab_nothing()


def test_nothing_merges_that_neither_function_nor_submit_allows(net: ContractNet) -> None:
    client = Client(net)
    Worker(net, "f")
    assert client.submitted(uniq=b"u") != client.submitted(uniq=b"u")
    assert client.submitted(uniq=b"v", merge=True) == client.submitted(uniq=b"v", merge=True)


def test_a_listener_that_leaves_does_not_hurt_the_others(net: ContractNet) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = one.submitted(uniq=b"u", merge=True)
    two.submitted(uniq=b"u", merge=True)
    one.say(wire.Goodbye())
    assert worker.grab().handle == handle
    worker.complete(handle)
    assert two.result() == (1, b"r")


# --- what a running job says --------------------------------------------------------------------


def test_data_and_warnings_reach_every_listener(net: ContractNet) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = one.submitted(uniq=b"u", merge=True)
    two.submitted(uniq=b"u", merge=True)
    worker.grab()
    worker.say(wire.WorkData(handle), b"part")
    worker.say(wire.WorkWarning(handle), b"careful")
    for client in (one, two):
        assert client.take_with_bodies(wire.JobData)[1] == (b"part",)
        assert client.take_with_bodies(wire.JobWarning)[1] == (b"careful",)


def test_status_tells_ready_from_running_from_ended_from_never(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()

    def status(handle: int) -> tuple[bool, bool, str]:
        client.say(wire.GetStatus(1, handle))
        answer = client.take(wire.StatusIs)
        return answer.known, answer.running, answer.ended

    assert status(handle) == (True, False, "")
    worker.grab()
    assert status(handle) == (True, True, "")
    worker.complete(handle)
    client.result()
    assert status(handle) == (True, False, "complete")
    assert status(handle + 1) == (False, False, "")


# --- lost, given back, cancelled ----------------------------------------------------------------


def test_a_goodbye_gives_back_what_the_worker_had(net: ContractNet) -> None:
    client, worker, other = Client(net), Worker(net, "f"), Worker(net, "f", number=2)
    handle = client.submitted()
    worker.grab()
    worker.say(wire.Goodbye())
    again = other.grab()
    assert (again.handle, again.attempt) == (handle, 1)


def test_a_lost_childs_job_goes_to_another_in_front(net: ContractNet) -> None:
    client, supervisor = Client(net), Supervisor(net)
    dying, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    first = client.submitted()
    client.submitted()
    dying.grab()
    supervisor.say(wire.ChildLost(1, [first], 0, 1, "SIGKILL"))
    again = other.grab()
    assert (again.handle, again.attempt) == (first, 2)


def test_a_job_that_kills_worker_after_worker_fails_by_name(net: ContractNet) -> None:
    client, supervisor = Client(net), Supervisor(net, host="papag")
    handle = client.submitted(attempts=2)
    for child in (1, 2):
        Worker(net, "f", child=child, host="papag").grab()
        supervisor.say(wire.ChildLost(child, [handle], 0, 1, "SIGSEGV"))
    fail = client.take(wire.JobFail)
    assert (fail.code, fail.attempt, fail.exit, fail.host) == ("lost", 2, "SIGSEGV", "papag")


def test_a_lone_worker_whose_link_is_gone_is_lost(net: ContractNet) -> None:
    client, dying, other = Client(net), Worker(net, "f"), Worker(net, "f", number=2)
    handle = client.submitted()
    dying.grab()
    other.sleep()
    net.cut(dying)
    net.wait_for(lambda: other.inbox)
    other.take(wire.Noop)
    again = other.grab()
    assert (again.handle, again.attempt) == (handle, 2)


def test_what_a_supervisor_gives_back_is_no_attempt(net: ContractNet) -> None:
    client, supervisor = Client(net), Supervisor(net)
    busy, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    handles = [client.submitted() for _ in range(3)]
    for _ in range(3):
        busy.grab()
    supervisor.say(wire.GiveBack(handles[1:]))
    jobs = [other.grab() for _ in range(2)]
    assert [(job.handle, job.attempt) for job in jobs] == [(handle, 1) for handle in handles[1:]]


def test_a_cancelled_ready_job_is_dropped(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    client.submitted()
    client.say(wire.CancelJobs([wire.Range(1, 1)]))
    assert client.take(wire.JobFail) == wire.JobFail(1, "cancelled")
    worker.grab_nothing()


def test_a_cancel_reaches_a_running_job_through_its_supervisor(net: ContractNet) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker = Worker(net, "f", child=3)
    handle = client.submitted()
    worker.grab()
    client.say(wire.CancelJobs([wire.Range(1, 1)]))
    assert client.take(wire.JobFail).code == "cancelled"
    assert supervisor.take(wire.CancelJob) == wire.CancelJob(3, handle)
    supervisor.say(wire.WorkFail(0, handle, "cancelled"))
    client.nothing()


def test_a_cancel_by_handle_ends_the_job_for_all(net: ContractNet) -> None:
    one, two, admin = Client(net), Client(net, 2), Client(net, 3)
    handle = one.submitted(uniq=b"u", merge=True)
    two.submitted(uniq=b"u", merge=True)
    admin.say(wire.CancelHandle(1, handle))
    assert admin.take(wire.StatusIs).ended == "cancelled"
    assert one.take(wire.JobFail).code == two.take(wire.JobFail).code == "cancelled"


# --- background, blobs --------------------------------------------------------------------------


def test_a_background_job_outlives_its_client_and_is_attached_to(net: ContractNet) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = one.submitted(background=True)
    one.say(wire.Goodbye())
    assert worker.grab().handle == handle
    two.say(wire.Attach(9, handle))
    assert two.take(wire.JobsAccepted).jobs == [wire.Accepted(9, 1, handle)]
    worker.complete(handle, b"r")
    assert two.result() == (9, b"r")
    two.say(wire.Attach(10, handle))
    assert two.result() == (10, b"r")


def test_attach_to_what_never_was_fails(net: ContractNet) -> None:
    client = Client(net)
    client.say(wire.Attach(9, 2**40))
    fail = client.take(wire.JobFail)
    assert (fail.ticket, fail.code) == (9, "unknown")


def test_a_job_names_blobs_and_its_worker_fetches_them(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    body = b"closure" * 1000
    blob = hashlib.sha256(body).digest()
    client.submit(blobs=(blob,))
    refused = client.take(wire.JobsRefused)
    assert (refused.code, refused.blobs) == ("blobs", (blob,))
    client.say(wire.PutBlob(blob), body)
    assert client.take(wire.BlobTaken) == wire.BlobTaken(blob)
    client.submitted(blobs=(blob,))
    assert worker.grab().blobs == (blob,)
    worker.say(wire.FetchBlob(blob))
    assert worker.take_with_bodies(wire.Blob) == (wire.Blob(blob, True), (body,))


# --- links that break ---------------------------------------------------------------------------


def test_a_session_that_comes_back_is_resumed_and_told_what_it_missed(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle, other = client.submitted(), client.submitted()
    worker.grab()
    net.cut(client)
    worker.complete(handle, b"missed")
    client.reconnect()
    assert client.take(wire.Welcome).resumed
    assert client.result() == (1, b"missed")
    assert client.submitted(ticket=2) == other
    assert worker.grab().handle == other


def test_a_result_that_was_taken_is_not_said_again(net: ContractNet) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()
    worker.grab()
    worker.complete(handle)
    client.result()
    net.cut(client)
    client.reconnect()
    client.take(wire.Welcome)
    client.nothing()


def test_a_child_that_comes_back_keeps_what_it_holds_and_gives_back_the_rest(
    net: ContractNet,
) -> None:
    client = Client(net)
    Supervisor(net)
    worker, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    held, never_came = client.submitted(), client.submitted()
    worker.grab()
    worker.grab()
    boot = net.boot_of(worker)
    net.cut(worker)
    worker.reconnect(boot=boot, holding=[held])
    worker.take(wire.Welcome)
    assert other.grab().handle == never_came
    worker.complete(held, b"r")
    assert client.result() == (1, b"r")


def test_after_a_restart_a_resubmit_is_given_to_the_run_that_goes_on(net: ContractNet) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    old = client.submitted()
    origin = worker.grab().origin
    boot = net.boot_of(worker)
    net.restart()
    running = wire.Running(1, origin, "f")
    supervisor.reconnect(boot=boot, running=[running])
    supervisor.take(wire.Welcome)
    for lost in (worker, other):
        lost.reconnect(boot=boot)
        lost.take(wire.Welcome)
        lost.say(wire.CanDo([wire.Ability("f")]))
    client.reconnect()
    assert not client.take(wire.Welcome).resumed
    client.submitted(ticket=1, resubmit=True)
    other.grab_nothing()
    worker.complete(old, b"r", boot=boot, origins=[origin])
    assert client.result() == (1, b"r")
