"""What a client knows of its jobs and servers, and what it says next.

This half thinks; ``connection`` acts. Messages and time come in; events for the callers come out of
the ``on_`` methods at once, and sends are gathered by ``flush``, so that what a whole turn of the
driver brought about goes together::

        submit, cancel, attach, ask                     flush
    caller ------------------------> ClientState -----------------> servers
           <-------------------------             <----------------
              events of on_message                 on_message ...

A ticket's life. A client keeps a foreground job until its result is there, so a lost server costs
a resubmit to the next one and nothing else::

               route          credit           accepted
    (homeless) -----> WAITING -------> SENT ------------> ACCEPTED ----> ENDED
         ^               ^   <---------'|  busy, blobs       |  result, failure, cancel
         |               '-- - - - - - -'  link broke        |
         '----------------------------------------- - - - - -'  server lost

* **Where.** A map goes to one server, by its lane; what may merge goes by function and uniq, so
  that equals meet; the rest is spread in runs. Each choice is the highest random weight (D. G.
  Thaler and C. V. Ravishankar, IEEE/ACM Transactions on Networking 6(1), 1998) over the servers
  that can be had, by what a server calls itself, which is the same to all clients.
* **When a server is lost.** A broken link may come back with its session, so it has GRACE seconds
  before its jobs move. They move only where there is another server. If the old one comes back
  with them after all, they are cancelled there; the first result of a ticket wins.
* **What is remembered.** A result is acknowledged (ResultsTaken) even when nobody waits for it
  any more, or the server would say it again for ever.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, assert_never

from dmap.tickets import (
    ACCEPTED,
    ENDED,
    PATIENCE,
    QUIET,
    SENT,
    TROUBLE,
    WAITING,
    Answered,
    Asked,
    Attached,
    Complaint,
    Completed,
    Event,
    Failed,
    Heard,
    InBackground,
    Lane,
    Needs,
    NoWorkers,
    Owner,
    Probe,
    Question,
    Refused,
    Send,
    Server,
    Status,
    Terms,
    Ticket,
)
from jobserver import protocol as wire
from jobserver.protocol import Body

SETTLE: Final = 0.5
"""Seconds that a new client waits for the first word of each server before it chooses among them:
clients that start together must choose alike, or equal jobs do not meet."""
GRACE: Final = 0.4
"""Seconds that a broken link has to come back with its session before its jobs move."""
SILENCE: Final = 5
"""So many heartbeat intervals without a word, and a server is lost."""
CONNECT_TIMEOUT: Final = 5.0
"""Seconds until calls fail when no server has ever answered."""
MOST_QUIET: Final = 30.0
ASK_AGAIN: Final = 0.5
"""Seconds between two questions who can do jobs, after nobody was found."""
ABSENCE: Final = 1.0
"""Seconds that nobody is found before that is said."""
RESTART: Final = 10.0
"""The same where there were workers: a process that died may be all that a host had, and the next
one has modules to import."""
MAX_MET: Final = 1000
FIRST_PAUSE: Final = 0.02
LAST_PAUSE: Final = 1.0
"""Seconds between two tries at a busy server; doubled from the first to the last."""
TAKE_PAUSE: Final = 0.02
"""Seconds that an acknowledgement of results waits for others, and for something to go with."""
MIN_TAKEN: Final = 16
"""So many are acknowledged with what goes to their server; one by one they would cost both ends
more than they are worth."""
MAX_TAKEN: Final = 512
"""So many results are acknowledged at once."""
RUN: Final = 256
"""So many tickets in a row go to the same server: they share a message."""
FIRST_UNSHARED: Final = 30.0
LAST_UNSHARED: Final = 3600.0
"""Seconds for which no memory is shared by way of a server, after some could not be opened; doubled
from the first to the last."""
MAX_BLOBS: Final = 4096
"""Beyond so many, what blobs a server has is forgotten; they are put again when next named."""


def rank(key: bytes, names: Sequence[str]) -> int:
    """Return which of these names has the highest random weight for a key.

    Whoever ranks the same names by the same key chooses the same; without one of the names only
    the keys that had chosen it choose anew.
    """
    if len(names) == 1:
        return 0
    # A keyed digest: weights by a linear function such as crc32 would always differ alike.
    weights = [hashlib.blake2b(key + name.encode(), digest_size=8).digest() for name in names]
    return weights.index(max(weights))


class ClientState:
    """All servers' links as one client sees them. Not for several threads at once.

    Args:
        session: 16 random bytes that name this client.
        servers: Addresses; a server is spoken of by its place among them.
        now: The time.
        hello: What to say of this client at the start of each connection.
    """

    def __init__(
        self, session: bytes, servers: Sequence[str], now: float, hello: wire.Hello
    ) -> None:
        self.session = session
        self.hello = hello
        self.servers = [Server(n, address, now) for n, address in enumerate(servers)]
        self.tickets: dict[int, Ticket] = {}  # number -> ticket that has not ended
        self.ever_up = False
        self._homeless: deque[Ticket] = deque()  # those with no server chosen; ended are skipped
        self._terms: dict[Terms, None] = {}  # those with live tickets
        self._met: dict[Needs, None] = {}  # those that some worker has met
        self._lanes: dict[int, Lane] = {}  # open ones
        self._asked: dict[int, Asked] = {}  # request -> question without an answer
        self._unasked: list[tuple[str, Question, Owner]] = []  # until the servers are known
        self._n_requests = 0
        self._alone_since = now  # since when tickets wait without any server; if they do
        self._run = -1  # the last run of spread tickets, and its server
        self._run_server: Server | None = None
        self._events: list[Event] = []

    # --- what callers want --------------------------------------------------------------------

    def submit(self, ticket: Ticket, now: float) -> None:
        """Take on a new job, or a new listener (``Attached``)."""
        if not self.tickets:
            self._alone_since = now
        self.tickets[ticket.number] = ticket
        self._homeless.append(ticket)
        terms = ticket.terms
        terms.n_live += 1
        if terms.n_live == 1:
            self._terms[terms] = None
            terms.probe_at = now + QUIET
            terms.probe_pause = QUIET

    def cancel(self, numbers: Iterable[int]) -> None:
        """End these tickets without an event, wherever they are."""
        for number in numbers:
            ticket = self.tickets.pop(number, None)
            if ticket is not None:
                self._end(ticket, None)

    def open_lane(self, message: wire.OpenLane) -> None:
        """Begin a map; it is made known to the server that gets its jobs."""
        self._lanes[message.lane] = Lane(message)

    def close_lane(self, lane: int) -> None:
        """End a map. No ticket of it may be live."""
        del self._lanes[lane]
        for server in self.servers:
            if lane in server.lanes:
                server.lanes.remove(lane)
                if server.status == "up":
                    server.out.append((wire.CloseLane(lane), ()))

    def ask(self, where: str, question: Question, owner: Owner) -> list[Event]:
        """Put a question to the server of that ``name:boot``; ``Answered`` comes once."""
        if any(server.status == "fresh" for server in self.servers):
            self._unasked.append((where, question, owner))
            return []
        self._ask_of(where, question, owner)
        return self._take_events()

    def end_all(self, trouble: TROUBLE, text: str) -> list[Event]:
        """End all that is under way: the client itself ends."""
        self._refuse(list(self.tickets.values()), None, trouble, text)
        for asked in self._asked.values():
            if not isinstance(asked.owner, Probe):
                self._events.append(Answered(asked.owner, None, b""))
        self._asked.clear()
        self._events += [Answered(owner, None, b"") for _, _, owner in self._unasked]
        self._unasked.clear()
        return self._take_events()

    def goodbye(self) -> list[Send]:
        """Leave all servers in order; nothing may be called after this."""
        return [Send(server.index, wire.Goodbye()) for server in self.servers if server.linked]

    def why_no_server(self) -> str:
        """Tell of each server why it is not up; empty if one is."""
        if any(server.status == "up" for server in self.servers):
            return ""
        return ", ".join(
            f"{server.address} ({server.refusal or 'no answer'})" for server in self.servers
        )

    # --- what happens to links ----------------------------------------------------------------

    def on_connected(self, index: int, now: float) -> list[Event]:
        """Note that a connection stands, and greet."""
        server = self.servers[index]
        server.linked = True
        server.heard_at = now
        self._greet(server, now)
        return self._take_events()

    def on_disconnected(self, index: int, now: float) -> list[Event]:
        """Note that a connection is gone, or that none could be made."""
        server = self.servers[index]
        server.linked = False
        server.out.clear()
        if server.status == "fresh":
            self._set_status(server, "down", now)
        elif server.status == "up":
            self._set_status(server, "broken", now)
        return self._take_events()

    def on_refused(self, index: int, text: str, now: float) -> list[Event]:
        """Note that a server will never have us (a wrong key, say), and why."""
        self._shun(self.servers[index], text, now)
        return self._take_events()

    def on_message(
        self,
        index: int,
        message: wire.ToClient | wire.Welcome | wire.Heartbeat | wire.Error,
        bodies: Sequence[Body],
        now: float,
    ) -> list[Event]:
        """Take a message of a server.

        Raises:
            Malformed: the lengths in it do not fit its body; nothing has changed.
        """
        server = self.servers[index]
        server.heard_at = now
        match message:
            case wire.JobComplete():
                self._on_job_complete(server, message, bodies, now)
            case wire.JobsAccepted():
                self._on_jobs_accepted(server, message)
            case wire.JobException() | wire.JobFail():
                self._on_failure(server, message, tuple(bodies), now)
            case wire.JobStatus() | wire.JobData() | wire.JobWarning():
                self._on_word(message, bodies, now)
            case wire.JobsRefused():
                self._on_jobs_refused(server, message, now)
            case wire.Heartbeat(interval):
                if interval:
                    server.interval = interval
            case wire.BlobTaken():
                self._on_blob_taken(server, message.blob, message.text, message.send, now)
            case wire.StatusIs() | wire.WorkersAre() | wire.Shown():
                self._on_answer(message, bodies, now)
            case wire.Credit(jobs, nbytes):
                server.max_jobs, server.max_nbytes = jobs, nbytes
            case wire.Draining():
                server.draining = True
            case wire.Welcome():
                self._on_welcome(server, message, now)
            case wire.Error(code, text):
                self._on_error(server, code, text, now)
            case _:
                assert_never(message)
        if server.status == "down" and server.linked and not isinstance(message, wire.Error):
            # It was silent for too long and speaks again: does it still have our session?
            self._greet(server, now)
        return self._take_events()

    def on_declined(self, index: int, message: wire.Message, text: str, now: float) -> list[Event]:
        """Note that a server does not take a message of ours, which is larger than it allows."""
        server = self.servers[index]
        server.heard_at = now
        why = f"{server.name}: {text}"
        match message:
            case wire.SubmitJobs():
                numbers = [spec.ticket for spec in message.jobs]
                server.cancels.difference_update(numbers)
                server.cancelling.difference_update(numbers)
                found = [self.tickets[number] for number in numbers if number in self.tickets]
                sent = [one for one in found if one.server is server and one.stage == SENT]
                self._refuse(sent, server, "too_large", why)
            case wire.PutBlob(blob):
                server.putting.discard(blob)
                there = [one for one in self._needing(server, blob) if one.stage < ACCEPTED]
                self._refuse(there, server, "blobs", why)
            case _:
                complaint = f"it declined {type(message).__name__}: {text}"
                self._events.append(Complaint(server.address, complaint))
        return self._take_events()

    def on_unopened(self, index: int, message: wire.JobComplete, now: float) -> list[Event]:
        """Note that a result came which lies in memory that cannot be opened any more.

        The job is run again, and its result comes whole.
        """
        server = self.servers[index]
        server.heard_at = now
        self._unshare(server, now)
        server.take_at = now  # ahead of the new submit, which is else answered by the old end
        for job in message.jobs:
            server.taken.append(job.ticket)
            server.cancelling.discard(job.ticket)
            ticket = self.tickets.get(job.ticket)
            if ticket is None:
                continue
            if isinstance(ticket, Attached):
                self._fail_attached(ticket, "its result lies in memory that cannot be opened here")
            elif ticket.server is server and ticket.stage != WAITING:
                ticket.resubmit = True
                self._requeue(server, [ticket])
        return self._take_events()

    def on_tick(self, now: float) -> list[Event]:
        """Do what is due.

        Call it when everything that has arrived was taken: a client that slept would otherwise
        take all its servers for silent.
        """
        for server in self.servers:
            if now >= self._lost_at(server):
                self._set_status(server, "down", now)
            elif server.status == "down" and now >= server.since + PATIENCE:
                for ticket in list(server.attached.values()):
                    self._fail_attached(ticket, f"{server.name} is lost")
            if server.linked and server.status == "up" and now >= server.beat_at:
                server.beat_at = now + server.interval
                server.out.append((wire.Heartbeat(), ()))
        if self._unasked and not any(server.status == "fresh" for server in self.servers):
            unasked, self._unasked = self._unasked, []
            for where, question, owner in unasked:
                self._ask_of(where, question, owner)
        self._give_up(now)
        for terms in [terms for terms in self._terms if now >= terms.probe_at]:
            terms.probe_pause = min(2 * terms.probe_pause, MOST_QUIET)
            terms.probe_at = now + terms.probe_pause
            self._probe(terms)
        return self._take_events()

    def next_deadline(self) -> float | None:
        """Return when ``on_tick`` next has something to do."""
        first = math.inf
        is_up = False
        for server in self.servers:
            status = server.status
            if status == "up":
                is_up = True
                first = min(first, self._lost_at(server), server.beat_at)
                if server.take_at and server.take_at < first:
                    first = server.take_at
                if server.queues and server.paused_until and server.paused_until < first:
                    first = server.paused_until
            elif status != "down":
                first = min(first, self._lost_at(server))
            elif server.attached:
                first = min(first, server.since + PATIENCE)
        for terms in self._terms:
            if terms.probe_at < first:
                first = terms.probe_at
            if terms.retry_at and terms.retry_at < first:
                first = terms.retry_at
            if not is_up:
                first = min(first, self._alone_since + self._bound(terms))
        return None if first == math.inf else first

    def flush(self, now: float) -> list[Send]:
        """Return all that is to be said now, in order for each server."""
        for server in self.servers:
            if server.draining or server.status not in ("up", "broken"):
                self._move()
                break
        if self._homeless:
            self._route()
        sends: list[Send] = []
        for server in self.servers:
            if not server.linked:
                continue
            if server.status == "up":
                if server.taken and self._is_time_to_take(server, now):
                    self._say_ranges(server, wire.ResultsTaken, server.taken)
                if server.cancels:
                    server.cancelling |= server.cancels
                    self._say_ranges(server, wire.CancelJobs, server.cancels)
                if server.queues and now >= server.paused_until:
                    server.paused_until = 0.0
                    self._fill(server, now)
            if server.out:
                sends += [Send(server.index, *said) for said in server.out]
                server.out.clear()
        return sends

    def _is_time_to_take(self, server: Server, now: float) -> bool:
        """Tell whether to acknowledge results: when there is company, or enough, or for long."""
        if not server.take_at:
            server.take_at = now + TAKE_PAUSE
        n = len(server.taken)
        if (
            now >= server.take_at
            or n >= MAX_TAKEN
            or (n >= MIN_TAKEN and (server.queues or server.out))
            or n + server.n_out >= server.max_jobs
        ):
            server.take_at = 0.0
            return True
        return False

    # --- where tickets go ---------------------------------------------------------------------

    def _is_up(self) -> bool:
        return any(server.status == "up" for server in self.servers)

    def _candidates(self) -> list[Server]:
        """Return the servers to choose from; none while some have still to say their first word."""
        found: list[Server] = []
        for server in self.servers:
            if server.status == "fresh":
                return []
            if server.status in ("up", "broken") and not server.draining:
                found.append(server)
        return found

    def _route(self) -> None:
        candidates = self._candidates()
        if not candidates:
            return
        names = [server.where for server in candidates]
        only = candidates[0] if len(candidates) == 1 else None
        homeless, self._homeless = self._homeless, deque()
        last: tuple[Server, Terms] | None = None
        queue: deque[Ticket] = deque()
        for ticket in homeless:
            if ticket.stage == ENDED:
                continue
            if isinstance(ticket, Attached):
                self._place_attached(ticket)
                continue
            server = only or self._choose(ticket, candidates, names)
            ticket.server = server
            terms = ticket.terms
            if last is None or last[0] is not server or last[1] is not terms:
                last = server, terms
                queue = server.queues.setdefault(terms, deque())
            queue.append(ticket)

    def _choose(self, ticket: Ticket, candidates: list[Server], names: list[str]) -> Server:
        terms = ticket.terms
        if terms.avoid:
            allowed = [server for server in candidates if server not in terms.avoid]
            if allowed:
                candidates, names = allowed, [server.where for server in allowed]
        if ticket.lost_at is not None and terms.by_uniq:
            # All who shared its run there must meet again. Some have seen that server come back
            # since, as another boot, and others have not.
            others = [server for server in candidates if server is not ticket.lost_at]
            if others:
                candidates, names = others, [server.where for server in others]
        if len(candidates) == 1:
            return candidates[0]
        if terms.by_uniq and ticket.uniq:
            return candidates[rank(terms.function.encode() + b"\0" + ticket.uniq, names)]
        if terms.lane:
            lane = self._lanes.get(terms.lane)
            if lane is None or lane.server not in candidates:
                # A map stays where it is when a server with a greater weight appears.
                key = self.session + b"lane %d" % terms.lane
                server = candidates[rank(key, names)]
                if lane is None:
                    return server
                lane.server = server
            assert lane.server is not None
            return lane.server
        run = ticket.number // RUN
        if run != self._run or self._run_server not in candidates:
            self._run = run
            self._run_server = candidates[rank(self.session + b"run %d" % run, names)]
        assert self._run_server is not None
        return self._run_server

    def _move(self) -> None:
        """Take jobs from servers that are lost, if there are others to take them to."""
        for server in self.servers:
            usable = server.status in ("up", "broken") and not server.draining
            if server.queues and not usable:
                for queue in server.queues.values():
                    for ticket in queue:
                        ticket.server = None
                    self._homeless.extend(queue)
                server.queues.clear()
            if server.n_out and server.lost and self._candidates():
                self._abandon(server)

    def _abandon(self, server: Server) -> None:
        """Submit anew, elsewhere, what a server had. O(live tickets)."""
        for ticket in list(self.tickets.values()):
            if ticket.server is server and SENT <= ticket.stage <= ACCEPTED:
                # Perhaps it comes back with them.
                server.cancels.add(ticket.number)
                self._lose(ticket, server)

    def _lose(self, ticket: Ticket, server: Server) -> None:
        """A server is lost that had this ticket, or may have had it."""
        self._uncount(ticket, server)
        if ticket.terms.once:
            del self.tickets[ticket.number]
            text = f"the job server {server.name or server.address} was lost"
            fail = wire.JobFail(
                ticket.number, "lost", text, 0, ticket.n_items, 1, text, server.name
            )
            self._fail(ticket, None, fail)
            return
        ticket.resubmit = True
        ticket.lost_at = server
        ticket.server = None
        self._homeless.append(ticket)

    def _uncount(self, ticket: Ticket, server: Server) -> None:
        """A ticket that was at a server is there no more."""
        server.n_out -= 1
        server.nbytes_out -= ticket.nbytes
        ticket.stage = WAITING

    def _requeue(self, server: Server, tickets: list[Ticket]) -> None:
        """Put tickets, in their order, in front of what waits for a server."""
        for ticket in reversed(tickets):
            self._uncount(ticket, server)
            server.queues.setdefault(ticket.terms, deque()).appendleft(ticket)

    def _end(self, ticket: Ticket, server: Server | None) -> None:
        """A ticket, which is not in ``tickets`` any more, ends by the word of this server."""
        at = ticket.server
        if SENT <= ticket.stage <= ACCEPTED and at is not None:
            at.n_out -= 1
            at.nbytes_out -= ticket.nbytes
            if at is not server:
                at.cancels.add(ticket.number)
        elif isinstance(ticket, Attached) and at is not None:
            del at.attached[ticket.number]
            if at is not server:
                at.cancels.add(ticket.number)
        ticket.stage = ENDED
        ticket.argument = b""
        terms = ticket.terms
        terms.n_live -= 1
        if not terms.n_live:
            del self._terms[terms]

    def _fail(
        self,
        ticket: Ticket,
        server: Server | None,
        message: wire.JobException | wire.JobFail,
        bodies: tuple[Body, ...] = (),
    ) -> None:
        """End a ticket without a result, by the word of this server.

        It keeps its argument, for an owner who wants to see what failed.
        """
        argument = ticket.argument
        self._end(ticket, server)
        ticket.argument = argument
        self._events.append(Failed(ticket.owner, ticket, message, bodies))

    # --- what is said -------------------------------------------------------------------------

    def _greet(self, server: Server, now: float) -> None:
        server.out.clear()
        server.out.append((self.hello, ()))
        server.beat_at = now + server.interval

    def _say_ranges(
        self,
        server: Server,
        kind: type[wire.ResultsTaken] | type[wire.CancelJobs],
        numbers: list[int] | set[int],
    ) -> None:
        found = wire.ranges(sorted(set(numbers)))
        numbers.clear()
        for first in range(0, len(found), wire.MAX_LIST):
            server.out.append((kind(found[first : first + wire.MAX_LIST]), ()))

    def _fill(self, server: Server, now: float) -> None:
        """Submit what waits for a server, as far as its credit goes."""
        server.shared = self.hello.machine != "" and now >= server.unshared_until
        for terms in list(server.queues):
            queue = server.queues[terms]
            while queue and queue[0].stage == ENDED:
                queue.popleft()
            if terms.retry_at and now >= terms.retry_at:
                terms.retry_at = 0.0
            if queue and not terms.retry_at and self._put_blobs(server, terms):
                lane = self._lanes.get(terms.lane)
                if lane is not None and terms.lane not in server.lanes:
                    server.lanes.add(terms.lane)
                    server.out.append((lane.message, ()))
                while queue and self._submit_some(server, terms, queue):
                    pass
            if not queue:
                del server.queues[terms]

    def _submit_some(self, server: Server, terms: Terms, queue: deque[Ticket]) -> bool:
        """Say one ``SubmitJobs``; return whether credit was left for another."""
        specs: list[wire.JobSpec] = []
        arguments: list[Body] = []
        nbytes = 0
        n_out, nbytes_out = server.n_out, server.nbytes_out
        resubmit = queue[0].resubmit
        within = True
        while queue and len(specs) < wire.MAX_LIST:
            ticket = queue[0]
            if ticket.stage == ENDED:
                queue.popleft()
                continue
            size = ticket.nbytes
            # What is larger than the whole credit may go when nothing else is out.
            within = not n_out or (
                n_out < server.max_jobs and nbytes_out + size <= server.max_nbytes
            )
            too_much = specs and (
                nbytes + size > wire.BODY_NBYTES or ticket.resubmit is not resubmit
            )
            if too_much or not within:
                break
            queue.popleft()
            ticket.stage = SENT
            if ticket.resubmit:  # perhaps it is back where it came from
                server.cancels.discard(ticket.number)
                server.cancelling.discard(ticket.number)
            n_out += 1
            nbytes_out += size
            nbytes += size
            specs.append(wire.JobSpec(ticket.number, size, ticket.uniq, ticket.n_items))
            arguments.append(ticket.argument)
        server.n_out, server.nbytes_out = n_out, nbytes_out
        if specs:
            shared = server.shared and terms.shared
            # A large one is alone in its message; whether it can be referred to, its driver knows.
            is_near = nbytes > wire.BODY_NBYTES and server.machine == self.hello.machine
            message = terms.submit(
                specs, resubmit=resubmit, shared=shared, referred=shared and is_near
            )
            server.out.append((message, (wire.join(arguments),) if nbytes else ()))
        return within

    def _put_blobs(self, server: Server, terms: Terms) -> bool:
        """See to it that a server has what jobs name; return whether they may follow already."""
        ready = True
        for blob in terms.blobs:
            if blob.id in server.blobs:
                continue
            nbytes = wire.nbytes_of(blob.body)
            if blob.id not in server.putting:
                server.putting.add(blob.id)
                if isinstance(blob.body, wire.SharedBody) and not server.unopened:
                    server.out.append((wire.PutBlob(blob.id, blob.body.memory), ()))
                else:
                    server.out.append((wire.PutBlob(blob.id), (blob.body,)))
                if blob.id not in server.unopened:
                    terms.shipped[server.index] = terms.shipped.get(server.index, 0) + nbytes
            # A large one goes in pieces, which jobs would overtake, or may have to go once more.
            ready = ready and nbytes <= wire.BODY_NBYTES
        return ready

    def _find(self, where: str) -> Server | None:
        for server in self.servers:
            if server.where == where and server.boot:
                return server
        return None

    def _place_attached(self, ticket: Attached) -> None:
        server = self._find(ticket.where)
        if server is None:
            self._fail_attached(ticket, f"no server that can be reached is {ticket.where}")
            return
        ticket.server = server
        server.attached[ticket.number] = ticket
        if server.status == "up":
            server.out.append((wire.Attach(ticket.number, ticket.handle), ()))

    def _fail_attached(self, ticket: Attached, text: str) -> None:
        """The job that this ticket listens to is not to be found any more."""
        del self.tickets[ticket.number]
        self._end(ticket, ticket.server)
        fail = wire.JobFail(ticket.number, "unknown", text)
        self._events.append(Failed(ticket.owner, ticket, fail, ()))

    def _ask_of(self, where: str, question: Question, owner: Owner) -> None:
        server = self._find(where)
        if server is None or server.status == "down":
            self._events.append(Answered(owner, None, b""))
        else:
            self._ask(server, question, owner)

    def _ask(self, server: Server, question: Question, owner: Owner | Probe) -> None:
        self._n_requests += 1
        question.request = self._n_requests
        self._asked[question.request] = Asked(server, question, owner)
        if server.status == "up":
            server.out.append((question, ()))

    def _probe(self, terms: Terms) -> None:
        """Ask all servers who can do jobs of these terms."""
        if not terms.function:
            return
        probe = Probe(terms)
        for server in self.servers:
            if server.status == "up":
                probe.waits_for += 1
                question = wire.CountWorkers(0, terms.function, terms.python, terms.labels)
                self._ask(server, question, probe)

    # --- what servers say ---------------------------------------------------------------------

    def _on_job_complete(
        self, server: Server, message: wire.JobComplete, bodies: Sequence[Body], now: float
    ) -> None:
        jobs = message.jobs
        parts = wire.split(bodies[0] if bodies else b"", [job.nbytes for job in jobs])
        cost = message.seconds / max(1, sum([job.n_items for job in jobs]))
        host, n_workers = message.host, message.n_workers
        tickets, events, taken = self.tickets, self._events, server.taken
        last: Terms | None = None
        for job, part in zip(jobs, parts, strict=True):
            number = job.ticket
            taken.append(number)
            ticket = tickets.pop(number, None)
            if ticket is None:
                # Said again, or cancelled, or another server was first.
                server.cancelling.discard(number)
                continue
            terms = ticket.terms
            if terms is not last:
                last = terms
                if not terms.stuck:
                    terms.probe_at = now + QUIET
                if n_workers:  # it is not said of a result that is said again
                    if not terms.n_workers or terms.absence is not None:
                        self._meet(terms)
                    terms.n_workers = n_workers
            self._end(ticket, server)
            n_items = job.n_items
            events.append(
                Completed(ticket.owner, ticket, part, n_items, cost * n_items, host, n_workers)
            )
        if jobs and jobs[0].shared:
            server.take_at = now  # its worker waits for the memory

    def _on_failure(
        self,
        server: Server,
        message: wire.JobException | wire.JobFail,
        bodies: tuple[Body, ...],
        now: float,
    ) -> None:
        server.taken.append(message.ticket)
        server.cancelling.discard(message.ticket)
        ticket = self.tickets.get(message.ticket)
        if ticket is None:
            return
        if isinstance(message, wire.JobFail) and message.code == "cancelled":
            is_listening = isinstance(ticket, Attached) or ticket.stage == ACCEPTED
            if ticket.server is not server or not is_listening:
                # The answer to our own cancel, from before the job came back to this server. What
                # we have submitted since found that end still there, and was not taken on.
                if ticket.server is server and ticket.stage == SENT:
                    self._requeue(server, [ticket])
                return
        del self.tickets[ticket.number]
        ticket.terms.probe_at = now + QUIET
        if message.host:  # a worker had it
            self._meet(ticket.terms)
        self._fail(ticket, server, message, bodies)

    def _on_word(
        self,
        message: wire.JobStatus | wire.JobData | wire.JobWarning,
        bodies: Sequence[Body],
        now: float,
    ) -> None:
        ticket = self.tickets.get(message.ticket)
        if ticket is not None:
            ticket.terms.probe_at = now + QUIET
            self._meet(ticket.terms)
            body = bodies[0] if bodies else b""
            self._events.append(Heard(ticket.owner, ticket, message, body))

    def _on_jobs_accepted(self, server: Server, message: wire.JobsAccepted) -> None:
        server.pause = 0.0
        where = server.where
        tickets = self.tickets
        n_workers = message.n_workers
        last: Terms | None = None
        for accepted in message.jobs:
            first, n = accepted.ticket, accepted.n
            offset = accepted.handle - first
            for number in self._numbers(wire.Range(first, n)):
                ticket = tickets.get(number)
                if ticket is None:
                    # A background job that we heard of before and acknowledged in vain, or one
                    # that was cancelled meanwhile.
                    server.taken.append(number)
                    continue
                if ticket.server is not server or ticket.stage == WAITING:
                    continue
                ticket.stage = ACCEPTED
                ticket.where = where
                ticket.handle = offset + number
                terms = ticket.terms
                if terms is not last:
                    last = terms
                    if n_workers and (not terms.n_workers or terms.absence is not None):
                        self._meet(terms)
                    terms.n_workers = n_workers
                    terms.no_room_since = 0.0
                    if not n_workers:
                        terms.stuck = True
                if terms.background:
                    del tickets[number]
                    self._end(ticket, server)
                    server.taken.append(number)
                    self._events.append(InBackground(ticket.owner, ticket))

    def _on_jobs_refused(self, server: Server, message: wire.JobsRefused, now: float) -> None:
        refused: list[Ticket] = []
        for numbers in message.tickets:
            for number in self._numbers(numbers):
                ticket = self.tickets.get(number)
                if ticket is None or ticket.server is not server:
                    continue
                if isinstance(ticket, Attached):
                    self._fail_attached(ticket, f"{server.name} left without running it")
                elif ticket.stage != WAITING:
                    refused.append(ticket)
        code: wire.REFUSAL = message.code
        match code:
            case "busy":
                self._requeue(server, refused)
                server.pause = min(2 * server.pause or FIRST_PAUSE, LAST_PAUSE)
                server.paused_until = now + server.pause
            case "blobs":
                server.blobs.difference_update(message.blobs)
                self._requeue(server, refused)
            case "ancestor":
                for ticket in refused:
                    ticket.uniq = b""
                self._requeue(server, refused)
            case "draining":
                for ticket in refused:
                    self._uncount(ticket, server)
                    ticket.server = None
                self._homeless.extendleft(reversed(refused))
                server.draining = True
            case "shared":
                self._unshare(server, now)
                self._requeue(server, refused)
            case "too_large":
                self._refuse(refused, server, "too_large", message.text)
            case _:
                assert_never(code)

    def _unshare(self, server: Server, now: float) -> None:
        """Share no memory by way of this server for a while."""
        if now >= server.unshared_until + LAST_UNSHARED:
            server.unshared = FIRST_UNSHARED
        elif now >= server.unshared_until:
            server.unshared = min(2 * server.unshared or FIRST_UNSHARED, LAST_UNSHARED)
        server.unshared_until = now + server.unshared

    def _refuse(
        self, tickets: list[Ticket], server: Server | None, trouble: TROUBLE, text: str
    ) -> None:
        for ticket in tickets:
            del self.tickets[ticket.number]
            self._end(ticket, server)
            self._events.append(Refused(ticket.owner, ticket, trouble, text))

    def _on_blob_taken(
        self, server: Server, blob: bytes, text: str, send: bool, now: float
    ) -> None:
        server.putting.discard(blob)
        if send:
            server.unopened.add(blob)
            return  # the next flush puts the bytes
        if not text:
            if len(server.blobs) >= MAX_BLOBS:
                server.blobs.clear()
            server.blobs.add(blob)
            return
        there = self._needing(server, blob)
        over: list[Ticket] = []
        for terms in {ticket.terms for ticket in there}:
            terms.no_room_since = terms.no_room_since or now
            terms.retry_at = now + LAST_PAUSE
            if now - terms.no_room_since >= terms.patience:
                over += [ticket for ticket in there if ticket.terms is terms]
        self._refuse(over, server, "blobs", f"{server.name}: {text}")
        self._requeue(server, [t for t in there if SENT <= t.stage <= ACCEPTED])

    def _needing(self, server: Server, blob: bytes) -> list[Ticket]:
        """Return the tickets at a server that need a blob. O(live tickets)."""
        return [
            ticket
            for ticket in self.tickets.values()
            if ticket.server is server and any(one.id == blob for one in ticket.terms.blobs)
        ]

    def _on_answer(
        self,
        message: wire.StatusIs | wire.WorkersAre | wire.Shown,
        bodies: Sequence[Body],
        now: float,
    ) -> None:
        asked = self._asked.pop(message.request, None)
        if asked is None:
            return
        if not isinstance(asked.owner, Probe):
            self._events.append(Answered(asked.owner, message, bodies[0] if bodies else b""))
        elif isinstance(message, wire.WorkersAre):
            probe = asked.owner
            probe.counts[asked.server] = message.n_workers
            probe.n_others += message.n_others
            probe.pythons.update(message.pythons)
            probe.labels.update(message.labels)
            if len(probe.counts) >= probe.waits_for:
                self._on_probed(probe, now)

    def _on_probed(self, probe: Probe, now: float) -> None:
        terms = probe.terms
        terms.stuck = False
        if not terms.n_live:
            return
        n_workers = sum(probe.counts.values())
        if not n_workers:
            self._on_absence(probe, now)
            return
        self._meet(terms)
        terms.n_workers = n_workers
        terms.avoid = frozenset(server for server, n in probe.counts.items() if not n)
        if not terms.avoid:
            return
        for ticket in list(self.tickets.values()):
            at = ticket.server
            if ticket.terms is terms and at is not None and at in terms.avoid:
                if ticket.stage != WAITING:
                    if terms.once:
                        continue  # for the same reason it has to stay
                    at.cancels.add(ticket.number)
                    self._uncount(ticket, at)
                    # Nobody there could run it, but a worker may have come and gone.
                    ticket.resubmit = True
                ticket.server = None
                self._homeless.append(ticket)
        for server in terms.avoid:
            server.queues.pop(terms, None)
        lane = self._lanes.get(terms.lane)
        if lane is not None and lane.server in terms.avoid:
            lane.server = None

    def _on_absence(self, probe: Probe, now: float) -> None:
        """Nobody can take jobs of these terms; say so if that lasts."""
        terms = probe.terms
        if terms.absence is None:
            terms.say_at = now + (RESTART if terms.needs in self._met else ABSENCE)
        pythons, labels = tuple(sorted(probe.pythons)), tuple(sorted(probe.labels))
        terms.absence = NoWorkers(terms, probe.n_others, pythons, labels)
        if now >= terms.say_at:
            terms.n_workers = 0
            self._events.append(terms.absence)
        else:
            terms.probe_pause = QUIET
            terms.probe_at = min(now + ASK_AGAIN, terms.say_at)

    def _meet(self, terms: Terms) -> None:
        """Note that there is a worker for jobs of these terms."""
        terms.absence = None
        if terms.needs not in self._met:
            if len(self._met) >= MAX_MET:
                del self._met[next(iter(self._met))]
            self._met[terms.needs] = None

    def _on_error(self, server: Server, code: str, text: str, now: float) -> None:
        if code == "hello_first":
            # The connection was replaced before we noticed.
            if server.status == "up":
                self._set_status(server, "broken", now)
            self._greet(server, now)
        elif code in ("version", "role"):
            self._shun(server, text, now)
        else:
            self._events.append(Complaint(server.address, f"{code}: {text}"))

    def _on_welcome(self, server: Server, message: wire.Welcome, now: float) -> None:
        self.ever_up = True
        if server.boot != message.boot:
            server.draining = False
        server.name, server.boot = message.name, message.boot
        server.machine = message.machine
        server.interval = message.interval or server.interval
        server.max_jobs, server.max_nbytes = message.jobs, message.nbytes
        server.pause = 0.0
        server.paused_until = 0.0
        server.putting.clear()
        server.lanes.clear()
        server.take_at = 0.0
        server.taken.clear()  # it says again what it was not told to forget
        self._set_status(server, "up", now)
        there = [
            ticket
            for ticket in self.tickets.values()
            if ticket.server is server and SENT <= ticket.stage <= ACCEPTED
        ]
        if message.resumed:
            # Once more, and not again: it does not answer for what never reached it.
            self._say_ranges(server, wire.CancelJobs, server.cancelling)
            self._requeue(server, [ticket for ticket in there if ticket.stage == SENT])
            for attached in server.attached.values():
                server.out.append((wire.Attach(attached.number, attached.handle), ()))
        else:
            server.blobs.clear()
            server.unopened.clear()
            server.cancels.clear()
            server.cancelling.clear()
            for ticket in there:
                self._lose(ticket, server)
            for attached in list(server.attached.values()):
                self._fail_attached(attached, f"{server.name} was restarted")
        for asked in self._asked.values():
            if asked.server is server:
                server.out.append((asked.message, ()))

    def _shun(self, server: Server, text: str, now: float) -> None:
        server.linked = False
        server.out.clear()
        server.refusal = text
        self._events.append(Complaint(server.address, text))
        self._set_status(server, "down", now)

    # --- time ---------------------------------------------------------------------------------

    def _set_status(self, server: Server, status: Status, now: float) -> None:
        was_up = self._is_up()
        server.status = status
        server.since = now
        if was_up and not self._is_up():
            self._alone_since = now
        if status != "down":
            return
        for request, asked in list(self._asked.items()):
            if asked.server is not server:
                continue
            del self._asked[request]
            if isinstance(asked.owner, Probe):
                asked.owner.waits_for -= 1
                if asked.owner.counts and len(asked.owner.counts) >= asked.owner.waits_for:
                    self._on_probed(asked.owner, now)
            else:
                self._events.append(Answered(asked.owner, None, b""))

    def _lost_at(self, server: Server) -> float:
        """Return when a server is lost unless it is heard before."""
        match server.status:
            case "fresh":
                return server.since + SETTLE
            case "broken":
                return server.since + GRACE
            case "up":
                return server.heard_at + SILENCE * server.interval
            case "down":
                return math.inf
            case _:
                assert_never(server.status)

    def _bound(self, terms: Terms) -> float:
        return terms.patience if self.ever_up else min(CONNECT_TIMEOUT, terms.patience)

    def _give_up(self, now: float) -> None:
        """Fail what has waited too long while there was no server at all."""
        if not self._terms or self._is_up():
            return
        refused = all(server.refusal for server in self.servers)
        alone = now - self._alone_since
        over = {terms for terms in self._terms if refused or alone >= self._bound(terms)}
        if not over:
            return
        trouble: TROUBLE = "auth" if refused else "no_server"
        text = self.why_no_server()
        tickets = [ticket for ticket in self.tickets.values() if ticket.terms in over]
        self._refuse(tickets, None, trouble, text)

    def _numbers(self, numbers: wire.Range) -> Iterable[int]:
        """Return the tickets of a range; a wild range costs no more than the live tickets."""
        first, n = numbers
        if n <= len(self.tickets) + wire.MAX_LIST:
            return range(first, first + n)
        return [number for number in self.tickets if first <= number < first + n]

    def _take_events(self) -> list[Event]:
        if not self._events:
            return []
        events, self._events = self._events, []
        return events

    # --- invariants ---------------------------------------------------------------------------

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        live: dict[Terms, int] = {}
        for number, ticket in self.tickets.items():
            assert ticket.number == number, "a ticket is found by its number"
            assert ticket.stage != ENDED, "what has ended is not kept"
            live[ticket.terms] = live.get(ticket.terms, 0) + 1
            if isinstance(ticket, Attached):
                at = ticket.server
                assert at is None or at.attached[number] is ticket, "a listener is where it listens"
            elif ticket.stage == WAITING:
                queue = self._homeless if ticket.server is None else None
                if ticket.server is not None:
                    queue = ticket.server.queues[ticket.terms]
                assert queue is not None
                n = sum(1 for one in queue if one is ticket)
                assert n == 1, "what waits is in the queue of its server, or homeless, once"
            else:
                assert ticket.server is not None, "what was sent was sent somewhere"
        assert live == {terms: terms.n_live for terms in self._terms}, "live tickets are counted"
        for server in self.servers:
            there = [
                ticket
                for ticket in self.tickets.values()
                if ticket.server is server and ticket.stage != WAITING
            ]
            assert server.n_out == len(there), "what is out at a server is counted"
            assert server.nbytes_out == sum(ticket.nbytes for ticket in there), "in bytes too"
            assert server.status != "up" or server.linked, "what is up has a link"
            assert all(server.queues.values()), "a queue exists while something is in it"
            for number, attached in server.attached.items():
                assert self.tickets[number] is attached, "a listener at a server is live"
