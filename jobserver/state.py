"""What a job server thinks: a message and the time in, a list of sends out.

No socket, clock, thread or log in here; ``server`` owns those. A peer is a routing id, and what it
may say hangs on the role that its Hello gave it. The life of a job::

      submit            grab                 complete / exception / fail
    ---------> READY ---------> ASSIGNED ---------------------------------> gone (end remembered)
      |          ^                 |
      v          '-----------------'   lost (an attempt) or given back (none);
    DELAYED                            after `attempts` losses it fails, by name

Three rules carry the weight:

* Nobody sleeps through work (``crew``). Whatever makes a job ready or changes who is awake
  ends in ``_wake``.
* A job is lost only by its supervisor's word, or when the supervisor has been silent or away past
  its time. A worker's broken link alone loses nothing; when it says Hello again, what it does not
  hold has never reached it and goes back in front.
* An end is kept for each listener until the listener has taken it. A link that breaks in between
  costs a repeat and nothing else.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from typing import assert_never, cast

import msgspec

from jobserver import protocol as wire
from jobserver.blobs import BlobRefused
from jobserver.book import Book
from jobserver.crew import Crew
from jobserver.jobs import (
    ASSIGNED,
    DELAYED,
    READY,
    Function,
    Job,
    JobEnd,
    LaneInfo,
    Limits,
    Peer,
    Send,
    Session,
    Supervisor,
    Told,
    Untaken,
    Worker,
)
from jobserver.protocol import Body, Message, Origin
from jobserver.queues import Queue, needs_of
from jobserver.roster import Roster
from jobserver.status import show

__all__ = ["Limits", "Send", "State"]

_SHORT = 0.005
"""Jobs known to be short are assigned together up to this many seconds of work."""

_MAX_ASSIGNED = 512


class State:
    """One job server."""

    def __init__(
        self, name: str, boot: str, *, limits: Limits | None = None, machine: str = ""
    ) -> None:
        self.name = name
        self.boot = boot
        self.machine = machine
        self.limits = limits or Limits()
        self.crew = Crew()
        self.book = Book(self.crew, self.limits)
        self.roster = Roster(self.crew, self.book.sessions, self.limits)
        self.draining = False
        self.counters: dict[str, int] = {"late": 0, "merged": 0, "lost": 0, "malformed": 0}
        # What supervisors said runs since before our boot, until its client asks for it again.
        self._adoptable: dict[Origin, tuple[Supervisor, int]] = {}
        self._adoptable_uniq: dict[tuple[str, bytes], Origin] = {}  # (function, uniq) -> origin
        self._out: list[Send] = []
        self._next_heartbeat: float | None = None
        self._delayed: list[tuple[float, int]] = []  # heap of (when, handle)
        self._woken: deque[tuple[float, Worker]] = deque()  # (woken at, worker), oldest first

    # --- the pure interface -----------------------------------------------------------------

    @property
    def drained(self) -> bool:
        """Tell whether a draining server may leave: all is done, and taken by who is there."""
        sessions = self.book.sessions.values()
        waits = any(session.untaken and session.peer for session in sessions)
        return self.draining and not self.book.jobs and not waits

    @property
    def heartbeat_interval(self) -> float:
        """Return the seconds between heartbeats: stretched when peers are many."""
        n_peers = len(self.book.sessions) + len(self.roster.supervisors)
        return max(self.limits.heartbeat, n_peers / 2000)

    def on_message(
        self, peer: bytes, message: Message, bodies: tuple[Body, ...], now: float
    ) -> list[Send]:
        """Take in a message of a peer. Cost: O(entries of its list), or O(abilities)."""
        try:
            if type(message) is wire.Hello:
                self._on_hello(peer, message, now)
            elif (who := self.roster.peers.get(peer)) is None:
                raise wire.Malformed("hello_first", "say Hello first: I do not know you")
            else:
                self._on_message_of(who, message, bodies, now)
        except wire.Malformed as error:
            self._refuse(peer, error)
        return self._flush()

    def on_malformed(self, peer: bytes, error: wire.Malformed, now: float) -> list[Send]:
        """Answer what was no message at all."""
        self._refuse(peer, error)
        return self._flush()

    def on_gone(self, peer: bytes, now: float) -> list[Send]:
        """Note that a peer's link is gone. Its jobs and workers live on for a while."""
        self._unlink(peer, now)
        return self._flush()

    def on_undelivered(self, peer: bytes, message: Message, now: float) -> list[Send]:
        """Note that this message, just returned to be sent, met a link that is gone."""
        if isinstance(message, wire.JobAssign):
            who = self.roster.peers.get(peer)
            if isinstance(who, Worker):
                for entry in reversed(message.jobs):
                    self._give_back(who, entry.handle, now)
        self._unlink(peer, now)
        return self._flush()

    def on_tick(self, now: float) -> list[Send]:
        """Do what is due. Call it when ``next_deadline`` has come; at any time it is harmless."""
        while self._delayed and self._delayed[0][0] <= now:
            _, handle = heapq.heappop(self._delayed)
            job = self.book.jobs.get(handle)
            if job is not None and job.state == DELAYED:
                self._make_ready(job, now, front=False)
        while self._woken and self._woken[0][0] + self.limits.woken_ttl <= now:
            woken_at, worker = self._woken.popleft()
            if worker.sleep == "woken" and worker.since == woken_at:
                self.crew.set_sleep(worker, "overdue", now)
                self._wake_all(worker.queues, now)
        for who in self.roster.due(now):
            if isinstance(who, Session):
                self._end_session(who, now)
            else:
                self._end_supervisor(who, now, word=False)
        if self._next_heartbeat is not None and self._next_heartbeat <= now:
            self._beat(now)
        return self._flush()

    def next_deadline(self) -> float | None:
        """Return when ``on_tick`` has something to do, or None."""
        first = self._next_heartbeat
        due = self.roster.next_due()
        if first is None or (due is not None and due < first):
            first = due
        if self._delayed and (first is None or self._delayed[0][0] < first):
            first = self._delayed[0][0]
        if self._woken:
            overdue = self._woken[0][0] + self.limits.woken_ttl
            if first is None or overdue < first:
                first = overdue
        return first

    def takes_together(self, peer: bytes) -> bool:
        """Tell whether a peer understands several messages in one."""
        who = self.roster.peers.get(peer)
        return who is not None and who.together

    def drain(self, now: float) -> list[Send]:
        """Take nothing new and finish what is assigned, and background jobs that are ready.

        Foreground jobs that are ready go back to their clients, who have other servers. Delayed
        jobs and jobs that no worker can do go too: this server's memory is all that held them.
        """
        self.draining = True
        for peer, who in self.roster.peers.items():
            if not isinstance(who, Supervisor):
                self._send(peer, wire.Draining())
        refused: dict[Session, list[int]] = {}
        for job in list(self.book.jobs.values()):
            if job.state == ASSIGNED or (
                job.state == READY and job.background and job.queue.workers
            ):
                continue
            for session, ticket in job.listeners:
                refused.setdefault(session, []).append(ticket)
            self.book.forget(job)
        for session, tickets in refused.items():
            self._to_session(session, _refusal(sorted(tickets), "draining", "I am leaving"))
        return self._flush()

    # --- sends ------------------------------------------------------------------------------

    def _send(self, peer: bytes | None, message: Message, *bodies: Body) -> None:
        if peer is not None:
            self._out.append(Send(peer, message, bodies))

    def _to_session(self, session: Session, message: Message, *bodies: Body) -> None:
        self._send(session.peer, message, *bodies)

    def _tell(self, told: Iterable[Told]) -> None:
        for session, ticket, untaken in told:
            if session.peer is not None:
                self._out.append(Send(session.peer, untaken.told(ticket), untaken.bodies))

    def _flush(self) -> list[Send]:
        out, self._out = self._out, []
        return out

    def _refuse(self, peer: bytes, error: wire.Malformed) -> None:
        self.counters["malformed"] += 1
        self._send(peer, wire.Error(error.code, str(error)))

    # --- dispatch ---------------------------------------------------------------------------

    def _on_message_of(
        self, who: Peer, message: Message, bodies: tuple[Body, ...], now: float
    ) -> None:
        self.roster.heard(who, now)
        if type(message) in wire.ANY_ROLE:
            if isinstance(message, wire.Goodbye):
                self._on_goodbye(who, now)
            return
        match who:
            case Session():
                self._require_role(message, "client")
                self._on_client(who, cast(wire.FromClient, message), bodies, now)
            case Worker():
                self._require_role(message, "worker")
                self._on_worker(who, cast(wire.FromWorker, message), bodies, now)
            case Supervisor():
                self._require_role(message, "supervisor")
                self._on_supervisor(who, cast(wire.FromSupervisor, message), bodies, now)
            case _:
                assert_never(who)

    @staticmethod
    def _require_role(message: Message, role: wire.Role) -> None:
        if type(message) not in wire.FROM[role]:
            raise wire.Malformed("role", f"a {role} does not say {type(message).__name__}")

    def _on_client(
        self, session: Session, message: wire.FromClient, bodies: tuple[Body, ...], now: float
    ) -> None:
        match message:
            case wire.SubmitJobs():
                self._on_submit_jobs(session, message, _one(bodies), now)
            case wire.ResultsTaken():
                for first, n in message.tickets:
                    self.book.taken(session, first, n)
                self._say_taken()
            case wire.CancelJobs():
                self._on_cancel_jobs(session, message, now)
            case wire.PutBlob():
                self._on_put_blob(session, message, _one(bodies))
            case wire.OpenLane():
                if len(session.lanes) >= self.limits.n_lanes:
                    raise wire.Malformed("limit", "too many open lanes")
                session.lanes[message.lane] = LaneInfo(message.description, message.total)
            case wire.CloseLane():
                session.lanes.pop(message.lane, None)
            case wire.Attach():
                self._on_attach(session, message, now)
            case wire.GetStatus():
                self._on_get_status(session, message)
            case wire.CancelHandle():
                self._on_cancel_handle(session, message, now)
            case wire.CountWorkers():
                self._on_count_workers(session, message)
            case wire.Show():
                rows = msgspec.msgpack.encode(show(self, message.what, now))
                self._to_session(session, wire.Shown(message.request), rows)
            case _:
                assert_never(message)

    def _on_worker(
        self, worker: Worker, message: wire.FromWorker, bodies: tuple[Body, ...], now: float
    ) -> None:
        match message:
            case wire.GrabJobs():
                self._on_grab_jobs(worker, message, now)
            case wire.WorkComplete():
                self._on_work_complete(worker, message, _one(bodies), now)
            case wire.PreSleep():
                self._on_pre_sleep(worker, now)
            case wire.Awake():
                self._rise(worker, now)
            case wire.WorkException():
                self._on_work_exception(worker, message, bodies, now)
            case wire.WorkFail():
                job = self._job_of(worker, message.handle, message.boot, message.origin)
                self._fail_work(job, message, now)
                self._accept_work(worker, message.seq)
            case wire.CannotOpen():
                job = worker.held.get(message.handle)
                if job is None:
                    self.counters["late"] += 1
                else:
                    self._refuse_referred(job, f"{worker.name}: {message.text}", now)
            case wire.WorkStatus() | wire.WorkData() | wire.WorkWarning():
                self._on_news(worker.held.get(message.handle), message, bodies)
            case wire.GiveBack():
                for handle in reversed(message.handles):
                    self._give_back(worker, handle, now)
            case wire.FetchBlob():
                self._on_fetch_blob(worker.peer, message)
            case wire.CanDo():
                if len(worker.abilities) + len(message.abilities) > self.limits.abilities:
                    raise wire.Malformed("limit", "too many abilities")
                self._on_can_do(worker, message, now)
            case wire.CantDo():
                self._wake_all(self.crew.cant_do(worker, message.functions), now)
            case wire.ResetAbilities():
                self._wake_all(self.crew.cant_do(worker, list(worker.abilities)), now)
            case _:
                assert_never(message)

    def _on_supervisor(
        self,
        supervisor: Supervisor,
        message: wire.FromSupervisor,
        bodies: tuple[Body, ...],
        now: float,
    ) -> None:
        match message:
            case wire.ChildLost():
                supervisor.ended.append(message.child)
                self._forget_adoptable(supervisor, message.child)
                worker = supervisor.workers.get(message.child)
                if worker is not None:
                    self._lose_worker(worker, message, now)
            case wire.GiveBack():
                for handle in reversed(message.handles):
                    job = self._held_under(supervisor, handle)
                    if job is not None and job.worker is not None:
                        self._give_back(job.worker, handle, now)
            case wire.FetchBlob():
                self._on_fetch_blob(supervisor.peer, message)
            case wire.WorkFail():
                self._fail_work(self._held_under(supervisor, message.handle), message, now)
            case wire.WorkData() | wire.WorkWarning():
                self._on_news(self._held_under(supervisor, message.handle), message, bodies)
            case _:
                assert_never(message)

    # --- Hello and goodbye ------------------------------------------------------------------

    def _on_hello(self, peer: bytes, hello: wire.Hello, now: float) -> None:
        if hello.major != wire.MAJOR:
            text = f"I speak protocol {wire.MAJOR}.{wire.MINOR}, not {hello.major}.{hello.minor}"
            raise wire.Malformed("version", text)
        who, known = self.roster.link(peer, hello, now)
        if self._next_heartbeat is None:
            self._next_heartbeat = now + self.heartbeat_interval
        welcome = wire.Welcome(
            wire.MAJOR,
            wire.MINOR,
            self.name,
            self.boot,
            known,
            self.heartbeat_interval,
            self.limits.session_jobs,
            self.limits.session_nbytes,
            self.machine,
        )
        self._send(peer, welcome)
        match who:
            case Session():
                self._tell((who, ticket, untaken) for ticket, untaken in who.untaken.items())
            case Supervisor():
                self._after_hello_of_supervisor(who, hello)
            case Worker():
                self._after_hello_of_worker(who, hello, now)
            case _:
                assert_never(who)
        if self.draining:
            self._send(peer, wire.Draining())

    def _after_hello_of_supervisor(self, supervisor: Supervisor, hello: wire.Hello) -> None:
        for running in hello.running if hello.boot != self.boot else ():
            worker = supervisor.workers.get(running.child)
            held = () if worker is None else worker.held.values()
            if any(job.origin == running.origin for job in held):
                continue  # its child was here before it, and got this from us
            self._adoptable[running.origin] = (supervisor, running.child)
            if running.uniq:
                self._adoptable_uniq[running.function, running.uniq] = running.origin
        # It may have missed what it was to stop while it was away.
        for worker in supervisor.workers.values():
            for job in worker.held.values():
                if job.unwanted:
                    self._send(supervisor.peer, wire.CancelJob(worker.child, job.handle))

    def _after_hello_of_worker(self, worker: Worker, hello: wire.Hello, now: float) -> None:
        labels = frozenset(hello.labels)
        if (worker.python, worker.labels) != (hello.python, labels):
            # Which queues it fits hangs on these, so they may change only while it can do nothing.
            self._wake_all(self.crew.cant_do(worker, list(worker.abilities)), now)
            worker.python, worker.labels = hello.python, labels
        self._rise(worker, now)
        holding = worker.adopted.union(hello.holding if hello.boot == self.boot else ())
        for handle in [handle for handle in reversed(worker.held) if handle not in holding]:
            self._give_back(worker, handle, now)

    def _on_goodbye(self, who: Peer, now: float) -> None:
        match who:
            case Session():
                self._end_session(who, now)
            case Supervisor():
                self._end_supervisor(who, now, word=True)
            case Worker():
                if who.supervisor.peer == who.peer:
                    self._end_supervisor(who.supervisor, now, word=True)
                else:
                    self._lose_worker(who, wire.ChildLost(who.child, [], 0, 0, "left"), now)
            case _:
                assert_never(who)

    def _unlink(self, peer: bytes, now: float) -> None:
        who = self.roster.unlink(peer, now)
        if isinstance(who, Worker):
            self._rise(who, now)

    def _end_session(self, session: Session, now: float) -> None:
        for ticket, job in list(session.tickets.items()):
            if not self.book.leave(job, session, ticket):
                self._drop(job, now)
        self.book.forget_untaken(session)
        self._say_taken()
        self.roster.forget(session)

    def _end_supervisor(self, supervisor: Supervisor, now: float, *, word: bool) -> None:
        """Forget a supervisor and its workers: by its own word, or because it is lost."""
        for worker in list(supervisor.workers.values()):
            running = [] if word else list(worker.held)[:1]
            exit = "left" if word else f"silence of its host {supervisor.host}"
            if not word:
                # It may live, and would wait here for a noop or a job that never comes.
                again = "your supervisor was lost, and you with it: say Hello"
                self._send(worker.peer, wire.Error("hello_first", again))
            self._lose_worker(worker, wire.ChildLost(worker.child, running, 0, 0, exit), now)
        self.roster.forget(supervisor)
        self._forget_adoptable(supervisor)

    def _beat(self, now: float) -> None:
        interval = self.heartbeat_interval
        heartbeat = wire.Heartbeat(interval)
        for session in self.book.sessions.values():
            self._send(session.peer, heartbeat)
        for supervisor in self.roster.supervisors.values():
            self._send(supervisor.peer, heartbeat)
        self.book.endings.forget_before(now - self.limits.ended_ttl)
        busy = self.book.sessions or self.roster.supervisors or len(self.book.endings)
        self._next_heartbeat = now + interval if busy else None

    # --- submits ----------------------------------------------------------------------------

    def _on_submit_jobs(
        self, session: Session, message: wire.SubmitJobs, body: Body, now: float
    ) -> None:
        specs = message.jobs
        arguments = wire.split(body, [spec.nbytes for spec in specs])
        missing = self.book.blobs.missing(message.blobs)
        if missing or self.draining:
            tickets = [spec.ticket for spec in specs]
            if missing:
                refusal = _refusal(tickets, "blobs", "I do not have these blobs", tuple(missing))
            else:
                refusal = _refusal(tickets, "draining", "I am leaving")
            self._to_session(session, refusal)
            return
        queue = self.crew.require_queue(message.function, needs_of(message.python, message.labels))
        function = queue.function
        may_merge = message.merge or function.merge
        around: set[Origin] = set()
        if may_merge and message.ancestors:
            around = self.book.all_around(message.ancestors)
        message.jobs = []  # from here on it is the terms that its jobs share
        lane = session.require_lane_id(message.lane)
        accepted: list[wire.Accepted] = []
        refused: list[int] = []
        told: list[Told] = []
        progress: list[wire.JobStatus] = []
        tickets = [spec.ticket for spec in specs]
        if (
            len(tickets) > 1
            and not (message.not_before or self._adoptable or (may_merge and message.resubmit))
            and not self.book.knows_any(session, tickets)
            and not (may_merge and self.book.joins_any(function, [spec.uniq for spec in specs]))
            and self.book.has_room(session, wire.nbytes_of(body), len(specs))
        ):
            # All are new and alike, which is by far the most common.
            jobs = self.book.create_all(session, queue, message, lane, specs, arguments, now)
            self.book.stand_all(jobs)
            handle = jobs[0].handle
            for first, n in wire.ranges(tickets):
                accepted.append(wire.Accepted(first, n, handle))
                handle += n
            specs = []
            arguments = []
        for spec, argument in zip(specs, arguments, strict=True):
            ticket = spec.ticket
            if ticket in session.tickets:
                handle = session.tickets[ticket].handle
            elif ticket in session.accepted:
                handle = session.accepted[ticket]
            elif ticket in session.untaken:
                told.append((session, ticket, session.untaken[ticket]))
                continue
            else:
                live = function.merged.get(spec.uniq) if may_merge and spec.uniq else None
                if live is not None and around and live.origin in around:
                    live = None  # who waits inside a job for that same job waits for ever
                elif live is None and message.resubmit and may_merge and spec.uniq:
                    end = self.book.endings.result_of(message.function, spec.uniq)
                    if end is not None:
                        told.append(self.book.keep(session, ticket, end))
                        continue
                if live is not None:
                    self.book.join(live, session, message, ticket)
                    self.counters["merged"] += 1
                    if live.progress is not None:
                        progress.append(wire.JobStatus(ticket, *live.progress))
                    handle = live.handle
                elif self.book.has_room(session, spec.nbytes):
                    job = self.book.create(session, queue, message, lane, spec, argument, now)
                    self._start(job, now)
                    handle = job.handle
                else:
                    refused.append(ticket)
                    continue
            last = accepted[-1] if accepted else None
            if last and last.ticket + last.n == ticket and last.handle + last.n == handle:
                last.n += 1
            else:
                accepted.append(wire.Accepted(ticket, 1, handle))
        if accepted and session.peer is not None:
            answer = wire.JobsAccepted(accepted, len(queue.workers))
            # Who submits in the background waits for it.
            self._out.append(Send(session.peer, answer, patient=not message.background))
        if refused:
            n_jobs, nbytes = len(self.book.jobs), self.book.nbytes
            text = f"I have {n_jobs} jobs and {nbytes} bytes, and take no more of yours now"
            self._to_session(session, _refusal(refused, "busy", text))
        for status in progress:
            self._to_session(session, status)
        self._tell(told)
        self._wake(queue, now)

    def _start(self, job: Job, now: float) -> None:
        """Let a new job stand, wait for its time, or be what a worker has been running already."""
        worker = self._adopter(job) if self._adoptable else None
        if worker is not None:
            self.book.assign([job], worker)
            worker.adopted.add(job.handle)
        elif job.terms.not_before > 0:
            job.state = DELAYED
            heapq.heappush(self._delayed, (now + job.terms.not_before, job.handle))
        else:
            self.book.stand(job, front=False)

    def _adopter(self, job: Job) -> Worker | None:
        """Find the worker that has been running this job since before our boot."""
        origin = job.origin
        if origin not in self._adoptable and job.offered:
            origin = self._adoptable_uniq.pop((job.name, job.offered), origin)
        found = self._adoptable.pop(origin, None)
        if found is None:
            return None
        supervisor, child = found
        job.earlier = origin
        return self.roster.require_worker(supervisor, child, supervisor.heard_at)

    def _make_ready(self, job: Job, now: float, *, front: bool) -> None:
        self.book.stand(job, front=front)
        self._wake(job.queue, now)

    # --- what else clients say --------------------------------------------------------------

    def _on_put_blob(self, session: Session, message: wire.PutBlob, body: Body) -> None:
        try:
            self.book.blobs.put(message.blob, body)
        except BlobRefused as error:
            self._to_session(session, wire.BlobTaken(message.blob, str(error)))
        else:
            self._to_session(session, wire.BlobTaken(message.blob))

    def _on_fetch_blob(self, peer: bytes | None, message: wire.FetchBlob) -> None:
        body = self.book.blobs.get(message.blob)
        if message.named and isinstance(body, wire.SharedBody):
            self._send(peer, wire.Blob(message.blob, known=True, memory=body.memory))
            return
        answer = wire.Blob(message.blob, known=body is not None)
        self._send(peer, answer, *([] if body is None else [body]))

    def _on_cancel_jobs(self, session: Session, message: wire.CancelJobs, now: float) -> None:
        for first, n in message.tickets:
            tickets: Iterable[int] = range(first, first + n)
            if n > len(session.tickets):
                tickets = [ticket for ticket in session.tickets if ticket in tickets]
            for ticket in tickets:
                job = session.tickets.get(ticket)
                if job is None:
                    continue
                if not self.book.leave(job, session, ticket):
                    self._drop(job, now)
                end = _end(wire.JobFail(ticket, "cancelled"))
                self._tell([self.book.keep(session, ticket, end)])

    def _drop(self, job: Job, now: float) -> None:
        """End a job that nobody wants any more; one that runs, by way of its supervisor."""
        if job.worker is None:
            self.book.end(job, "cancelled", None, now)
            return
        job.unwanted = True
        self.book.unmerge(job)
        self._send(job.worker.supervisor.peer, wire.CancelJob(job.worker.child, job.handle))

    def _on_cancel_handle(self, session: Session, message: wire.CancelHandle, now: float) -> None:
        job = self.book.jobs.get(message.handle)
        if job is not None and not job.unwanted:
            end = _end(wire.JobFail(0, "cancelled", "cancelled by its handle"))
            self._tell(self.book.end_listeners(job, end))
            job.background = False
            self._drop(job, now)
        self._to_session(session, self._status_is(message.request, message.handle))

    def _on_attach(self, session: Session, message: wire.Attach, now: float) -> None:
        ticket = message.ticket
        if ticket in session.tickets:
            return
        if ticket in session.untaken:
            self._tell([(session, ticket, session.untaken[ticket])])
            return
        job = self.book.jobs.get(message.handle)
        if job is not None and not job.unwanted:
            self.book.listen(job, session, ticket)
            accepted = wire.Accepted(ticket, 1, job.handle)
            self._to_session(session, wire.JobsAccepted([accepted], len(job.queue.workers)))
            if job.progress is not None:
                self._to_session(session, wire.JobStatus(ticket, *job.progress))
            return
        ended = self.book.endings.get(message.handle)
        if ended is None:
            end = _end(wire.JobFail(0, "unknown", "there is no such job here"))
        elif ended.end is None:
            text = f"the job ended ({ended.outcome}) {now - ended.at:.0f} s ago; its result is gone"
            end = _end(wire.JobFail(0, "unknown", text))
        else:
            end = ended.end
        self._tell([self.book.keep(session, ticket, end)])

    def _on_get_status(self, session: Session, message: wire.GetStatus) -> None:
        handle = message.handle
        if not handle:
            function = self.crew.functions.get(message.function)
            job = None if function is None else function.merged.get(message.uniq)
            ended = self.book.endings.of_uniq(message.function, message.uniq)
            handle = job.handle if job is not None else ended or 0
        self._to_session(session, self._status_is(message.request, handle))

    def _status_is(self, request: int, handle: int) -> wire.StatusIs:
        job = self.book.jobs.get(handle)
        if job is None:
            ended = self.book.endings.get(handle)
            outcome = "" if ended is None else ended.outcome
            return wire.StatusIs(request, handle, ended is not None, False, 0, 0, 0, outcome)
        numerator, denominator = job.progress or (0, 0)
        return wire.StatusIs(
            request,
            handle,
            known=True,
            running=job.state == ASSIGNED,
            numerator=numerator,
            denominator=denominator,
            n_listeners=len(job.listeners),
            ended="cancelled" if job.unwanted else "",
        )

    def _on_count_workers(self, session: Session, message: wire.CountWorkers) -> None:
        function = self.crew.functions.get(message.function)
        having = [] if function is None else list(function.workers)
        needs = needs_of(message.python, message.labels)
        n_workers = sum(map(needs.met_by, having))
        answer = wire.WorkersAre(
            message.request,
            n_workers,
            len(having) - n_workers,
            tuple(sorted({worker.python for worker in having})),
            tuple(sorted({label for worker in having for label in worker.labels})),
        )
        self._to_session(session, answer)

    # --- grabs ------------------------------------------------------------------------------

    def _on_grab_jobs(self, worker: Worker, message: wire.GrabJobs, now: float) -> None:
        slept = worker.sleep != "awake"
        worker.grab = None
        if slept:
            self.crew.set_sleep(worker, "awake", now)
        lane: wire.LaneId | None = None
        if message.lanes:
            jobs, lane = self._take_of_lanes(worker, message)
        else:
            if worker.adopted or self._adoptable:
                self._settle_adopted(worker, now)
            jobs = self._take(worker, message)
        if jobs:
            self._assign(worker, jobs, now, lane)
        elif message.wait and not message.lanes:
            worker.grab = message
            self.crew.set_sleep(worker, "waiting", now)
        else:
            self._send(worker.peer, wire.NoJob())
        if slept:
            # It may have been woken for a job that it did not take.
            self._wake_all(worker.queues, now)

    def _settle_adopted(self, worker: Worker, now: float) -> None:
        """Take back what a worker was believed to run since before our boot.

        It looks for other work, so it has told of all that it ran.
        """
        for handle in list(worker.adopted):
            self._give_back(worker, handle, now)
        if self._adoptable:
            self._forget_adoptable(worker.supervisor, worker.child)

    def _forget_adoptable(self, supervisor: Supervisor, child: int | None = None) -> None:
        for origin, (other, number) in list(self._adoptable.items()):
            if other is supervisor and child in (None, number):
                del self._adoptable[origin]
        for key, origin in list(self._adoptable_uniq.items()):
            if origin not in self._adoptable:
                del self._adoptable_uniq[key]

    def _take(self, worker: Worker, grab: wire.GrabJobs) -> list[Job]:
        """Take ready jobs for this worker: one, or several when they are known to be short."""
        chosen = self.crew.choose(worker)
        if chosen is None:
            return []
        queue, priority = chosen
        first = queue.pop(priority)
        assert first is not None, "a queue that counts a ready job has one"
        jobs = [first]
        seconds = queue.function.seconds
        if seconds is not None and grab.n > 1 and queue.n_ready:
            # Its fair share of what is ready, so that the others find something too.
            fair = -(-(queue.n_ready + 1) // len(queue.workers))
            n = min(int(_SHORT / max(seconds, 1e-6)), fair, grab.n, _MAX_ASSIGNED)
            room = min(grab.nbytes, wire.BODY_NBYTES) - first.nbytes
            if n > 1:
                queue.pop_more(jobs, priority, n, room)
        return jobs

    def _take_of_lanes(
        self, worker: Worker, grab: wire.GrabJobs
    ) -> tuple[list[Job], wire.LaneId | None]:
        """Take a ready job of these lanes, and say in which it stood."""
        for queue in worker.queues:
            for lane in grab.lanes:
                job = queue.pop_of(lane)
                if job is not None:
                    return [job], lane
        return [], None

    def _assign(
        self, worker: Worker, jobs: list[Job], now: float, lane: wire.LaneId | None = None
    ) -> None:
        """Give jobs to a worker; ``lane`` is where it found them, if it asked for lanes.

        A merged job stands in the lane of everyone who joined, and a worker that waits inside a
        job knows its own only.
        """
        entries: list[wire.Assigned] = []
        arguments: list[Body] = []
        if not worker.held:
            worker.since = now
        self.book.assign(jobs, worker)
        of: wire.SubmitJobs | None = None
        for job in jobs:
            terms = job.terms
            if terms is not of:
                of = terms
                limit = worker.abilities[terms.function].timeout
                if terms.timeout:
                    limit = min(terms.timeout, limit) if limit else terms.timeout
            is_near = terms.shared and self._are_near(job, worker)
            if terms.referred and not is_near:
                self._refuse_referred(job, f"{worker.name} is on another machine", now)
                continue
            entries.append(
                wire.Assigned(
                    job.handle,
                    job.origin,
                    terms.function,
                    job.nbytes,
                    job.n_items,
                    job.attempt,
                    terms.encoding,
                    job.uniq,
                    limit,
                    terms.item_timeout,
                    terms.blobs,
                    terms.ancestors,
                    lane or job.lane,
                    is_near and not (job.uniq or job.background),
                    terms.referred,
                )
            )
            arguments.append(job.argument)
        if entries:
            self._send(worker.peer, wire.JobAssign(entries), wire.join(arguments))
        else:
            self._send(worker.peer, wire.NoJob())  # it asks again

    @staticmethod
    def _are_near(job: Job, worker: Worker) -> bool:
        """Tell whether all who listen to a job can open the memory of this worker."""
        machine = worker.machine
        if not machine or (job.session is not None and job.session.machine != machine):
            return False
        return not job.others or all(session.machine == machine for session, _ in job.others)

    def _refuse_referred(self, job: Job, text: str, now: float) -> None:
        """Have a job submitted anew by who wants it: its worker cannot open its argument."""
        if job.unwanted or job.background:
            self.book.end(job, "cancelled" if job.unwanted else "failed", None, now)
            return
        for session, ticket in job.listeners:
            self._to_session(session, _refusal([ticket], "shared", text[:200]))
        self.book.forget(job)

    # --- abilities --------------------------------------------------------------------------

    def _on_can_do(self, worker: Worker, message: wire.CanDo, now: float) -> None:
        functions = self.crew.functions
        newly = [
            ability.function
            for ability in message.abilities
            if ability.merge
            and (ability.function not in functions or not functions[ability.function].merge)
        ]
        queues = self.crew.can_do(worker, message.abilities)
        for name in newly:
            self._merge_waiting(functions[name], now)
        self._wake_all(queues, now)

    def _merge_waiting(self, function: Function, now: float) -> None:
        """Merge what came before it was known that this function may be merged."""
        for job, first in self.book.to_merge(function):
            for session, ticket in job.listeners:
                self.book.leave(job, session, ticket)
                self.book.join(first, session, job.terms, ticket)
                accepted = wire.Accepted(ticket, 1, first.handle)
                self._to_session(session, wire.JobsAccepted([accepted], len(function.workers)))
                self.counters["merged"] += 1
            self.book.end(job, "merged", None, now)

    # --- sleep ------------------------------------------------------------------------------

    def _on_pre_sleep(self, worker: Worker, now: float) -> None:
        worker.grab = None
        self._settle_adopted(worker, now)
        self.crew.set_sleep(worker, "asleep", now)
        self._wake_all(worker.queues, now)

    def _rise(self, worker: Worker, now: float) -> None:
        """Count on this worker no more, until it grabs or sleeps again."""
        worker.grab = None
        if worker.sleep != "awake":
            self.crew.set_sleep(worker, "awake", now)
            self._wake_all(worker.queues, now)

    def _wake_all(self, queues: Iterable[Queue], now: float) -> None:
        for queue in list(queues):
            self._wake(queue, now)

    def _wake(self, queue: Queue, now: float) -> None:
        """Wake sleepers until nobody sleeps through this queue's work."""
        while (worker := self.crew.to_wake(queue)) is not None:
            grab, worker.grab = worker.grab, None
            if grab is not None:
                self.crew.set_sleep(worker, "awake", now)
                self._assign(worker, self._take(worker, grab), now)
            else:
                self.crew.set_sleep(worker, "woken", now)
                self._woken.append((now, worker))
                self._send(worker.peer, wire.Noop())

    # --- the ends of jobs -------------------------------------------------------------------

    def _job_of(self, worker: Worker, handle: int, boot: str, origin: Origin | None) -> Job | None:
        """Find the job that a worker speaks of: by handle, or by origin if from another boot."""
        if not boot or boot == self.boot:
            return worker.held.get(handle)
        if origin is None:
            return None
        session = self.book.sessions.get(origin.session)
        job = None if session is None else session.tickets.get(origin.ticket)
        for adopted in worker.adopted:
            # The origin is the one of the earlier boot, which need not listen any more.
            if worker.held[adopted].origin == origin:
                return worker.held[adopted]
        return job if job is not None and job.worker in (None, worker) else None

    def _held_under(self, supervisor: Supervisor, handle: int) -> Job | None:
        job = self.book.jobs.get(handle)
        if job is not None and job.worker is not None and job.worker.supervisor is supervisor:
            return job
        return None

    def _accept_work(self, worker: Worker, seq: int) -> None:
        if worker.peer is not None:
            accepted = wire.WorkAccepted([wire.Range(seq, 1)])
            self._out.append(Send(worker.peer, accepted, patient=True))

    def _say_taken(self) -> None:
        """Tell workers which of their memory nobody needs any more."""
        if self.book.returned:
            seqs: dict[Worker, list[int]] = {}
            for worker, seq in self.book.returned:
                seqs.setdefault(worker, []).append(seq)
            self.book.returned.clear()
            for worker, some in seqs.items():
                self._send(worker.peer, wire.WorkTaken(wire.ranges(sorted(some))))

    def _on_work_complete(
        self, worker: Worker, message: wire.WorkComplete, body: Body, now: float
    ) -> None:
        results = wire.split(body, [done.nbytes for done in message.jobs])
        boot = message.boot
        if boot and len(message.origins) != len(message.jobs):
            raise wire.Malformed("bad_frame", "one origin a job is needed")
        shared = message.jobs[0].shared
        if shared and not self._may_lend(worker, message, now):
            return
        seconds = message.seconds / len(message.jobs)
        lender = (worker, message.seq) if shared else None
        alike: dict[Job, Untaken] = {}  # of one queue, one after the other
        told: list[Told] = []
        queue: Queue | None = None
        lane_id: wire.LaneId | None = None
        lane: LaneInfo | None = None
        for at, (done, result) in enumerate(zip(message.jobs, results, strict=True)):
            if boot:
                job = self._job_of(worker, done.handle, boot, message.origins[at])
            else:
                job = worker.held.get(done.handle)
            if job is None or job in alike:
                self.counters["late"] += 1
                continue
            if job.queue is not queue:
                if alike:
                    told += self._end_alike(worker, alike, now)
                queue = job.queue
                common = wire.JobComplete([], seconds, worker.host, len(queue.workers))
            if job.lane is not lane_id:
                lane_id = job.lane
                lane = self.book.lane_of(job)
            n_items = job.n_items
            if 0 < done.n_items < n_items:
                n_items = done.n_items
            if lane is not None:
                lane.n_done += n_items
            end = Untaken(common, (result,), done.nbytes + shared, lender, n_items, shared)
            if not job.others and lender is None and job.worker is worker:
                alike[job] = end
            else:
                self.crew.measured(queue.function, seconds)
                worker.n_done += 1
                if alike:
                    told += self._end_alike(worker, alike, now)
                told += self.book.end(job, "complete", end, now)
        if alike:
            told += self._end_alike(worker, alike, now)
        self._tell_together(told)
        self._accept_work(worker, message.seq)
        if shared and message.seq not in worker.lent:
            self._send(worker.peer, wire.WorkTaken([wire.Range(message.seq, 1)]))

    def _end_alike(self, worker: Worker, alike: dict[Job, Untaken], now: float) -> list[Told]:
        """End jobs of one queue that a worker has completed, and forget which they were."""
        jobs = list(alike)
        common = alike[jobs[0]].message
        assert isinstance(common, wire.JobComplete), "it has a result"
        self.crew.measured(jobs[0].queue.function, common.seconds, len(jobs))
        worker.n_done += len(jobs)
        told = self.book.end_alike(worker, jobs, list(alike.values()), now)
        alike.clear()
        return told

    def _tell_together(self, told: list[Told]) -> None:
        """Tell of the results of one message: each listener in one message, not one a job.

        Where that grows too large, the rest goes one by one.
        """
        if len(told) == 1:
            self._tell(told)
            return
        completed = wire.Completed
        lists: dict[Session, tuple[list[wire.Completed], list[Body], wire.JobComplete]] = {}
        found: Session | None = None
        nbytes = 0
        for session, ticket, end in told:
            nbytes += end.nbytes
            if nbytes > wire.BODY_NBYTES:
                self._tell([(session, ticket, end)])
                continue
            if session is not found:
                found = session
                common = cast(wire.JobComplete, end.message)
                jobs, results, _ = lists.setdefault(session, ([], [], common))
            jobs.append(completed(ticket, end.nbytes - end.shared, end.n_items, end.shared))
            results += end.bodies
        for session, (jobs, results, common) in lists.items():
            seconds = len(jobs) * common.seconds
            complete = wire.JobComplete(jobs, seconds, common.host, common.n_workers)
            self._to_session(session, complete, wire.join(results))

    def _may_lend(self, worker: Worker, message: wire.WorkComplete, now: float) -> bool:
        """Look whether all listeners can have a result that lies in the worker's memory.

        Where one came later, from another machine, the job is run again.
        """
        if len(message.jobs) > 1:
            raise wire.Malformed("bad_frame", "a result in shared memory comes alone")
        seq = message.seq
        origin = message.origins[0] if message.boot else None
        job = self._job_of(worker, message.jobs[0].handle, message.boot, origin)
        if job is None or (self._are_near(job, worker) and not (job.uniq or job.background)):
            return True
        if job.worker is worker:
            self._give_back(worker, job.handle, now)
        self._accept_work(worker, seq)
        self._send(worker.peer, wire.WorkTaken([wire.Range(seq, 1)]))
        return False

    def _on_work_exception(
        self,
        worker: Worker,
        message: wire.WorkException,
        bodies: tuple[Body, ...],
        now: float,
    ) -> None:
        job = self._job_of(worker, message.handle, message.boot, message.origin)
        if job is None:
            self.counters["late"] += 1
        else:
            exception = wire.JobException(
                0,
                message.type_name,
                message.message,
                message.traceback,
                message.n_items,
                job.attempt,
                worker.host,
                worker.pid,
                message.seconds,
            )
            worker.n_done += 1
            self._end_job(job, "exception", _end(exception, bodies), now)
        self._accept_work(worker, message.seq)

    def _fail_work(self, job: Job | None, message: wire.WorkFail, now: float) -> None:
        if job is None or job.worker is None:
            self.counters["late"] += 1
            return
        fail = wire.JobFail(
            0,
            message.code,
            message.text,
            item=message.item,
            n_items=message.n_items,
            attempt=job.attempt,
            host=job.worker.host,
        )
        self._end_job(job, message.code, _end(fail), now)

    def _on_news(
        self,
        job: Job | None,
        message: wire.WorkStatus | wire.WorkData | wire.WorkWarning,
        bodies: tuple[Body, ...],
    ) -> None:
        """Pass a status, data or a warning on to every listener."""
        if job is None:
            self.counters["late"] += 1
            return
        if isinstance(message, wire.WorkStatus):
            job.progress = (message.numerator, message.denominator)
        for session, ticket in job.listeners:
            match message:
                case wire.WorkStatus():
                    news: Message = wire.JobStatus(ticket, message.numerator, message.denominator)
                case wire.WorkData():
                    news = wire.JobData(ticket)
                case wire.WorkWarning():
                    news = wire.JobWarning(ticket)
                case _:
                    assert_never(message)
            self._to_session(session, news, *bodies)

    def _end_job(self, job: Job, outcome: str, end: Untaken, now: float) -> None:
        lane = self.book.lane_of(job)
        if lane is not None:
            lane.n_failed += 1
        self._tell(self.book.end(job, outcome, end, now))

    # --- jobs that come back ----------------------------------------------------------------

    def _give_back(self, worker: Worker, handle: int, now: float) -> None:
        """Put a job that was not started back in front; this was no attempt."""
        job = worker.held.get(handle)
        if job is None:
            self.counters["late"] += 1
            return
        self.book.unassign(job, worker)
        job.attempt -= 1
        self._return(job, now)

    def _return(self, job: Job, now: float) -> None:
        if job.unwanted:
            self.book.end(job, "cancelled", None, now)
        else:
            self._make_ready(job, now, front=True)

    def _lose_worker(self, worker: Worker, lost: wire.ChildLost, now: float) -> None:
        """Forget a worker whose process ended, and put its jobs back in front.

        Only what it was running counts as an attempt. A job whose attempts are used up fails.
        What had ended well is not to blame for the death, yet may run again only if it may run
        more than once.
        """
        running = worker.adopted.union(lost.running)
        ended = set(lost.ended)
        queues = self.crew.remove(worker)
        self.roster.forget(worker)
        for job in reversed(list(worker.held.values())):
            self.book.unassign(job, worker)
            ran = job.handle in running or (job.handle in ended and job.terms.attempts == 1)
            if not ran:
                job.attempt -= 1
            elif job.attempt >= job.terms.attempts and not job.unwanted:
                self._fail_lost(job, worker, lost, now)
                continue
            self._return(job, now)
        self._wake_all(queues, now)

    def _fail_lost(self, job: Job, worker: Worker, lost: wire.ChildLost, now: float) -> None:
        self.counters["lost"] += 1
        item, n_items = 0, job.n_items
        if job.handle in lost.ended:
            n_items = 0
        elif job.handle in lost.running[:1] and lost.n_items:
            # Only of the innermost job it is known which items may be to blame.
            item, n_items = lost.item, lost.n_items
        fail = wire.JobFail(
            0,
            "lost",
            item=item,
            n_items=n_items,
            attempt=job.attempt,
            exit=lost.exit,
            host=worker.host,
        )
        self._end_job(job, "lost", _end(fail), now)

    def check(self) -> None:
        """Assert all that must hold between two messages."""
        self.book.check()
        self.roster.check()
        assert not self._out, "every send has been handed out"


def _one(bodies: tuple[Body, ...]) -> Body:
    return bodies[0] if bodies else b""


def _end(message: JobEnd, bodies: tuple[Body, ...] = ()) -> Untaken:
    return Untaken(message, bodies, sum(map(wire.nbytes_of, bodies)))


def _refusal(
    tickets: list[int], code: wire.REFUSAL, text: str, blobs: tuple[bytes, ...] = ()
) -> wire.JobsRefused:
    return wire.JobsRefused(wire.ranges(tickets), code, text, blobs)
