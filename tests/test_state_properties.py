"""Properties of the server's state under any peers, in any lawful or unlawful order.

Nothing raises, ``check()`` holds after every message, no listener hears the end of a job twice,
and once the faults stop and a worker that can do everything comes, every foreground job that is
still wanted ends.
"""

from __future__ import annotations

from collections import Counter

from fake_net import Client, Net, Peer, Supervisor, Worker
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
)

from jobserver import protocol as wire
from jobserver.jobs import Limits

functions = st.sampled_from(["f", "g"])
uniqs = st.sampled_from([b"", b"", b"u", b"v"])
pythons = st.sampled_from(["", "3.11", "3.12"])


class ServerMachine(RuleBasedStateMachine):
    clients = Bundle("clients")
    workers = Bundle("workers")
    supervisors = Bundle("supervisors")

    def __init__(self) -> None:
        super().__init__()
        limits = Limits(session_jobs=12, max_jobs=30, ended_nbytes=40, n_ended=10, ended_ttl=5)
        self.net = Net(limits=limits)
        self.number = 0
        self.all: list[Peer] = []
        self.ends: Counter[tuple[bytes, int]] = Counter()
        self.wanted: dict[tuple[bytes, int], None] = {}
        self.held: dict[Peer, list[wire.Assigned]] = {}

    def _next(self) -> int:
        self.number += 1
        return self.number

    # --- peers come, go and come back ---------------------------------------------------------

    @rule(target=clients)
    def client_comes(self) -> Client:
        client = Client(self.net, self._next())
        self.all.append(client)
        return client

    @rule(target=supervisors)
    def supervisor_comes(self) -> Supervisor:
        supervisor = Supervisor(self.net, self._next())
        self.all.append(supervisor)
        return supervisor

    @rule(target=workers, supervisor=supervisors, abilities=st.sets(functions), python=pythons)
    def child_comes(self, supervisor: Supervisor, abilities: set[str], python: str) -> object:
        if supervisor.id not in self.net.peers:
            return multiple()
        number = int.from_bytes(supervisor.hello.session[4:], "big")
        worker = Worker(
            self.net, *sorted(abilities), number=number, child=self._next(), python=python
        )
        self.all.append(worker)
        return worker

    @rule(target=workers, abilities=st.sets(functions, min_size=1), merge=st.booleans())
    def lone_worker_comes(self, abilities: set[str], merge: bool) -> Worker:
        worker = Worker(self.net, *sorted(abilities), number=self._next(), merge=merge)
        self.all.append(worker)
        return worker

    @rule(peer=st.one_of(clients, workers, supervisors), noticed=st.booleans())
    def link_breaks(self, peer: Peer, noticed: bool) -> None:
        if peer.id in self.net.peers:
            peer.cut(noticed=noticed)
            peer.inbox.clear()

    @rule(peer=st.one_of(clients, workers, supervisors), keeps=st.booleans())
    def peer_comes_back(self, peer: Peer, keeps: bool) -> None:
        if peer.id in self.net.peers:
            return
        self._settle()
        held = self.held.get(peer, []) if keeps else []
        peer.reconnect(boot="b1", holding=[job.handle for job in held])
        self.held[peer] = held
        if isinstance(peer, Client):
            # What the server no longer knows is submitted again, as a client would.
            welcome = next(m for m, _ in peer.inbox if isinstance(m, wire.Welcome))
            if not welcome.resumed:
                for session, ticket in self.wanted:
                    if session == peer.session:
                        peer.say(wire.SubmitJobs("f", [wire.JobSpec(ticket, 1)]), b"x")

    @rule(peer=workers)
    def worker_says_goodbye(self, peer: Worker) -> None:
        if peer.id in self.net.peers:
            peer.say(wire.Goodbye())
            self.held.pop(peer, None)
            del self.net.peers[peer.id]

    # --- lawful work --------------------------------------------------------------------------

    @rule(
        client=clients,
        function=functions,
        uniq=uniqs,
        python=pythons,
        priority=st.integers(0, 2),
        lane=st.integers(0, 2),
        background=st.booleans(),
        not_before=st.sampled_from([0.0, 0.0, 2.0]),
        attempts=st.integers(1, 3),
        resubmit=st.booleans(),
        merge=st.booleans(),
    )
    def submit(self, client: Client, function: str, uniq: bytes, **terms: object) -> None:
        if client.id not in self.net.peers:
            return
        ticket = client.submit(function, uniq=uniq, **terms)
        refused = any(isinstance(m, wire.JobsRefused) for m, _ in client.inbox)
        if not terms["background"] and not refused:
            self.wanted[client.session, ticket] = None

    @rule(worker=workers, wait=st.booleans(), n=st.integers(1, 3))
    def grab(self, worker: Worker, wait: bool, n: int) -> None:
        if worker.id in self.net.peers:
            worker.say(wire.GrabJobs(n, wait=wait))

    @rule(worker=workers)
    def pre_sleep(self, worker: Worker) -> None:
        if worker.id in self.net.peers:
            worker.say(wire.PreSleep())

    @rule(worker=workers, fast=st.booleans(), index=st.integers(0, 3))
    def complete(self, worker: Worker, fast: bool, index: int) -> None:
        job = self._pop(worker, index)
        if job is not None:
            worker.say(wire.WorkStatus(job.handle, 1, 2))
            done = wire.WorkDone(job.handle, 1)
            seconds = 0.0001 if fast else 1.0
            worker.say(wire.WorkComplete(1, [done], seconds), b"r")

    @rule(worker=workers, index=st.integers(0, 3), code=st.sampled_from(["fail", "raise", "back"]))
    def end_otherwise(self, worker: Worker, index: int, code: str) -> None:
        job = self._pop(worker, index)
        if job is None:
            return
        if code == "fail":
            worker.say(wire.WorkFail(1, job.handle, "failed", "why"))
        elif code == "raise":
            worker.say(wire.WorkException(1, job.handle, "E", "m", "t"), b"p", b"")
        else:
            worker.say(wire.GiveBack([job.handle]))

    @rule(supervisor=supervisors, data=st.data())
    def child_is_lost(self, supervisor: Supervisor, data: st.DataObject) -> None:
        if supervisor.id not in self.net.peers:
            return
        known = self.net.state.roster.supervisors.get(supervisor.hello.session)
        children = list(known.workers) if known else []
        if children:
            child = data.draw(st.sampled_from(children))
            handles = list(known.workers[child].held)  # type: ignore[union-attr]
            running = data.draw(st.lists(st.sampled_from(handles), max_size=2)) if handles else []
            supervisor.say(wire.ChildLost(child, running, 0, 1, "SIGKILL"))

    @rule(worker=workers, functions=st.lists(functions, max_size=2), can=st.booleans())
    def abilities_change(self, worker: Worker, functions: list[str], can: bool) -> None:
        if worker.id in self.net.peers:
            if can:
                worker.can_do(*functions)
            else:
                worker.say(wire.CantDo(functions))

    @rule(client=clients, first=st.integers(1, 10), n=st.integers(1, 5))
    def cancel(self, client: Client, first: int, n: int) -> None:
        if client.id in self.net.peers:
            client.say(wire.CancelJobs([wire.Range(first, n)]))

    @rule(client=clients, handle=st.integers(0, 30))
    def ask(self, client: Client, handle: int) -> None:
        if client.id in self.net.peers:
            client.say(wire.GetStatus(1, handle))
            client.say(wire.Attach(next(client.tickets), handle))
            client.say(wire.CancelHandle(2, handle + 20))

    # --- unlawful work --------------------------------------------------------------------------

    @rule(
        peer=st.one_of(clients, workers, supervisors),
        handle=st.integers(0, 40),
        which=st.integers(0, 9),
    )
    def nonsense(self, peer: Peer, handle: int, which: int) -> None:
        if peer.id not in self.net.peers:
            return
        done = wire.WorkDone(handle, 1)
        origin = wire.Origin(b"nobody" + bytes(10), handle)
        messages = [
            wire.WorkComplete(1, [done]),
            wire.WorkComplete(1, [done, done], boot="b0", origins=[origin]),
            wire.WorkComplete(1, [done], boot="b0", origins=[origin]),
            wire.WorkFail(1, handle, "timeout"),
            wire.GiveBack([handle, handle]),
            wire.ChildLost(handle, [handle], 5, 5, "x"),
            wire.ResultsTaken([wire.Range(0, 2**40)]),
            wire.SubmitJobs("f", [wire.JobSpec(handle, 7)]),
            wire.Hello(1, 0, "worker", b"stranger" + bytes(8), child=handle),
            wire.Awake(),
        ]
        peer.say(messages[which], b"r")

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.5, 1.5, 12.0, 25.0]))
    def time_passes(self, seconds: float) -> None:
        self.net.tick(seconds)

    # --- what is heard --------------------------------------------------------------------------

    @invariant()
    def nobody_hears_an_end_twice(self) -> None:
        self._settle()
        assert all(n <= 1 for n in self.ends.values()), self.ends

    def _settle(self) -> None:
        """Let every peer read its inbox."""
        for peer in self.all:
            while peer.inbox:
                message, _ = peer.inbox.pop(0)
                if isinstance(message, wire.JobAssign):
                    self.held.setdefault(peer, []).extend(message.jobs)
                elif isinstance(message, wire.JobComplete):
                    for done in message.jobs:
                        self._ended(peer, done.ticket)
                elif isinstance(message, wire.JobException | wire.JobFail):
                    self._ended(peer, message.ticket)
                elif isinstance(message, wire.JobsRefused):
                    for first, n in message.tickets:
                        for ticket in range(first, first + n):
                            self.wanted.pop((peer.hello.session, ticket), None)

    def _ended(self, peer: Peer, ticket: int) -> None:
        self.ends[peer.hello.session, ticket] += 1
        self.wanted.pop((peer.hello.session, ticket), None)
        if peer.id in self.net.peers:
            peer.say(wire.ResultsTaken([wire.Range(ticket, 1)]))

    def _pop(self, worker: Worker, index: int) -> wire.Assigned | None:
        self._settle()
        held = self.held.get(worker, [])
        if worker.id not in self.net.peers or index >= len(held):
            return None
        return held.pop(index)

    def teardown(self) -> None:
        """Once faults stop and a worker for everything comes, whatever is wanted ends."""
        net = self.net
        for peer in self.all:
            if not isinstance(peer, Client) and peer.id in net.peers:
                peer.say(wire.Goodbye())
                del net.peers[peer.id]
            elif isinstance(peer, Client) and peer.id not in net.peers:
                self.peer_comes_back(peer, True)
        net.tick(30)
        self._settle()
        for python in ("3.11", "3.12"):
            worker = Worker(net, "f", "g", number=self._next(), python=python)
            self.all.append(worker)
            for _ in range(200):
                worker.say(wire.GrabJobs())
                self._settle()
                while (job := self._pop(worker, 0)) is not None:
                    worker.say(wire.WorkComplete(1, [wire.WorkDone(job.handle, 1)]), b"r")
                worker.say(wire.Heartbeat())
        self._settle()
        connected = {peer.hello.session for peer in self.all if peer.id in net.peers}
        left = [key for key in self.wanted if key[0] in connected]
        assert not left, f"{left} never ended"
        assert all(n <= 1 for n in self.ends.values()), self.ends
        net.state.check()
        assert not net.state.book.jobs


ServerMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=60,
    suppress_health_check=list(HealthCheck),
)
TestServer = ServerMachine.TestCase
