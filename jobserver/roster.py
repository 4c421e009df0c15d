"""Who is there: sessions, supervisors and workers, their links, and when they are lost.

A peer is a routing id, good for one connection. Who it is comes from its Hello, and outlives the
connection: a session by ``session_ttl``; a supervisor by ``worker_grace`` after its link is known
to be gone, and by ``worker_ttl`` after it fell silent on a link that seems to stand. A worker
lives as long as its supervisor does and does not say otherwise.
"""

from __future__ import annotations

import heapq

from jobserver import protocol as wire
from jobserver.crew import Crew
from jobserver.jobs import Limits, Peer, Session, Supervisor, Worker


class Roster:
    """All peers of one server."""

    def __init__(self, crew: Crew, sessions: dict[bytes, Session], limits: Limits) -> None:
        self.crew = crew
        self.sessions = sessions
        self.limits = limits
        self.peers: dict[bytes, Peer] = {}  # routing id -> who it is
        self.supervisors: dict[bytes, Supervisor] = {}
        self._expiring: list[tuple[float, bytes]] = []  # heap of (when, session or supervisor)

    # --- links come and go ------------------------------------------------------------------

    def link(self, peer: bytes, hello: wire.Hello, now: float) -> tuple[Peer, bool]:
        """Take in a Hello. Returns who it is, and whether that one was known already.

        Raises:
            Malformed: the connection has said Hello as another, its process has ended, or there
                are too many.
        """
        who = self.peers.get(peer)
        if who is None and len(self.peers) >= self.limits.n_peers:
            raise wire.Malformed("limit", f"I have {len(self.peers)} peers and take no more")
        known = self._find(hello)
        if who is not None and who is not known:
            raise wire.Malformed("role", "this connection has said Hello as another")
        if known is not None and known.peer is not None and known.peer != peer:
            del self.peers[known.peer]
            if isinstance(known, Worker) and known.supervisor.peer == known.peer:
                known.supervisor.peer = None
        found: Peer
        if hello.role == "client":
            found = known if isinstance(known, Session) else Session(hello.session)
            self.sessions[hello.session] = found
            found.gone_at = None
            found.python = hello.python
            found.machine = hello.machine
        else:
            supervisor = self.require_supervisor(hello.session, now)
            found = supervisor
            if hello.role == "worker":
                if hello.child in supervisor.ended:
                    # The word of its death overtook it, and nobody would say so again.
                    raise wire.Malformed("role", f"child {hello.child} has ended")
                found = self.require_worker(supervisor, hello.child, now)
                found.machine = hello.machine
            if hello.role == "supervisor" or hello.child == 0:
                supervisor.peer = peer
                supervisor.gone_at = None
                supervisor.heard_at = now
                supervisor.name, supervisor.host = hello.name, hello.host
                supervisor.pid = hello.pid
        self.peers[peer] = found
        found.peer = peer
        found.together = hello.together
        found.name, found.host, found.pid = hello.name, hello.host, hello.pid
        return found, known is not None

    def _find(self, hello: wire.Hello) -> Peer | None:
        if hello.role == "client":
            return self.sessions.get(hello.session)
        supervisor = self.supervisors.get(hello.session)
        if supervisor is None or hello.role == "supervisor":
            return supervisor
        return supervisor.workers.get(hello.child)

    def require_supervisor(self, session: bytes, now: float) -> Supervisor:
        """Find or create a supervisor. Its silence counts from here."""
        supervisor = self.supervisors.get(session)
        if supervisor is None:
            supervisor = self.supervisors[session] = Supervisor(session, now)
            self._schedule(supervisor, now + self.limits.worker_ttl)
        return supervisor

    def require_worker(self, supervisor: Supervisor, child: int, now: float) -> Worker:
        """Find or create a worker."""
        worker = supervisor.workers.get(child)
        if worker is None:
            worker = supervisor.workers[child] = Worker(supervisor, child, now)
            self.crew.add(worker)
        return worker

    def unlink(self, peer: bytes, now: float) -> Peer | None:
        """Note that a link is gone. Returns whose it was."""
        who = self.peers.pop(peer, None)
        if who is None:
            return None
        who.peer = None
        if isinstance(who, Session):
            who.gone_at = now
            self._schedule(who, now + self.limits.session_ttl)
        else:
            supervisor = who if isinstance(who, Supervisor) else who.supervisor
            if supervisor is who or supervisor.peer == peer:
                supervisor.peer = None
                supervisor.gone_at = now
                self._schedule(supervisor, now + self.limits.worker_grace)
        return who

    # --- who is heard of no more ------------------------------------------------------------

    def heard(self, who: Peer, now: float) -> None:
        """Note a sign of life: a supervisor's, or a lone worker's own."""
        if isinstance(who, Supervisor):
            who.heard_at = now
        elif isinstance(who, Worker) and who.supervisor.peer == who.peer:
            who.supervisor.heard_at = now

    def next_due(self) -> float | None:
        """Return when ``due`` may have something to tell."""
        return self._expiring[0][0] if self._expiring else None

    def due(self, now: float) -> list[Session | Supervisor]:
        """Return those whose time is over."""
        over: list[Session | Supervisor] = []
        while self._expiring and self._expiring[0][0] <= now:
            when, name = heapq.heappop(self._expiring)
            for who in (self.sessions.get(name), self.supervisors.get(name)):
                if who is None or who.due != when:
                    continue  # looked at again by then: a later entry is the valid one
                who.due = None
                ends = self._ends_at(who)
                if ends is not None and ends <= now:
                    over.append(who)
                elif ends is not None:
                    self._schedule(who, ends)
        return over

    def _ends_at(self, who: Session | Supervisor) -> float | None:
        limits = self.limits
        if isinstance(who, Session):
            return None if who.gone_at is None else who.gone_at + limits.session_ttl
        silent = who.heard_at + limits.worker_ttl
        return silent if who.gone_at is None else min(silent, who.gone_at + limits.worker_grace)

    def _schedule(self, who: Session | Supervisor, when: float) -> None:
        """Look at this one again by then. Of its entries in the heap only the earliest is valid."""
        if who.due is None or when < who.due:
            who.due = when
            heapq.heappush(self._expiring, (when, who.id))

    # --- who leaves -------------------------------------------------------------------------

    def forget(self, who: Peer) -> None:
        """Take someone out who has no jobs any more."""
        if who.peer is not None:
            self.peers.pop(who.peer, None)
        match who:
            case Session():
                del self.sessions[who.id]
            case Supervisor():
                del self.supervisors[who.id]
            case Worker():
                del who.supervisor.workers[who.child]
        who.peer = None

    def check(self) -> None:
        """Assert that peers, sessions, supervisors and workers agree."""
        for peer, who in self.peers.items():
            assert who.peer == peer, "a peer and its routing id know each other"
        for name, session in self.sessions.items():
            assert session.id == name
            assert (session.peer is None) == (session.gone_at is not None), "gone means no link"
            assert session.peer is None or self.peers[session.peer] is session
            assert session.peer is not None or session.due is not None, "who is gone will end"
        n_workers = 0
        for name, supervisor in self.supervisors.items():
            assert supervisor.id == name
            assert supervisor.due is not None, "a supervisor is looked after"
            n_workers += len(supervisor.workers)
            for child, worker in supervisor.workers.items():
                assert worker.supervisor is supervisor
                assert worker.child == child
                assert worker in self.crew.workers
                assert worker.peer is None or self.peers[worker.peer] is worker
                assert worker.peer is not None or worker.sleep == "awake", (
                    "who cannot be reached does not sleep here"
                )
        assert n_workers == len(self.crew.workers), "each worker has a supervisor"
