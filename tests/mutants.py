"""Break the files that think, one line at a time, and see that a test turns red each time.

``make mutants`` runs it. Every edit below is made in a copy of the project, where the tests of that
file then have to fail; an edit after which they pass is a fact that no test knows. The tests are
the fast, pure ones, without chance: what breaks must break always, and by a test that says what.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
N_PROCESSES = 2
TOO_SLOW = "not TestServer and not TestClient and not any_order"
TIMEOUT = 60.0
"""Seconds; an edit that makes a test wait for ever is found by it as well."""

SERVER = ("test_state.py", "test_shared_state.py")
TESTS = {
    "jobserver/state.py": SERVER,
    "jobserver/crew.py": ("test_crew.py", *SERVER),
    "jobserver/queues.py": ("test_queues.py", *SERVER),
    "jobserver/roster.py": ("test_roster.py", *SERVER),
    "jobserver/book.py": ("test_book.py", *SERVER, "test_nested_properties.py"),
    "jobserver/blobs.py": ("test_blobs.py",),
    "jobserver/endings.py": ("test_endings.py",),
    "jobserver/pieces.py": ("test_pieces.py",),
    "dmap/client_state.py": ("test_client_state.py", "test_shared_state.py"),
    "dmap/tickets.py": ("test_client_state.py",),
    "dmap/worker_state.py": (
        "test_worker_state.py",
        "test_shared_state.py",
        "test_nested_properties.py",
    ),
    "dmap/chunks.py": ("test_chunks.py",),
}
"""File that is edited -> its tests."""


class Edit(NamedTuple):
    """One way to break a file. ``old`` occurs in it exactly once."""

    what: str
    old: str
    new: str


EDITS: dict[str, list[Edit]] = {
    "jobserver/state.py": [
        Edit(
            "memory is named to who wants the bytes",
            "message.named and isinstance(body, wire.SharedBody)",
            "isinstance(body, wire.SharedBody)",
        ),
        Edit(
            "memory is shared with whoever listens",
            "if session.machine != machine:",
            "if False:",
        ),
        Edit(
            "results of merged jobs are shared",
            "is_near and not (job.uniq or job.background),\n                    terms",
            "is_near,\n                    terms",
        ),
        Edit(
            "an argument in memory goes to any machine",
            "if terms.referred and not is_near:",
            "if 0:",
        ),
        Edit(
            "a grab whose jobs are all refused is not answered",
            "self._send(worker.peer, wire.NoJob())  # it asks again",
            "pass",
        ),
        Edit(
            "memory that nobody wants is not let go",
            "if shared and message.seq not in worker.lent:",
            "if False:",
        ),
        Edit(
            "memory is let go as soon as its result has come",
            "if shared and message.seq not in worker.lent:",
            "if shared:",
        ),
        Edit(
            "a session that ends keeps workers' memory",
            "self.book.forget_untaken(session)\n        self._say_taken()",
            "self.book.forget_untaken(session)\n        self.book.returned.clear()",
        ),
        Edit(
            "a submit wakes nobody",
            "self._tell(told)\n        self._wake(queue, now)",
            "self._tell(told)",
        ),
        Edit(
            "a job that comes back wakes nobody",
            "self.book.stand(job, front=front)\n        self._wake(job.queue, now)",
            "self.book.stand(job, front=front)",
        ),
        Edit(
            "a grab of a woken worker for another job wakes nobody",
            "        if slept:\n            # It may",
            "        if False:\n            # It may",
        ),
        Edit(
            "pre_sleep with work there is not answered",
            'self.crew.set_sleep(worker, "asleep", now)\n'
            "        self._wake_all(worker.queues, now)",
            'self.crew.set_sleep(worker, "asleep", now)',
        ),
        Edit(
            "a woken worker that is overdue has nobody woken in its place",
            'self.crew.set_sleep(worker, "overdue", now)\n'
            "                self._wake_all(worker.queues, now)",
            'self.crew.set_sleep(worker, "overdue", now)',
        ),
        Edit(
            "who is awake elsewhere has nobody woken in its place",
            'if worker.sleep != "awake":\n            self.crew.set_sleep(worker, "awake", now)\n'
            "            self._wake_all(worker.queues, now)",
            'if worker.sleep != "awake":\n            self.crew.set_sleep(worker, "awake", now)',
        ),
        Edit(
            "a lost worker's queues wake nobody",
            "self._wake_all(queues, now)\n\n    def _fail_lost",
            "\n    def _fail_lost",
        ),
        Edit("jobs come back behind the others", "front=True)", "front=False)"),
        Edit(
            "jobs given back turn round",
            "for handle in reversed(message.handles):\n                    self._give_back(worker",
            "for handle in message.handles:\n                    self._give_back(worker",
        ),
        Edit(
            "jobs that a supervisor gives back turn round",
            "for handle in reversed(message.handles):\n                    job =",
            "for handle in message.handles:\n                    job =",
        ),
        Edit(
            "a submit said twice is two jobs",
            "if ticket in session.tickets:\n                handle",
            "if False:\n                handle",
        ),
        Edit(
            "a background submit said twice is two jobs",
            "elif ticket in session.accepted:",
            "elif False:",
        ),
        Edit(
            "a submit of what has ended runs it again",
            "elif ticket in session.untaken:",
            "elif False:",
        ),
        Edit(
            "what is given back counts as an attempt",
            "job.attempt -= 1\n        self._return(job, now)",
            "self._return(job, now)",
        ),
        Edit(
            "what was not started counts as an attempt",
            "if not ran:\n                job.attempt -= 1",
            "if not ran:\n                pass",
        ),
        Edit(
            "one attempt too many",
            "job.attempt >= job.terms.attempts",
            "job.attempt > job.terms.attempts",
        ),
        Edit(
            "what runs only once may run again",
            "job.terms.attempts == 1",
            "job.terms.attempts == 0",
        ),
        Edit(
            "an assignment that could not be sent is left there",
            "self._give_back(who, entry.handle, now)",
            "pass",
        ),
        Edit(
            "what a worker does not hold at its Hello stays assigned",
            "for handle in [handle for handle in reversed(worker.held) if handle not in holding]:",
            "for handle in []:",
        ),
        Edit(
            "a supervisor speaks of the jobs of others",
            "and job.worker.supervisor is supervisor",
            "",
        ),
        Edit(
            "a result is not acknowledged",
            "self._tell_together(told)\n        self._accept_work(worker, message.seq)",
            "self._tell_together(told)",
        ),
        Edit(
            "a job joins the one that it is inside of",
            "if live is not None and around and live.origin in around:",
            "if False:",
        ),
        Edit("a draining server takes on jobs", "if missing or self.draining:", "if missing:"),
        Edit("a worker gets all that is ready", "1e-6)), fair, grab.n", "1e-6)), grab.n"),
        Edit(
            "a worker that lives is not told that it was lost",
            'self._send(worker.peer, wire.Error("hello_first", again))',
            "pass",
        ),
        Edit(
            "a dead child is believed to run what it did",
            "self._forget_adoptable(supervisor, message.child)",
            "pass",
        ),
        Edit(
            "what a child got here is believed to be of an earlier boot",
            "if any(job.origin == running.origin for job in held):",
            "if False:",
        ),
        Edit(
            "a cancel that was missed is not said again",
            "if job.unwanted:\n                    self._send(",
            "if False:\n                    self._send(",
        ),
    ],
    "jobserver/crew.py": [
        Edit(
            "only one sleeper is woken at a time",
            "queue.n_woken < queue.n_ready",
            "not queue.n_woken",
        ),
        Edit("every job wakes a sleeper", "queue.n_woken < queue.n_ready", "queue.n_ready"),
        Edit(
            "the last one asleep is woken",
            "next(iter(queue.sleepers))",
            "next(reversed(queue.sleepers))",
        ),
        Edit(
            "functions take no turns", "(priority, queue.served) < best[:2]", "priority < best[0]"
        ),
        Edit(
            "priorities hold within a queue only",
            "(priority, queue.served) < best[:2]",
            "queue.served < best[1]",
        ),
        Edit("a turn is not noted", "best[2].served = self._n_grabs", "pass"),
        Edit("a new ability wakes nobody", "joined.append(queue)", "pass"),
        Edit("an ability that ends wakes nobody", "parted.append(queue)", "pass"),
        Edit(
            "a worker that goes wakes nobody",
            "queues = list(worker.queues)",
            "queues: list[Queue] = []",
        ),
        Edit(
            "the newest time is the average",
            "function.seconds += weight * (seconds - function.seconds)",
            "function.seconds = seconds",
        ),
        Edit(
            "who parts is still counted as a sleeper",
            "self._count_sleep(worker, queue, worker.sleep, -1)\n        del worker.queues[queue]",
            "del worker.queues[queue]",
        ),
        Edit("idle queues are kept for ever", "if len(self._idle) > _IDLE_QUEUES:", "if False:"),
        Edit("a function without use is kept", "del self.functions[function.name]", "pass"),
        Edit(
            "a new queue has no workers",
            "if needs.met_by(worker):\n                    self._join(worker, queue)",
            "pass",
        ),
        Edit("a queue with jobs is taken for idle", "self._idle.pop(queue, None)", "pass"),
        Edit(
            "whoever has the function gets the job",
            "queue not in worker.queues and queue.needs.met_by(worker)",
            "queue not in worker.queues",
        ),
    ],
    "jobserver/queues.py": [
        Edit("append for appendleft", "found.jobs.appendleft(job)", "found.jobs.append(job)"),
        Edit("lanes take no turns", "turns.rotate(-1)", "pass"),
        Edit(
            "a job that just fits stays",
            "None and job.nbytes > nbytes",
            "None and job.nbytes >= nbytes",
        ),
        Edit(
            "a job that just fits does not follow",
            "if job.nbytes > nbytes:",
            "if job.nbytes >= nbytes:",
        ),
        Edit(
            "what was popped elsewhere follows",
            "if not job.stands_at:\n                w",
            "if False:\n                w",
        ),
        Edit(
            "a job follows one that runs only once", "may_follow = job.terms.attempts > 1", "pass"
        ),
        Edit(
            "a job of another lane follows one that runs only once",
            "and nbytes > 0 and jobs[-1].terms.attempts > 1:",
            "and nbytes > 0:",
        ),
        Edit("what followed still counts as ready", "self.n_ready -= n_ready", "pass"),
        Edit(
            "what followed still counts at its priority", "self.ready[priority] -= n_ready", "pass"
        ),
        Edit("what followed leaves its lane behind", "if not waiting:", "if False:"),
        Edit("one of several lanes gives all that follows", "if len(turns) == 1:", "if turns:"),
        Edit("any number follows", "may_follow and len(jobs) < n and", "may_follow and"),
        Edit(
            "a job of two priorities that followed counts on at one",
            "if job.stands_at == bit:",
            "if True:",
        ),
        Edit(
            "a job that does not fit goes",
            "if nbytes is not None and job.nbytes > nbytes:",
            "if False:",
        ),
        Edit("entries are never swept", "if self._n_entries > self._sweep_at:", "if False:"),
        Edit(
            "a queue that is left by its last job keeps the entries",
            "self._unstand(job)\n        if not self.n_ready:",
            "self._unstand(job)\n        if False:",
        ),
        Edit(
            "what was popped from another lane is popped again",
            "            if job.stands_at:\n",
            "            if True:\n",
        ),
        Edit(
            "a job in two lanes counts twice",
            "if not job.stands_at:\n            self.n_ready += 1",
            "self.n_ready += 1",
        ),
        Edit(
            "a job in two lanes of a priority counts twice there",
            "if not job.stands_at & 1 << priority:",
            "if True:",
        ),
        Edit(
            "a popped job still counts as ready",
            "self._n_entries -= 1\n                self._unstand(job)",
            "self._n_entries -= 1",
        ),
        Edit(
            "an emptied lane keeps its turn",
            "del lanes[lane]\n                turns.remove(found)",
            "del lanes[lane]",
        ),
        Edit("labels are not asked for", "and self.labels <= worker.labels", ""),
        Edit(
            "the Python is not asked for", "not self.python or self.python == worker.python", "True"
        ),
        Edit(
            "a sweep drops ready jobs",
            "lane.jobs = deque(job for job in lane.jobs if job.stands_at)",
            "lane.jobs = deque(job for job in lane.jobs if not job.stands_at)",
        ),
    ],
    "jobserver/roster.py": [
        Edit("a replaced link still speaks", "del self.peers[known.peer]", "pass"),
        Edit("a session that came back is taken for gone", "found.gone_at = None", "pass"),
        Edit("a supervisor that came back is taken for gone", "supervisor.gone_at = None", "pass"),
        Edit(
            "a supervisor that came back is taken for silent",
            "supervisor.gone_at = None\n                supervisor.heard_at = now",
            "supervisor.gone_at = None",
        ),
        Edit(
            "a connection becomes another", "if who is not None and who is not known:", "if False:"
        ),
        Edit(
            "any number of peers",
            "if who is None and len(self.peers) >= self.limits.n_peers:",
            "if False:",
        ),
        Edit(
            "a child that has ended comes back", "if hello.child in supervisor.ended:", "if False:"
        ),
        Edit(
            "a session whose link is gone never ends",
            "self._schedule(who, now + self.limits.session_ttl)",
            "pass",
        ),
        Edit(
            "a supervisor whose link is gone is lost by silence only",
            "supervisor.gone_at = now\n",
            "pass\n",
        ),
        Edit(
            "a supervisor's words are no signs of life",
            "if isinstance(who, Supervisor):\n            who.heard_at = now",
            "if isinstance(who, Supervisor):\n            pass",
        ),
        Edit("a lone worker's words are no signs of life", "who.supervisor.heard_at = now", "pass"),
        Edit(
            "who was looked at is not looked at again",
            "elif ends is not None:\n                    self._schedule(who, ends)",
            "pass",
        ),
        Edit(
            "silence is no loss",
            "self._schedule(supervisor, now + self.limits.worker_ttl)",
            "supervisor.due = 1e99",
        ),
        Edit(
            "a child's lost link is its supervisor's",
            "if supervisor is who or supervisor.peer == peer:",
            "if True:",
        ),
        Edit("who has left can still speak", "self.peers.pop(who.peer, None)", "pass"),
        Edit("a look for each sign of life", "if who.due is None or when < who.due:", "if True:"),
    ],
    "jobserver/book.py": [
        Edit(
            "memory is let go by the first of its listeners",
            "if not worker.lent[seq]:",
            "if worker.lent[seq] >= 0:",
        ),
        Edit(
            "a result in memory comes as another when said again",
            "first.n_items, first.shared)",
            "first.n_items)",
        ),
        Edit(
            "nobody knows who waits for a job that was joined",
            "around.update(terms.ancestors)",
            "pass",
        ),
        Edit(
            "who waits through two joins may be joined",
            "todo += self.around.get(origin, ())",
            "pass",
        ),
        Edit(
            "who waited for an ended job is remembered",
            "self.unmerge(job)\n        if self.around:",
            "self.unmerge(job)\n        if False:",
        ),
        Edit("a large job never goes", "or (one and not session.nbytes)", ""),
        Edit(
            "what a client does not take is not held against it",
            "len(session.tickets) + len(session.untaken) + len(session.accepted)",
            "len(session.tickets)",
        ),
        Edit(
            "the server has no limit of its own",
            "len(self.jobs) + n_jobs <= limits.max_jobs\n            and ",
            "",
        ),
        Edit(
            "a background submit that joins does not keep the job",
            "job.background = True\n            session.accepted[ticket] = job.handle",
            "session.accepted[ticket] = job.handle",
        ),
        Edit(
            "a joined job stands in its first lane only",
            "if job.state == READY:\n                job.queue.push(job, *lane)",
            "pass",
        ),
        Edit(
            "a second submit in the same lane counts as another",
            "if lane not in job.also:",
            "if True:",
        ),
        Edit(
            "a background job ends with its last listener",
            "return job.is_listened_to or job.background",
            "return job.is_listened_to",
        ),
        Edit(
            "a returned job stands in its first lane only",
            "job.queue.push(job, lane, priority, front=front)\n\n    @staticmethod\n    def assign",
            "pass\n\n    @staticmethod\n    def assign",
        ),
        Edit("an attempt is forgotten", "job.attempt += 1", "pass"),
        Edit("the status of a lost run lives on", "job.progress = None", "pass"),
        Edit(
            "an ended job can be joined",
            "job.session = job.others = None\n        self.unmerge(job)",
            "job.session = job.others = None",
        ),
        Edit(
            "taken results still count",
            "session.nbytes -= untaken.nbytes\n                self.nbytes",
            "self.nbytes",
        ),
        Edit(
            "ended jobs hold their blobs",
            "if job.terms.blobs:\n            self.blobs",
            "if False:\n            self.blobs",
        ),
        Edit(
            "completed jobs hold their blobs",
            "if job.terms.blobs:\n                self.blobs",
            "if False:\n                self.blobs",
        ),
        Edit("what completed counts no more", "session.nbytes += end.nbytes - job.nbytes", "pass"),
        Edit("one ticket twice in a list is two jobs", "len(set(tickets)) < len(tickets)", "False"),
        Edit(
            "a list of which one is known is new",
            "or not session.tickets.keys().isdisjoint(tickets)",
            "",
        ),
        Edit(
            "a list of which one was in the background is new",
            "or not session.accepted.keys().isdisjoint(tickets)",
            "",
        ),
        Edit(
            "a list of which one has ended is new",
            "or not session.untaken.keys().isdisjoint(tickets)",
            "",
        ),
        Edit(
            "a list that is too large is taken whole",
            "of_session + n_jobs <= limits.session_jobs",
            "of_session < limits.session_jobs",
        ),
        Edit(
            "the results of a client that left still count",
            "self.nbytes -= session.nbytes\n        session",
            "session",
        ),
        Edit(
            "an ended job keeps its argument",
            'self.nbytes -= job.nbytes\n        job.argument = b""',
            "self.nbytes -= job.nbytes",
        ),
        Edit("a completed job keeps its argument", "if job.also:\n", "if False:\n"),
        Edit("one uniq twice in a list is two jobs", "len(set(given)) < len(given)", "False"),
        Edit(
            "a list of which one can join is new",
            "not function.merged.keys().isdisjoint(given)",
            "False",
        ),
        Edit(
            "a completed background job is forgotten",
            'self.endings.remember(handle, Ended(now, "complete"',
            '(handle, Ended(now, "complete"',
        ),
        Edit("a completed job can be joined", "self.unmerge(job)\n                if", "if"),
        Edit(
            "who waited for a completed job is remembered",
            "if self.around:\n                    self",
            "if False:\n                    self",
        ),
    ],
    "jobserver/blobs.py": [
        Edit("any bytes under any name", "if digest(body) != blob:", "if False:"),
        Edit("what never has room is read", "if nbytes > self.max_nbytes:", "if False:"),
        Edit(
            "no budget",
            "if self.nbytes + nbytes > self.max_nbytes:\n            raise",
            "if False:\n            raise",
        ),
        Edit("what jobs need is dropped", "self._free.pop(blob, None)", "pass"),
        Edit("what was used lately is dropped first", "self._free.move_to_end(blob)", "pass"),
        Edit(
            "released bytes are never dropped",
            "self._free[blob] = None\n\n    def _touch",
            "pass\n\n    def _touch",
        ),
    ],
    "jobserver/endings.py": [
        Edit("any number is kept", "len(self._ended) > n_ended or ", ""),
        Edit("any bytes are kept", "or self.nbytes > ended_nbytes", ""),
        Edit(
            "an older end hides a newer one",
            "if self._by_uniq.get((ended.function, ended.uniq)) == handle:",
            "if True:",
        ),
        Edit("nothing grows old", ".at < at:", ".at < 0:"),
    ],
    "jobserver/pieces.py": [
        Edit("no budget", "and (not self.nbytes or self.nbytes + nbytes <= self.max_nbytes)", ""),
        Edit("the last to come is served first", "if first is link and", "if True and"),
        Edit("a window without a bound", "room = WINDOW_NBYTES - sum", "room = 2**60 - sum"),
        Edit(
            "a twin waits for its own message",
            "if twin is not None and twin.reserved:",
            "if False:",
        ),
        Edit(
            "a dropped transfer keeps its bytes",
            "if sink.reserved:\n                self._budget.nbytes -= sink.nbytes",
            "if False:\n                self._budget.nbytes -= sink.nbytes",
        ),
        Edit("a dropped transfer stays in the line", "self._budget.leave(self)", "pass"),
        Edit("more than was granted is taken", "or received > self.granted", ""),
        Edit("all large messages are offered at once", "and self._n_offered < MAX_OFFERED", ""),
        Edit("any size is taken", "if offer.nbytes > self._max_incoming_nbytes:", "if False:"),
    ],
    "dmap/client_state.py": [
        Edit(
            "memory is shared although it cannot be opened",
            "server.unshared_until = now + server.unshared",
            "pass",
        ),
        Edit(
            "what runs at most once is shared",
            "shared = server.shared and terms.shared",
            "shared = server.shared",
        ),
        Edit(
            "a shared result is acknowledged late",
            "server.take_at = now  # its worker",
            "pass  # its worker",
        ),
        Edit(
            "arguments are referred to by way of any server",
            "and server.machine == self.hello.machine",
            "",
        ),
        Edit(
            "results are not acknowledged",
            "            taken.append(number)\n            ticket = tickets.pop",
            "            ticket = tickets.pop",
        ),
        Edit(
            "nothing is beyond the credit",
            "n_out < server.max_jobs and nbytes_out + size <= server.max_nbytes",
            "True",
        ),
        Edit(
            "a job larger than the credit waits for ever", "within = not n_out or (", "within = ("
        ),
        Edit(
            "a lost job is no resubmit",
            "        ticket.resubmit = True\n        ticket.lost_at",
            "        ticket.lost_at",
        ),
        Edit(
            "a lost server's jobs stay there",
            "if server.n_out and server.lost and self._candidates():",
            "if False:",
        ),
        Edit(
            "what was refused goes behind the others",
            "deque()).appendleft(ticket)",
            "deque()).append(ticket)",
        ),
        Edit(
            "what has moved is not cancelled where it was",
            "                server.cancels.add(ticket.number)\n"
            "                self._lose(ticket, server)",
            "                self._lose(ticket, server)",
        ),
        Edit(
            "a cancel is not said",
            "            if at is not server:\n                at.cancels.add(ticket.number)\n"
            "        elif",
            "        elif",
        ),
        Edit(
            "a cancel that was lost is not said again",
            "self._say_ranges(server, wire.CancelJobs, server.cancelling)",
            "pass",
        ),
        Edit("a busy server is not left alone", "server.paused_until = now + server.pause", "pass"),
        Edit(
            "jobs do not wait for a large blob",
            "ready = ready and nbytes <= wire.BODY_NBYTES",
            "pass",
        ),
        Edit(
            "a blob that was dropped is not put again",
            "server.blobs.difference_update(message.blobs)",
            "pass",
        ),
        Edit("a blob is put with each submit", "if blob.id not in server.putting:", "if True:"),
        Edit(
            "memory is named again to who cannot open it",
            "isinstance(blob.body, wire.SharedBody) and not server.unopened",
            "isinstance(blob.body, wire.SharedBody)",
        ),
        Edit(
            "what goes after all is counted twice", "if blob.id not in server.unopened:", "if True:"
        ),
        Edit("equal requests do not meet", "if terms.by_uniq and ticket.uniq:", "if False:"),
        Edit(
            "a map does not stay where it is",
            "if lane is None or lane.server not in candidates:",
            "if True:",
        ),
        Edit(
            "the first server to speak is chosen",
            '            if server.status == "fresh":\n                return []\n',
            "",
        ),
        Edit(
            "a silent server is never lost",
            "return server.heard_at + SILENCE * server.interval",
            "return math.inf",
        ),
        Edit(
            "a broken link moves its jobs at once",
            "return server.since + GRACE",
            "return server.since",
        ),
        Edit("a job that may run once runs again", "if ticket.terms.once:", "if False:"),
        Edit(
            "a lost submit is not said again",
            "self._requeue(server, [ticket for ticket in there if ticket.stage == SENT])",
            "pass",
        ),
        Edit(
            "listeners are forgotten with their link",
            "server.out.append((wire.Attach(attached.number, attached.handle), ()))",
            "pass",
        ),
        Edit(
            "jobs wait where nobody can do them",
            "terms.avoid = frozenset(server for server, n in probe.counts.items() if not n)",
            "terms.avoid = frozenset()",
        ),
        Edit(
            "a draining server gets more",
            "found.append(server)\n        return found",
            "found.append(server)\n        return found or self.servers",
        ),
    ],
    "dmap/tickets.py": [
        Edit("what moved is not marked", "            resubmit,\n", "            False,\n"),
        Edit(
            "jobs go by another name",
            "            self.function,\n            jobs",
            '            "g",\n            jobs',
        ),
        Edit(
            "a server is lost as soon as its link breaks",
            'return self.status == "down"',
            'return self.status in ("down", "broken")',
        ),
        Edit(
            "a blob is named by its bytes",
            "blob.id for blob in self.blobs",
            "blob.body[:32] for blob in self.blobs",
        ),
    ],
    "dmap/worker_state.py": [
        Edit(
            "memory is let go when its report is accepted",
            "if _is_lent(there.unaccepted[seq]):",
            "if False:",
        ),
        Edit(
            "a worker drains with its memory lent",
            "or any(there.unaccepted for there in self._servers)\n        )",
            ")",
        ),
        Edit(
            "memory is let go as soon as its server is away",
            "now >= there.away_since + LENT_WITHOUT",
            "now >= there.away_since",
        ),
        Edit(
            "what is lent does not hold up more work",
            "return nbytes_of(body) + (body.shared if type(body) is Reference else 0)",
            "return nbytes_of(body)",
        ),
        Edit(
            "a job that runs inside another knows only those of its submit",
            "job.ancestors = tuple(known)",
            "pass",
        ),
        Edit("other servers believe it asleep", "sends.append(Send(index, Awake()))", "pass"),
        Edit(
            "it sleeps at some servers only",
            "for index in empty:\n            self._servers[index].phase = Phase.ASLEEP\n"
            "        return [Send(index, PreSleep()) for index in empty]",
            "for index in empty:\n            self._servers[index].phase = Phase.ASLEEP\n"
            "        return [Send(index, PreSleep()) for index in empty[:1]]",
        ),
        Edit("a noop is overheard", "there.phase = Phase.WOKEN", "pass"),
        Edit(
            "the same server is asked first each time",
            "self._next = (index + 1) % n_servers",
            "pass",
        ),
        Edit(
            "a server that does not answer holds up all",
            "patience = OVERDUE if len(self._servers) > 1 or self.running else",
            "patience =",
        ),
        Edit(
            "it wakes up for nothing",
            "return None  # the answer is overdue, perhaps, but holds up nobody",
            "pass",
        ),
        Edit("a result is said once", "there.unaccepted[report.seq] = unaccepted", "pass"),
        Edit(
            "an accepted result is kept",
            "report = there.unaccepted.pop(seq)",
            "report = there.unaccepted[seq]",
        ),
        Edit(
            "a Hello does not tell what was reported",
            "holding += [job.handle for job in report.jobs]",
            "pass",
        ),
        Edit(
            "a Hello tells of another boot's jobs",
            "if held.server == server and held.boot == there.boot\n",
            "if held.server == server\n",
        ),
        Edit(
            "a restarted server is told handles",
            "if report.boot == boot:\n        return report.message",
            "return report.message",
        ),
        Edit(
            "what a restarted server gave is run",
            "self._drop(held for held in self.held if held.server == server)",
            "pass",
        ),
        Edit(
            "a result overtakes the ones before it",
            "sends = self.flush()\n        held = self.running.pop()\n"
            "        report = WorkException",
            "sends: list[Send] = []\n        held = self.running.pop()\n"
            "        report = WorkException",
        ),
        Edit("results of two functions go together", "or _kind(ended.held) != kind", ""),
        Edit(
            "it works on while nothing is accepted",
            "or self._unaccepted_nbytes > MAX_UNACCEPTED_NBYTES:\n            return []",
            ":\n            return []",
        ),
        Edit(
            "in a drain it takes on jobs",
            "self._lanes if self.running else [] if self.draining else None",
            "self._lanes if self.running else None",
        ),
        Edit(
            "it gives back to a server that restarted",
            "return there.phase is not Phase.AWAY and there.boot == held.boot",
            "return there.phase is not Phase.AWAY",
        ),
    ],
    "dmap/chunks.py": [
        Edit(
            "sizes jump",
            "max(2.0, min(16.0, _n_items_in(FLOOR, self.last * self.recent[-1][1])))",
            "64",
        ),
        Edit(
            "a chunk is as long as it likes",
            "_n_items_in(TARGET, cost))))",
            "_n_items_in(60.0, cost))))",
        ),
        Edit(
            "the end is not shared",
            "if self._uncut is not None:\n            even",
            "if False:\n            even",
        ),
        Edit(
            "the worst of the last few is forgotten",
            "max(self.mean(), max(cost for _, cost in self.recent))",
            "self.mean()",
        ),
        Edit("nothing is ahead", "CHUNKS_AHEAD = 2", "CHUNKS_AHEAD = 1"),
        Edit("what came back is not shared again", "self._uncut += n_items", "pass"),
        Edit("a fixed size is no size", "return self._fixed\n", "return 1\n"),
        Edit(
            "what comes home in part is cut as large again",
            "side.last = min(side.last, max(n for n, _ in side.recent))",
            "pass",
        ),
        Edit("the last items go one by one", "max(share, _n_items_in(LEAST, cost))", "share"),
        Edit(
            "all comes from the front",
            "return back.mean() > END_FACTOR * front.mean()",
            "return False",
        ),
        Edit("the end is not looked at", "return back.n_cut < front.n_cut", "return False"),
        Edit(
            "both ends have one estimate",
            "side = self._sides[from_end]\n        if not",
            "side = self._sides[0]\n        if not",
        ),
    ],
}


UNBROKEN = Edit("(as it is)", "", "")
"""To be passed by all tests, or else it says nothing that they fail."""


class Result(NamedTuple):
    """What the tests of a file said to an edit of it."""

    file: str
    edit: Edit
    verdict: str
    detail: str = ""  # the test that failed

    @property
    def is_right(self) -> bool:
        return self.verdict == ("green" if self.edit is UNBROKEN else "red")


def try_edit(tree: Path, file: str, edit: Edit) -> Result:
    """Break one file of a copy of the project, run its tests, and mend it."""
    path = tree / file
    source = path.read_text()
    if edit is not UNBROKEN:
        n = source.count(edit.old)
        if n != 1:
            return Result(file, edit, "ERROR", f"its old text occurs {n} times")
        path.write_text(source.replace(edit.old, edit.new))
    try:
        return Result(file, edit, *run_tests(tree, TESTS[file]))
    finally:
        path.write_text(source)


def run_tests(tree: Path, names: tuple[str, ...]) -> tuple[str, str]:
    """Return whether the tests are red or green, and the first that failed."""
    arguments = ["-x", "-q", "--tb=no", "--no-header", "-p", "no:cacheprovider"]
    arguments += ["--hypothesis-seed=0", "-m", "not slow", "-k", TOO_SLOW]
    arguments += [str(Path("tests", name)) for name in names]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return "red", "a test that never ends"
    if done.returncode == 0:
        return "green", ""
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED ", "ERROR ")) and "::" in line:
            return "red", line.partition("::")[2].partition(" - ")[0]
    return "ERROR", done.stdout[-500:] + done.stderr[-500:]  # it does not even start


def copy_project(tree: Path) -> None:
    """Copy what the tests need."""
    for name in ("jobserver", "dmap", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)


def main(wanted: list[str]) -> int:
    """Try all edits (of the files whose names contain one of the words). Return the exit code."""
    todo = [
        (file, edit)
        for file, edits in EDITS.items()
        if not wanted or any(word in file for word in wanted)
        for edit in (UNBROKEN, *edits)
    ]
    began = time.monotonic()
    wrong: list[Result] = []
    trees: SimpleQueue[Path] = SimpleQueue()

    def try_one(of: tuple[str, Edit]) -> Result:
        tree = trees.get()
        try:
            return try_edit(tree, *of)
        finally:
            trees.put(tree)

    with (
        tempfile.TemporaryDirectory(prefix="dmap-mutants-") as folder,
        ThreadPoolExecutor(N_PROCESSES) as pool,
    ):
        for n in range(N_PROCESSES):
            copy_project(Path(folder, str(n)))
            trees.put(Path(folder, str(n)))
        for result in pool.map(try_one, todo):
            name = result.file.removeprefix("jobserver/")
            print(f"{name:20} {result.verdict:6} {result.edit.what:60} {result.detail}", flush=True)
            if not result.is_right:
                wrong.append(result)
    seconds = time.monotonic() - began
    n_edits = sum(edit is not UNBROKEN for _, edit in todo)
    for result in wrong:
        print(f"not found: {result.file}: {result.edit.what} ({result.verdict})")
    print(f"{n_edits} edits in {seconds:.0f} s, {len(wrong) or 'none'} not found by a test")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
