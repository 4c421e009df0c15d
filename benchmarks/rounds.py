"""Ask a question of all its ways, in rounds. The processes that do it are in ``runner``."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.harness import (
    CALL_TIMEOUT,
    CLOSE_TIMEOUT,
    START_TIMEOUT,
    Question,
    Row,
)
from benchmarks.peers import PEERS
from benchmarks.processes import descendants, end_descendants, signal_all

ROOT = Path(__file__).parent.parent
SETTLE = 0.2
"""Seconds that a peer which was stopped gets for what it has missed."""


class WayFailed(Exception):
    """A way cannot be measured; the message says why."""


class Runner:
    """The process of one way. Blocks until it is ready, or has failed.

    Attributes:
        row: What has come of it so far.

    Raises:
        WayFailed: it did not become ready.
    """

    def __init__(self, question: Question, number: int, n: int, seconds: float | None) -> None:
        way = question.ways[number]
        self.row = Row(way.who, way.peer)
        self._is_restless = way.peer in PEERS and PEERS[way.peer].is_restless
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        read_fd, self._orders = os.pipe()
        self._answers, write_fd = os.pipe()
        self._heard = b""
        argv = [sys.executable, "-m", "benchmarks.runner", question.name, str(number)]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [*argv, str(read_fd), str(write_fd), str(n), "" if seconds is None else str(seconds)],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(paths),
                # mpi4py's library looks for its own programs there.
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            },
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(read_fd, write_fd),
            start_new_session=True,
        )
        os.close(read_fd)
        os.close(write_fd)
        try:
            ready = self._hear(START_TIMEOUT, "to start")
        except WayFailed:
            self.close()
            raise
        self.row.who, self.row.n = ready["who"], ready["n"]
        self.rest()

    def take(self) -> None:
        """Run a round.

        Raises:
            WayFailed: it ended, raised, or took too long. It must be closed.
        """
        if self._is_restless:
            signal_all(descendants(self._process.pid), signal.SIGCONT)
            signal_all([self._process.pid], signal.SIGCONT)
            time.sleep(SETTLE)
        os.write(self._orders, b"\n")
        for unit, value in self._hear(CALL_TIMEOUT, "in a round")["values"].items():
            self.row.values.setdefault(unit, []).append(float(f"{value:.5g}"))
        self.rest()

    def rest(self) -> None:
        """Stop what would use the processor while others are measured."""
        if self._is_restless:
            signal_all([self._process.pid, *descendants(self._process.pid)], signal.SIGSTOP)

    def close(self) -> None:
        """End the peer, its processes and its runner."""
        pid = self._process.pid
        signal_all([*descendants(pid), pid], signal.SIGCONT)
        os.close(self._orders)
        try:
            self._process.wait(CLOSE_TIMEOUT if not self.row.failed else 0.1)
        except subprocess.TimeoutExpired:
            end_descendants(pid)
            self._process.kill()
            self._process.wait()
        os.close(self._answers)
        self._log.close()

    def _hear(self, timeout: float, when: str) -> dict[str, Any]:
        """Return the runner's next line."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._heard:
            has_ended = self._process.poll() is not None
            readable, _, _ = select.select([self._answers], [], [], 0 if has_ended else 0.2)
            if readable and (read := os.read(self._answers, 65536)):
                self._heard += read
            elif has_ended:
                raise self._failed(f"ended with {self._process.returncode}: {self._last_words()}")
            elif time.monotonic() > deadline:
                raise self._failed(f"took more than {timeout:.0f} s {when}")
        line, _, self._heard = self._heard.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        if "failed" in said:
            raise self._failed(said["failed"])
        return said

    def _failed(self, why: str) -> WayFailed:
        self.row.failed = " ".join(why.split())[:200]
        self.row.values.clear()
        return WayFailed(self.row.failed)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read()[-4000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no word"


def ask(
    question: Question,
    n_rounds: int,
    *,
    is_quick: bool = False,
    peers: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Return a row for each way, in the order of the question.

    Args:
        question: What is asked. It must be in ``benchmarks.questions``.
        n_rounds: Of each way.
        is_quick: Whether to take the smaller number of items.
        peers: Only these, and dmap, and the limits; None for all.
        say: Hears what goes on.
    """
    n = question.quick_n if is_quick else question.n
    seconds = question.seconds
    if seconds is not None and is_quick:
        seconds /= 4
    n_rounds = min(n_rounds, question.n_rounds or n_rounds)
    rows: dict[int, Row] = {}
    runners: dict[int, Runner] = {}
    try:
        for number, way in enumerate(question.ways):
            if peers is not None and way.peer not in {"dmap", "limit", *peers}:
                continue
            if way.peer in PEERS and (why := PEERS[way.peer].missing()):
                rows[number] = Row(way.who, way.peer, failed=why)
                continue
            say(f"{question.name}: starting {way.who}")
            try:
                runners[number] = Runner(question, number, n, seconds)
                rows[number] = runners[number].row
            except WayFailed as error:
                rows[number] = Row(way.who, way.peer, failed=str(error))
        for number in range(n_rounds):
            order = list(runners)
            first = number % len(order) if order else 0
            for one in order[first:] + order[:first]:
                say(f"{question.name}: round {number + 1}, {rows[one].who}")
                try:
                    runners[one].take()
                except WayFailed:
                    runners.pop(one).close()
    finally:
        for runner in runners.values():
            runner.close()
    for peer, why in question.untaken.items():
        if peers is None or peer in peers:
            rows[len(rows) + len(question.ways)] = Row(PEERS[peer].title, peer, failed=why)
    return [rows[number] for number in sorted(rows)]
