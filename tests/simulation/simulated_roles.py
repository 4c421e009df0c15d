"""Clients and hosts for the simulation: real states with drivers that act in simulated time.

An argument is ``name:first:n``, the items ``first`` to ``first + n - 1`` of a call; its result says
the same of the items that are done. A name that begins with "x" raises in the middle.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import NamedTuple

from simulated_network import NAMES, Connected, Disconnected, Peer, Simulation

from dmap.client_state import ClientState
from dmap.tickets import Completed, Event, Failed, InBackground, Terms, Ticket
from dmap.worker_state import Held, WorkerState
from jobserver import protocol as wire
from jobserver.protocol import Message

SECONDS = {"f": 0.0003, "g": 0.02, "h": 0.5, "merged": 0.3, "dear": 1.0}  # function -> of a job
ABILITIES = tuple(wire.Ability(name, 0.0, name == "merged") for name in SECONDS)

FLUSH_AFTER = 0.0005
BUSY = 0.01
REPEAT = 20.0
PENDING = 5.0
LEAVE_WITHIN = 5.0


def said(name: str, first: int, n: int) -> bytes:
    return f"{name}:{first}:{n}".encode()


def read(argument: bytes) -> tuple[str, int, int]:
    name, first, n = argument.decode().split(":")
    return name, int(first), int(n)


# --- clients ----------------------------------------------------------------------------------


class Call:
    """Some items that a client wants done; the owner of their tickets."""

    def __init__(self, client: Client, name: str, terms: Terms, uniq: bytes) -> None:
        self.client = client
        self.name = name
        self.terms = terms
        self.uniq = uniq
        self.ends: Counter[int] = Counter()  # item -> how often it ended
        self.n_items = 0
        self.cancelled: set[int] = set()
        self.parts: dict[int, tuple[int, int]] = {}  # live ticket -> its items (first, n)
        self.at: dict[int, float] = {}  # live ticket -> when it was submitted
        self.waited: list[float] = []  # seconds from submit to end, of those that ended

    def add(self, n: int) -> None:
        """Submit n more items in one job."""
        self._submit(self.n_items, n)
        self.n_items += n

    def _submit(self, first: int, n: int) -> None:
        if n:
            client = self.client
            client.n_tickets += 1
            self.parts[client.n_tickets] = (first, n)
            self.at[client.n_tickets] = client.sim.now
            argument = said(self.name, first, n)
            ticket = Ticket(client.n_tickets, self.terms, argument, self, self.uniq, n)
            client.state.submit(ticket, client.sim.now)
            client.wake()

    def hear(self, event: Event) -> None:
        match event:
            case Completed(_, ticket, result, done):
                first, n = self.parts.pop(ticket.number)
                assert result == said(self.name, first, done) + b"!", "the result is the right one"
                assert done <= n // 2 or not self.name.startswith("x"), "what raises has no result"
            case Failed(_, ticket, wire.JobException() as exception, bodies):
                first, n = self.parts.pop(ticket.number)
                done = exception.n_items
                assert self.name.startswith("x"), "only what raises has an exception"
                assert bodies == (b"oh", said(self.name, first, done)), "it is the right one"
                self.ends[first + done] += 1
                self._submit(first + done + 1, n - done - 1)
                n = done
            case Failed(_, ticket, wire.JobFail(_, "lost")):
                first, n = self.parts.pop(ticket.number)
                self.client.sim.counts["failed as lost"] += 1
                done = 0
            case InBackground(_, ticket):
                first, n = self.parts.pop(ticket.number)
                done = n
            case _:
                raise AssertionError(f"heard {event}")
        self.waited.append(self.client.sim.now - self.at.pop(ticket.number))
        for item in range(first, first + done):
            self.ends[item] += 1
        self._submit(first + done, n - done)

    def cancel_one(self) -> None:
        """Cancel a live ticket."""
        for number, (first, n) in self.parts.items():
            self.cancelled.update(range(first, first + n))
            del self.parts[number]
            self.client.state.cancel([number])
            self.client.wake()
            return

    def check_end(self) -> None:
        for item in range(self.n_items):
            wanted = int(item not in self.cancelled)
            assert self.ends[item] == wanted, f"{self.name}[{item}] ended {self.ends[item]} times"


class Client(Peer):
    """A client's process."""

    def __init__(self, sim: Simulation, number: int) -> None:
        super().__init__(sim)
        self.number = number
        session = b"client" + number.to_bytes(10, "big")
        hello = wire.Hello(wire.MAJOR, wire.MINOR, "client", session, "3.11")
        self.state = ClientState(session, NAMES, sim.now, hello)
        self.calls: list[Call] = []
        self.n_tickets = 0
        self.n_lanes = 0
        self._tick_at = 0.0
        self._wakes_at = math.inf
        self._n_turns = 0
        self.wake()

    def call(self, terms: Terms, name: str = "", uniq: bytes = b"") -> Call:
        name = name or f"c{self.number}-{len(self.calls)}"
        self.calls.append(Call(self, name, terms, uniq))
        return self.calls[-1]

    def open_lane(self) -> int:
        self.n_lanes += 1
        self.state.open_lane(wire.OpenLane(self.n_lanes))
        return self.n_lanes

    def turn(self) -> None:
        state, now = self.state, self.sim.now
        taken = self.take()
        for index, what, bodies in taken:
            if what is Connected:
                self._tell(state.on_connected(index, now))
            elif what is Disconnected:
                self._tell(state.on_disconnected(index, now))
            else:
                self._tell(state.on_message(index, what, bodies, now))
        if now >= self._tick_at and not taken:
            self._tell(state.on_tick(now))
        self.send_all(state.flush(now))
        self._tick_at = state.next_deadline() or math.inf
        if self._tick_at <= now:
            self.wake()
        elif self._tick_at < self._wakes_at:
            self._wakes_at = self._tick_at
            self.sim.at(self._tick_at, self._on_time)
        self._n_turns += 1
        if self._n_turns % self.sim.check_every == 0:
            state.check()

    def _on_time(self) -> None:
        self._wakes_at = math.inf
        self._run()

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            owner = getattr(event, "owner", None)
            if owner is not None:
                owner.hear(event)

    @property
    def is_done(self) -> bool:
        return not self.state.tickets

    def leave(self) -> None:
        """Say goodbye."""
        self.send_all(self.state.goodbye())
        self.sim.after(0.1, self.vanish, 0.02)

    def check_end(self) -> None:
        """Assert that all ended once, and that nothing is left."""
        for call in self.calls:
            call.check_end()
        self.state.check()
        for server in self.state.servers:
            assert not server.n_out
            assert not server.nbytes_out
            assert not server.queues
            assert not server.attached


# --- hosts ------------------------------------------------------------------------------------


class Key(NamedTuple):
    server: int
    boot: str
    handle: int


class Claim(NamedTuple):
    key: Key
    job: wire.Assigned
    since: float


class Page:
    """What a supervisor sees of a child, as ``dmap.page`` has it."""

    def __init__(self) -> None:
        self.claim: Claim | None = None
        self.ended: list[Key] = []
        self.unclaimed: dict[Key, bool] = {}  # held job -> whether it was taken

    def take(self) -> list[Key]:
        taken = [key for key, is_taken in self.unclaimed.items() if not is_taken]
        self.unclaimed.update(dict.fromkeys(taken, True))
        return taken


class Child(Peer):
    """A worker process."""

    def __init__(self, host: Host, number: int) -> None:
        super().__init__(host.sim)
        self.host = host
        self.number = number
        self.page = Page()
        hello = wire.Hello(
            wire.MAJOR, wire.MINOR, "worker", host.session, "3.11", child=number, host=host.name
        )
        self.state = WorkerState(hello, len(NAMES), ABILITIES)
        self.is_busy = False
        self.is_leaving = False
        self._has_ended_claim = False
        self._oldest_result = 0.0
        self._n_started = 0
        self._n_turns = 0
        self._leave_at = math.inf
        self._wakes_at = math.inf

    def turn(self) -> None:
        """Read what came, unless a job runs; then go on as ``dmap.worker`` does."""
        if self.is_busy:
            return
        state, now = self.state, self.sim.now
        for index, what, bodies in self.take():
            n_held = len(state.held)
            if what is Connected:
                self._hold()
                self.send_all(state.on_connected(index))
            elif what is Disconnected:
                self.send_all(state.on_disconnected(index, now))
            else:
                sends = state.on_message(index, what, bodies, now)
                if len(state.held) != n_held:
                    self._hold()
                elif isinstance(what, wire.WorkAccepted) and state.all_accepted:
                    self.page.ended.clear()
                self.send_all(sends)
        self._go_on()

    def _go_on(self) -> None:
        state, now = self.state, self.sim.now
        if self.is_leaving and not state.draining:
            self._leave_at = now + LEAVE_WITHIN
            self._withdraw()
            self.page.unclaimed.clear()
            self.send_all(state.drain())
        while state.held:
            if self._run_next():
                return
        self._report()
        self.send_all(state.seek(now))
        self._n_turns += 1
        if self._n_turns % self.sim.check_workers_every == 0:
            state.check()
        if state.draining and (state.drained or now >= self._leave_at):
            self.send_all(state.goodbye())
            self.sim.after(0.05, self.host.bury, self, "exit code 0")
            return
        due = min(state.next_deadline() or math.inf, self._leave_at)
        if due < self._wakes_at:
            self._wakes_at = max(due, now)
            self.sim.at(self._wakes_at, self._on_time)

    def _on_time(self) -> None:
        self._wakes_at = math.inf
        if self.alive and not self.is_busy:
            self.send_all(self.state.on_tick(self.sim.now))
            self.turn()

    def _key(self, held: Held) -> Key:
        return Key(held.server, held.boot, held.job.handle)

    def _hold(self) -> None:
        self._withdraw()
        keys = [self._key(held) for held in self.state.held]
        self.page.unclaimed = dict.fromkeys(keys, False)

    def _withdraw(self) -> None:
        taken = {
            (key.server, key.handle) for key, is_taken in self.page.unclaimed.items() if is_taken
        }
        if taken:
            self.state.withdraw(taken)

    def _run_next(self) -> bool:
        """Start the next job that nobody has taken."""
        held = self.state.held[0]
        key = self._key(held)
        if self.page.unclaimed.pop(key, False):
            self.state.withdraw({(held.server, held.job.handle)})
            return False
        if self.page.claim is not None:
            self.page.ended.append(self.page.claim.key)
        self._has_ended_claim = False
        self.page.claim = Claim(key, held.job, self.sim.now)
        self.state.start()
        self.is_busy = True
        self._n_started += 1
        argument = bytes(held.argument)  # type: ignore[arg-type]
        self.sim.runs[argument.decode()] += 1
        seconds = SECONDS[held.job.function] * (0.5 + self.sim.random.random())
        self._started = (self.sim.now, seconds)
        self.sim.after(seconds, self._end, self._n_started, None)
        self.host.look_at(self)
        if self.page.unclaimed or self.state._ended:
            self.sim.after(BUSY, self.host.relieve, self, key)
        return True

    def _end(self, number: int, n_done: int | None) -> None:
        """End the running job: with all its items, or so many of them."""
        if not self.alive or not self.is_busy or number != self._n_started:
            return
        state = self.state
        self.is_busy = False
        name, first, n = read(bytes(state.running[-1].argument))  # type: ignore[arg-type]
        now = self.sim.now
        seconds = now - self._started[0]
        if name.startswith("x") and (n_done is None or n_done > n // 2):
            bodies = (b"oh", said(name, first, n // 2))
            self._oldest_result = 0.0
            self.send_all(state.raised("Oh", "no", "tb", bodies, n // 2, seconds))
        else:
            n_done = n if n_done is None else n_done
            state.complete(said(name, first, n_done) + b"!", n_done, seconds)
            self._oldest_result = self._oldest_result or now
        self._has_ended_claim = True
        if not state.held or (self._oldest_result and now - self._oldest_result > FLUSH_AFTER):
            self._report()
        if state.held:
            self._go_on()
        else:
            self.turn()

    def _report(self) -> None:
        if self._has_ended_claim:
            assert self.page.claim is not None
            self._has_ended_claim = False
            self.page.ended.append(self.page.claim.key)
            self.page.claim = None
        self._oldest_result = 0.0
        self.send_all(self.state.flush())

    def report_early(self) -> None:
        """Send what waits in the middle of a job: the supervisor wants it."""
        self._oldest_result = 0.0
        self.send_all(self.state.flush())

    def stop(self, key: Key) -> None:
        """Be interrupted in this job."""
        if self.is_busy and self.page.claim is not None and self.page.claim.key == key:
            self.is_busy = False
            self.state.abandon()
            self._has_ended_claim = True
            self._report()
            self.turn()

    def leave(self) -> None:
        """Finish the running item, take no other, leave."""
        self.is_leaving = True
        if not self.is_busy:
            self.wake()
            return
        began, seconds = self._started
        _, _, n = read(bytes(self.state.running[-1].argument))  # type: ignore[arg-type]
        done = min(n, 1 + int(n * (self.sim.now - began) / seconds))
        self.sim.at(max(self.sim.now, began + done * seconds / n), self._end, self._n_started, done)


class _Known:
    """What a supervisor knows of a server."""

    def __init__(self) -> None:
        self.boot = ""
        self.is_welcome = False
        self.interval = 1.0
        self.beat_at = 0.0
        self.said: deque[tuple[float, str, Message]] = deque()  # (when, to which boot, what)


class Host(Peer):
    """A supervisor and its children, as ``dmap.supervisor`` has them."""

    def __init__(self, sim: Simulation, number: int, n_children: int) -> None:
        super().__init__(sim)
        self.number = number
        self.name = f"host{number}"
        self.session = b"host" + number.to_bytes(12, "big")
        self.known = [_Known() for _ in NAMES]
        self.children: dict[int, Child] = {}
        self.is_leaving = False
        self._n_started = 0
        self._pending: dict[tuple[int, Key], float] = {}  # (child, job) -> until when kept
        self._deaths: deque[tuple[float, Child, str]] = deque(maxlen=1000)
        self._told_of: dict[int, set[Key]] = {}  # child -> jobs of which all is said
        for _ in range(n_children):
            self._start_child()
        self._beat()

    def _start_child(self) -> None:
        if self.alive and not self.is_leaving:
            self._n_started += 1
            self.children[self._n_started] = Child(self, self._n_started)

    # --- what happens to children

    def kill_child(self, child: Child) -> None:
        """Let a child die, of which the supervisor hears at once."""
        if child.alive:
            self.sim.counts["child killed"] += 1
            child.vanish()
            self.sim.soon(0.005, self.bury, child, "SIGKILL")

    def bury(self, child: Child, exit: str) -> None:
        """Tell the servers what a child that ended was running."""
        child.vanish()
        if not self.alive or self.children.pop(child.number, None) is None:
            return
        self._deaths.append((self.sim.now, child, exit))
        for index, known in enumerate(self.known):
            if known.is_welcome:
                self.send(index, self._obituary(index, child, exit))
        if self.is_leaving:
            if not self.children:
                for index in range(len(NAMES)):
                    self.send(index, wire.Goodbye())
                self.sim.after(0.1, self.vanish)
        else:
            self.sim.soon(0.2, self._start_child)

    def _obituary(self, index: int, child: Child, exit: str) -> wire.ChildLost:
        page, told = child.page, self._told_of.get(child.number, set())
        claim = page.claim
        if claim is not None and (not self._is_of(claim.key, index) or claim.key in told):
            claim = None
        ended = [key for key in page.ended if self._is_of(key, index) and key not in told]
        return wire.ChildLost(
            child.number,
            [claim.key.handle] if claim is not None else [],
            0,
            claim.job.n_items if claim is not None else 0,
            exit,
            [key.handle for key in ended],
        )

    def kill(self) -> None:
        """Lose the supervisor, and its children with it."""
        self.sim.counts["host killed"] += 1
        for child in self.children.values():
            child.vanish()
        self.vanish()

    def leave(self) -> None:
        if self.is_leaving:
            return
        self.sim.counts["host drained"] += 1
        self.is_leaving = True
        for child in list(self.children.values()):
            child.leave()

    def relieve(self, child: Child, key: Key) -> None:
        """Give back what a busy child has not started, and have it send what it has done."""
        page = child.page
        if not child.alive or not child.is_busy or page.claim is None or page.claim.key != key:
            return
        handles: dict[tuple[int, str], list[int]] = {}  # (server, boot) -> of what was taken
        for taken in page.take():
            handles.setdefault((taken.server, taken.boot), []).append(taken.handle)
        for (index, boot), some in handles.items():
            self._say(index, boot, wire.GiveBack(some))
        child.report_early()

    def look_at(self, child: Child) -> None:
        """See whether something of this child is to be cancelled."""
        for number, key in [pending for pending in self._pending if pending[0] == child.number]:
            if self._cancel(child, key) or self._pending[number, key] <= self.sim.now:
                del self._pending[number, key]

    def _cancel(self, child: Child, key: Key) -> bool:
        page = child.page
        fail = wire.WorkFail(0, key.handle, "cancelled")
        if page.claim is not None and page.claim.key == key and child.is_busy:
            self._say_of(key, fail)
            self._told_of.setdefault(child.number, set()).add(key)
            self.sim.soon(0.001, child.stop, key)
            return True
        if page.unclaimed.get(key) is False:
            page.unclaimed[key] = True
            self._say_of(key, fail)
            return True
        return False

    # --- what is said

    def _is_of(self, key: Key, index: int) -> bool:
        return key.server == index and key.boot == self.known[index].boot

    def _say_of(self, key: Key, message: Message) -> None:
        self._say(key.server, key.boot, message)

    def _say(self, index: int, boot: str, message: Message) -> None:
        """Say something to a server while it is in that life, now or when it is back."""
        known = self.known[index]
        while known.said and known.said[0][0] < self.sim.now - REPEAT:
            known.said.popleft()
        known.said.append((self.sim.now, boot, message))
        if known.is_welcome and boot == known.boot:
            self.send(index, message)

    def _beat(self) -> None:
        if self.alive:
            for index, known in enumerate(self.known):
                if known.is_welcome and known.beat_at <= self.sim.now:
                    known.beat_at = self.sim.now + known.interval
                    self.send(index, wire.Heartbeat(known.interval))
            self.sim.after(0.5, self._beat)

    def turn(self) -> None:
        for index, what, _ in self.take():
            known = self.known[index]
            if what is Connected:
                self._say_hello(index)
            elif what is Disconnected:
                known.is_welcome = False
            elif isinstance(what, wire.Error):
                assert what.code == "hello_first", what
                self._say_hello(index)
            elif isinstance(what, wire.Welcome):
                self._on_welcome(index, what)
            elif isinstance(what, wire.CancelJob):
                child = self.children.get(what.child)
                if child is not None:
                    key = Key(index, known.boot, what.handle)
                    self._pending[what.child, key] = self.sim.now + PENDING
                    self.look_at(child)

    def _say_hello(self, index: int) -> None:
        running = [
            wire.Running(child.number, claim.job.origin, claim.job.function, claim.job.uniq)
            for child in self.children.values()
            if (claim := child.page.claim) is not None and claim.key.server == index
        ]
        hello = wire.Hello(
            wire.MAJOR,
            wire.MINOR,
            "supervisor",
            self.session,
            "3.11",
            host=self.name,
            boot=self.known[index].boot,
            running=running,
        )
        self.send(index, hello)

    def _on_welcome(self, index: int, welcome: wire.Welcome) -> None:
        known = self.known[index]
        known.boot, known.interval = welcome.boot, welcome.interval or known.interval
        known.is_welcome = True
        known.beat_at = self.sim.now + known.interval
        here = set()
        for child in self.children.values():
            page = child.page
            here.update(page.ended)
            here.update(key for key, is_taken in page.unclaimed.items() if not is_taken)
            if page.claim is not None:
                here.add(page.claim.key)
        for at, boot, message in known.said:
            if at < self.sim.now - REPEAT or boot != known.boot:
                continue
            if isinstance(message, wire.GiveBack):
                handles = [h for h in message.handles if Key(index, known.boot, h) not in here]
                if not handles:
                    continue
                message = wire.GiveBack(handles)
            self.send(index, message)
        for at, child, exit in self._deaths:
            if at >= self.sim.now - REPEAT:
                self.send(index, self._obituary(index, child, exit))
