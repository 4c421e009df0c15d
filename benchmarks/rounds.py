"""Ask a question of all its ways, in rounds. The processes that do it are in ``runner``."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from benchmarks.harness import (
    CALL_TIMEOUT,
    CLOSE_TIMEOUT,
    SETTLE_TIMEOUT,
    START_TIMEOUT,
    Question,
    Row,
)
from benchmarks.peers import PEERS
from benchmarks.processes import descendants, end_descendants, signal_all

ROOT = Path(__file__).parent.parent
AWAKE = 0.2
"""Seconds that a peer which was stopped gets for what it has missed."""


class WayFailed(Exception):
    """A way cannot be measured; the message says why."""


class Runner:
    """The process of one way.

    Attributes:
        rows: What has come of it so far: by default, and with its best chunk size.
    """

    def __init__(self, question: Question, number: int, n: int, seconds: float | None) -> None:
        way = question.ways[number]
        self.rows = [Row(way.who, way.peer)]
        self._is_restless = way.peer in PEERS and PEERS[way.peer].is_restless
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        # What peers leave behind, logs and profiles, goes with it.
        self._folder = tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)
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
                **dict.fromkeys(("TMPDIR", "RAY_TMPDIR", "IPYTHONDIR"), self._folder.name),
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

    # Each of these raises WayFailed if it ended, raised, or took too long.

    def wait_up(self) -> None:
        """Wait until its peer is up."""
        self._hear(START_TIMEOUT, "to start")
        self._rest()

    def settle(self) -> None:
        """Find its sizes, and with that its rows."""
        peer = self.rows[0].peer
        rows = self._order(SETTLE_TIMEOUT, "to find its sizes")["rows"]
        self.rows = [Row(row["who"], peer, row["n"]) for row in rows]

    def take(self) -> None:
        """Run a round."""
        for row, values in zip(
            self.rows, self._order(CALL_TIMEOUT, "in a round")["values"], strict=True
        ):
            for unit, value in values.items():
                row.values.setdefault(unit, []).append(float(f"{value:.5g}"))

    def let_go(self) -> None:
        """Have it end, and do not wait for that. Harmless a second time."""
        if self._orders >= 0:
            signal_all([*descendants(self._process.pid), self._process.pid], signal.SIGCONT)
            os.close(self._orders)
            self._orders = -1

    def close(self) -> None:
        """End the peer, its processes and its runner."""
        self.let_go()
        try:
            self._process.wait(0.1 if self.rows[0].failed else CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            end_descendants(self._process.pid)
            self._process.kill()
            self._process.wait()
        os.close(self._answers)
        self._log.close()
        self._folder.cleanup()

    def _order(self, timeout: float, when: str) -> dict[str, Any]:
        """Have something done, and return what came of it."""
        if self._is_restless:
            signal_all([*descendants(self._process.pid), self._process.pid], signal.SIGCONT)
            time.sleep(AWAKE)
        with suppress(BrokenPipeError):  # it has ended: that is heard
            os.write(self._orders, b"\n")
        said = self._hear(timeout, when)
        self._rest()
        return said

    def _rest(self) -> None:
        """Stop what would use the processor while others are measured."""
        if self._is_restless:
            signal_all([self._process.pid, *descendants(self._process.pid)], signal.SIGSTOP)

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
                raise self._failed(f"took more than {timeout:g} s {when}")
        line, _, self._heard = self._heard.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        if "failed" in said:
            raise self._failed(said["failed"])
        return said

    def _failed(self, why: str) -> WayFailed:
        for row in self.rows:
            row.failed = shortened(why)
            row.values.clear()
        return WayFailed(self.rows[0].failed)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read()[-4000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no word"


def shortened(why: str) -> str:
    """Return the first words of a reason, in one line."""
    return textwrap.shorten(why, 120, placeholder=" ...")


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
        seconds /= 2
    if question.n_rounds is not None:
        n_rounds = 1 if is_quick else min(n_rounds, question.n_rounds)
    rows: dict[int, list[Row]] = {}
    runners: dict[int, Runner] = {}

    def step(number: int, what: str, act: Callable[[Runner], None]) -> None:
        say(f"{question.name}: {what}, {question.ways[number].who}")
        runner = runners[number]
        try:
            act(runner)
        except WayFailed as error:
            say(f"{question.name}: failed, {error}")
            runners.pop(number).close()
        rows[number] = runner.rows

    def is_slow(number: int) -> bool:
        """Tell whether a way has its turn in every other round only."""
        peer = PEERS.get(question.ways[number].peer)
        return peer is not None and peer.is_slow

    try:
        for number, way in enumerate(question.ways):
            if peers is not None and way.peer not in {"dmap", "limit", *peers}:
                continue
            if way.peer in PEERS and (why := PEERS[way.peer].missing()):
                rows[number] = [Row(way.who, way.peer, failed=why)]
                continue
            runners[number] = Runner(question, number, n, seconds)
        for number in list(runners):
            step(number, "starts", Runner.wait_up)
        for number in list(runners):
            step(number, "finds its sizes", Runner.settle)
        for turn in range(n_rounds):
            order = [number for number in runners if turn % 2 == 0 or not is_slow(number)]
            first = turn % len(order) if order else 0
            for number in order[first:] + order[:first]:
                step(number, f"round {turn + 1}", Runner.take)
    finally:
        for runner in runners.values():
            runner.let_go()
        for runner in runners.values():
            runner.close()
    return [row for number in sorted(rows) for row in rows[number]]
