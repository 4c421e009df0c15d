"""The server's book of jobs: who wants them, who has them, how they ended.

Tables only, and what keeps them in step with each other: no message is answered and no worker
woken in here. Every change of a table goes through one method, and ``check`` compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from jobserver import protocol as wire
from jobserver.blobs import BlobStore
from jobserver.crew import Crew
from jobserver.endings import Endings
from jobserver.jobs import (
    ASSIGNED,
    DELAYED,
    ENDED,
    READY,
    Ended,
    Function,
    Job,
    LaneInfo,
    Limits,
    Session,
    Told,
    Untaken,
    Worker,
)
from jobserver.protocol import Body, LaneId, Origin
from jobserver.queues import Queue

_MOST_AROUND: Final = 10_000
"""Of so many jobs that wait for one job it is known that they do. More is no recursion."""


class Book:
    """All jobs of one server, their listeners, and what is remembered of the ended ones."""

    def __init__(self, crew: Crew, limits: Limits) -> None:
        self.limits = limits
        self.crew = crew
        self.blobs = BlobStore(limits.blob_nbytes)
        self.endings = Endings(limits)
        self.sessions: dict[bytes, Session] = {}
        self.jobs: dict[int, Job] = {}  # handle -> live job
        # origin of a live job -> those that wait for it since they, or jobs in them, joined it
        self.around: dict[Origin, set[Origin]] = {}
        self.nbytes = 0  # of all arguments and untaken ends
        # Reports whose memory nobody needs any more; to be told to their workers.
        self.returned: list[tuple[Worker, int]] = []
        self._last_handle = 0

    # --- jobs come --------------------------------------------------------------------------

    def has_room(self, session: Session, nbytes: int, n_jobs: int = 1) -> bool:
        """Tell whether this session may have so many more jobs, of so many bytes together.

        One large job may always go alone.
        """
        limits = self.limits
        of_session = len(session.tickets) + len(session.untaken) + len(session.accepted)
        one = n_jobs == 1
        return (
            len(self.jobs) + n_jobs <= limits.max_jobs
            and of_session + n_jobs <= limits.session_jobs
            and (self.nbytes + nbytes <= limits.max_nbytes or (one and not self.nbytes))
            and (session.nbytes + nbytes <= limits.session_nbytes or (one and not session.nbytes))
        )

    def create(
        self,
        session: Session,
        queue: Queue,
        terms: wire.SubmitJobs,
        lane: LaneId,
        spec: wire.JobSpec,
        argument: Body,
        now: float,
    ) -> Job:
        """Enter a new job, of which nobody has heard. It stands nowhere yet."""
        self._last_handle = handle = self._last_handle + 1
        ticket, nbytes, background = spec.ticket, spec.nbytes, terms.background
        job = Job(handle, ticket, queue, terms, lane, argument, nbytes, spec.n_items, now)
        job.offered = spec.uniq
        self.jobs[handle] = job
        self.nbytes += nbytes
        if background:
            job.background = True
            session.accepted[ticket] = handle
        else:
            job.session = session
            session.tickets[ticket] = job
            session.nbytes += nbytes
        if terms.blobs:
            self.blobs.hold(terms.blobs)
        self.crew.count_in(queue)
        if terms.merge or queue.function.merge:
            self._let_join(job)
        return job

    def create_all(
        self,
        session: Session,
        queue: Queue,
        terms: wire.SubmitJobs,
        lane: LaneId,
        specs: Sequence[wire.JobSpec],
        arguments: Sequence[Body],
        now: float,
    ) -> Sequence[Job]:
        """Enter new jobs of one submit: the same as ``create`` of each, and cheaper."""
        first = self._last_handle + 1
        self._last_handle += len(specs)
        handles = range(first, first + len(specs))
        background = terms.background
        listener = None if background else session
        jobs = [
            Job(
                handle,
                spec.ticket,
                queue,
                terms,
                lane,
                argument,
                spec.nbytes,
                spec.n_items,
                now,
                spec.uniq,
                background,
                listener,
            )
            for handle, spec, argument in zip(handles, specs, arguments, strict=True)
        ]
        self.jobs.update(zip(handles, jobs, strict=True))
        nbytes = sum(spec.nbytes for spec in specs)
        self.nbytes += nbytes
        tickets = (spec.ticket for spec in specs)
        if background:
            session.accepted.update(zip(tickets, handles, strict=True))
        else:
            session.tickets.update(zip(tickets, jobs, strict=True))
            session.nbytes += nbytes
        if terms.blobs:
            for _ in jobs:
                self.blobs.hold(terms.blobs)
        self.crew.count_in(queue, len(jobs))
        if terms.merge or queue.function.merge:
            for job in jobs:
                self._let_join(job)
        return jobs

    @staticmethod
    def joins_any(function: Function, uniqs: Sequence[bytes]) -> bool:
        """Tell whether one of these jobs to come would join another one, of them or before."""
        given = [uniq for uniq in uniqs if uniq]
        return len(set(given)) < len(given) or not function.merged.keys().isdisjoint(given)

    @staticmethod
    def knows_any(session: Session, tickets: Sequence[int]) -> bool:
        """Tell whether one of these tickets has been said before, or is here twice."""
        return (
            len(set(tickets)) < len(tickets)
            or not session.tickets.keys().isdisjoint(tickets)
            or not session.accepted.keys().isdisjoint(tickets)
            or not session.untaken.keys().isdisjoint(tickets)
        )

    def _let_join(self, job: Job) -> None:
        merged = job.queue.function.merged
        if job.offered and job.offered not in merged:
            job.uniq = job.offered
            merged[job.uniq] = job

    def to_merge(self, function: Function) -> list[tuple[Job, Job]]:
        """Return pairs of a job to give up and the one to join in its place. O(jobs).

        These are foreground jobs that came before their function was known to allow it, and that
        no worker has yet. The first of each uniq may be joined from now on.
        """
        pairs: list[tuple[Job, Job]] = []
        for job in self.jobs.values():
            if job.queue.function is not function or not job.offered or job.uniq:
                continue
            if job.worker is not None or job.background:
                continue
            self._let_join(job)
            first = function.merged[job.offered]
            if first is not job and first.origin not in self.all_around(job.terms.ancestors):
                pairs.append((job, first))
        return pairs

    def all_around(self, ancestors: Iterable[Origin]) -> set[Origin]:
        """Return all live jobs that wait for what is submitted inside these jobs.

        These are the jobs themselves, those inside which others joined one of them, and so on. If
        a submit from inside joined one of all these, it would wait for itself. O(joins of these).
        """
        found: set[Origin] = set()
        todo = list(ancestors)
        while todo:
            origin = todo.pop()
            if origin not in found:
                found.add(origin)
                todo += self.around.get(origin, ())
        return found

    def join(self, job: Job, session: Session, terms: wire.SubmitJobs, ticket: int) -> None:
        """Let a submit join a live job. A ready one stands in the joiner's lane too."""
        if terms.background:
            job.background = True
            session.accepted[ticket] = job.handle
        else:
            self.listen(job, session, ticket)
        if terms.ancestors:
            around = self.around.setdefault(job.origin, set())
            if len(around) < _MOST_AROUND:
                around.update(terms.ancestors)
        if (
            terms.lane == job.lane.lane
            and session.id == job.lane.session
            and terms.priority == job.terms.priority
        ):
            return
        lane = (LaneId(session.id, terms.lane), terms.priority)
        if job.also is None:
            job.also = {}
        if lane not in job.also:
            job.also[lane] = None
            if job.state == READY:
                job.queue.push(job, *lane)

    def listen(self, job: Job, session: Session, ticket: int) -> None:
        """Add a listener."""
        if job.others is None:
            job.others = []
        job.others.append((session, ticket))
        session.tickets[ticket] = job
        session.nbytes += job.nbytes

    def leave(self, job: Job, session: Session, ticket: int) -> bool:
        """Take a listener away; tells whether somebody still wants the job. O(listeners)."""
        if job.session is session and job.ticket == ticket:
            job.session = None
        else:
            assert job.others is not None, "only a listener leaves"
            job.others.remove((session, ticket))
        self._unlisten(job, session, ticket)
        return job.is_listened_to or job.background

    @staticmethod
    def _unlisten(job: Job, session: Session, ticket: int) -> None:
        del session.tickets[ticket]
        session.nbytes -= job.nbytes

    def lane_of(self, job: Job) -> LaneInfo | None:
        """Return what its client said of the lane that a job came in."""
        session = self.sessions.get(job.lane.session)
        return None if session is None else session.lanes.get(job.lane.lane)

    # --- jobs move --------------------------------------------------------------------------

    @staticmethod
    def stand_all(jobs: Sequence[Job]) -> None:
        """Let new jobs of one submit stand ready."""
        first = jobs[0]
        first.queue.push_all(jobs, first.lane, first.terms.priority)

    @staticmethod
    def stand(job: Job, *, front: bool) -> None:
        """Let a job stand ready in all its lanes: new at the back, returned in front."""
        job.state = READY
        job.queue.push(job, job.lane, job.terms.priority, front=front)
        for lane, priority in job.also or ():
            job.queue.push(job, lane, priority, front=front)

    @staticmethod
    def assign(jobs: Sequence[Job], worker: Worker) -> None:
        """Note that a worker has these jobs of one queue, which stand nowhere any more."""
        held = worker.held
        for job in jobs:
            job.state = ASSIGNED
            job.worker = worker
            job.attempt += 1
            held[job.handle] = job
        jobs[0].queue.function.n_running += len(jobs)

    @staticmethod
    def unassign(job: Job, worker: Worker) -> None:
        """Note that the worker no longer has it. Now it must stand again, or end."""
        del worker.held[job.handle]
        worker.adopted.discard(job.handle)
        job.queue.function.n_running -= 1
        job.worker = None
        job.progress = None

    def unmerge(self, job: Job) -> None:
        """Let nobody join this job from now on."""
        if job.uniq:
            del job.queue.function.merged[job.uniq]
            job.uniq = b""

    # --- jobs end ---------------------------------------------------------------------------

    def end(self, job: Job, outcome: str, end: Untaken | None, now: float) -> list[Told]:
        """End a job; returns what each listener is to be told."""
        told = [] if end is None else self.end_listeners(job, end)
        # What lies in a worker's memory goes when those have taken it who listened.
        keep = (job.uniq or job.background) and (end is None or end.lender is None)
        ended = Ended(now, outcome, job.name, job.uniq, end if keep else None)
        self.endings.remember(job.handle, ended)
        self.forget(job)
        return told

    def end_alike(
        self, worker: Worker, jobs: Sequence[Job], ends: Sequence[Untaken], now: float
    ) -> list[Told]:
        """End jobs of one queue that a worker has completed; returns what is to be told.

        Nobody listens to any of them but who submitted it, if that one does, and no result lies
        in the worker's memory: nearly all jobs are such, so what can be done once is done once.
        """
        queue = jobs[0].queue
        told: list[Told] = []
        handles: list[int] = []
        live, held = self.jobs, worker.held
        nbytes = 0
        for job, end in zip(jobs, ends, strict=True):
            handle = job.handle
            del live[handle]
            del held[handle]
            nbytes -= job.nbytes
            session = job.session
            if session is not None:
                ticket = job.ticket
                del session.tickets[ticket]
                session.untaken[ticket] = end
                session.nbytes += end.nbytes - job.nbytes
                nbytes += end.nbytes
                told.append((session, ticket, end))
            if job.uniq or job.background:
                self.endings.remember(handle, Ended(now, "complete", job.name, job.uniq, end))
                self.unmerge(job)
                if self.around:
                    self.around.pop(job.origin, None)
            else:
                handles.append(handle)
            if job.also:
                # As in ``forget``.
                job.session = job.worker = None
                job.argument = b""
            if job.terms.blobs:
                self.blobs.release(job.terms.blobs)
        self.nbytes += nbytes
        if worker.adopted:
            worker.adopted.difference_update(job.handle for job in jobs)
        queue.function.n_running -= len(jobs)
        self.endings.remember_all(handles, Ended(now, "complete", queue.function.name, b"", None))
        self.crew.count_out(queue, len(jobs))
        return told

    def end_listeners(self, job: Job, end: Untaken) -> list[Told]:
        """Keep an end for every listener until it has taken it; they listen no more."""
        told: list[Told] = []
        for session, ticket in job.listeners:
            self._unlisten(job, session, ticket)
            told.append(self.keep(session, ticket, end))
        job.session = job.others = None
        return told

    def keep(self, session: Session, ticket: int, end: Untaken) -> Told:
        """Keep an end for one listener."""
        session.untaken[ticket] = end
        if end.lender is not None:
            worker, seq = end.lender
            worker.lent[seq] = worker.lent.get(seq, 0) + 1
        session.nbytes += end.nbytes
        self.nbytes += end.nbytes
        return session, ticket, end

    def taken(self, session: Session, first: int, n: int) -> None:
        """Forget the ends of these tickets. O(what is kept), however long the range."""
        tickets: list[int] | range = range(first, first + n)
        if n > len(session.untaken) + len(session.accepted):
            tickets = [t for t in (*session.untaken, *session.accepted) if t in tickets]
        if session.accepted:
            for ticket in tickets:
                session.accepted.pop(ticket, None)
        for ticket in tickets:
            untaken = session.untaken.pop(ticket, None)
            if untaken is not None:
                session.nbytes -= untaken.nbytes
                self.nbytes -= untaken.nbytes
                if untaken.lender is not None:
                    self._return(*untaken.lender)

    def _return(self, worker: Worker, seq: int) -> None:
        """Note that one listener less needs the memory that this report lends."""
        worker.lent[seq] -= 1
        if not worker.lent[seq]:
            del worker.lent[seq]
            self.returned.append((worker, seq))

    def forget(self, job: Job) -> None:
        """Take a job out of everything that knows it."""
        if job.worker is not None:
            self.unassign(job, job.worker)
        elif job.state == READY:
            job.queue.leave(job)
        for session, ticket in job.listeners:
            self._unlisten(job, session, ticket)
        job.session = job.others = None
        self.unmerge(job)
        if self.around:
            self.around.pop(job.origin, None)
        job.state = ENDED
        del self.jobs[job.handle]
        self.nbytes -= job.nbytes
        job.argument = b""  # entries in other lanes may still point here
        if job.terms.blobs:
            self.blobs.release(job.terms.blobs)
        self.crew.count_out(job.queue)

    def forget_untaken(self, session: Session) -> None:
        """Forget the ends that a session did not take; it listens to nothing any more."""
        self.nbytes -= session.nbytes
        session.nbytes = 0
        for untaken in session.untaken.values():
            if untaken.lender is not None:
                self._return(*untaken.lender)
        session.untaken.clear()

    # --- invariants -------------------------------------------------------------------------

    def check(self) -> None:
        """Assert that the tables agree."""
        self.crew.check()
        self.blobs.check()
        self.endings.check()
        for handle, job in self.jobs.items():
            self._check_job(handle, job)
        for function in self.crew.functions.values():
            for uniq, job in function.merged.items():
                assert self.jobs[job.handle] is job, "only a live job can be joined"
                assert job.queue.function is function, "a job is joined in its own function"
                assert job.uniq == uniq, "a job is joined under its own uniq"
        origins = {job.origin for job in self.jobs.values()}
        assert self.around.keys() <= origins, "only live jobs are waited for"
        nbytes = sum(job.nbytes for job in self.jobs.values())
        self._check_lent()
        for name, session in self.sessions.items():
            assert session.id == name
            for ticket, job in session.tickets.items():
                assert (session, ticket) in job.listeners, "a job and its listeners know each other"
                assert ticket not in session.untaken, "a ticket lives or has ended"
            untaken = sum(untaken.nbytes for untaken in session.untaken.values())
            listened = sum(job.nbytes for job in session.tickets.values())
            assert session.nbytes == listened + untaken, "a session's bytes are counted"
            nbytes += untaken
        assert self.nbytes == nbytes, "all bytes are counted"
        for function in self.crew.functions.values():
            of_it = [job for job in self.jobs.values() if job.queue.function is function]
            n_ready = sum(queue.n_ready for queue in function.queues.values())
            n_live = sum(queue.n_live for queue in function.queues.values())
            assert function.n_running == sum(job.state == ASSIGNED for job in of_it)
            assert n_ready == sum(job.state == READY for job in of_it), "ready jobs are counted"
            assert n_live == len(of_it), "live jobs are counted"
        for worker in self.crew.workers:
            assert worker.adopted <= set(worker.held)
            for handle, job in worker.held.items():
                assert self.jobs[handle] is job, "only a live job is held"
                assert job.worker is worker, "a job and its worker know each other"

    def _check_lent(self) -> None:
        lent: dict[Worker, dict[int, int]] = {worker: {} for worker in self.crew.workers}
        for session in self.sessions.values():
            for untaken in session.untaken.values():
                if untaken.lender is not None and untaken.lender[0] in lent:
                    worker, seq = untaken.lender
                    lent[worker][seq] = lent[worker].get(seq, 0) + 1
        for worker, seqs in lent.items():
            assert worker.lent == seqs, "a worker's memory is lent to who has not taken it"
        assert not self.returned, "what is returned is told at once"

    def _check_job(self, handle: int, job: Job) -> None:
        assert job.handle == handle
        assert job.state in (READY, DELAYED, ASSIGNED)
        assert (job.state == ASSIGNED) == (job.worker is not None), "assigned means held"
        assert (job.state == READY) == bool(job.stands_at), "ready means standing in a lane"
        if job.worker is not None:
            assert job.worker.held[handle] is job, "a job and its worker know each other"
            assert 1 <= job.attempt <= job.terms.attempts, "attempts are bounded"
        wanted = job.is_listened_to or job.background
        assert wanted or job.unwanted, "a job has someone who wants it"
        assert not job.unwanted or job.worker is not None, "only a running job can be unwanted"
        assert not job.unwanted or not (job.uniq or job.background), "nobody asks for it again"
        for session, ticket in job.listeners:
            assert session.tickets[ticket] is job, "a job and its listeners know each other"
        if job.uniq:
            assert job.queue.function.merged[job.uniq] is job, "a job to join is found"
