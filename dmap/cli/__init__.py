"""The command ``dmap``: look at job servers, and cancel jobs.

::

    dmap status                functions: jobs that are ready, delayed, running; workers
    dmap workers               processes that run jobs
    dmap jobs                  jobs, the running ones first
    dmap cancel HANDLE         end a job for all who wait for it
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from dmap.cli.ask import Answer, ask
from dmap.cli.table import escaped, table
from dmap.versions import split_labels
from jobserver.keys import endpoints
from jobserver.protocol import (
    Body,
    CancelHandle,
    Message,
    Show,
    StatusIs,
    Welcome,
    handle_text,
    parse_handle,
)

TIMEOUT: Final = 5.0
LOCAL: Final = "127.0.0.1"

What: TypeAlias = Literal["status", "workers", "jobs"]
Row: TypeAlias = dict[str, object]

# column -> the key of the rows; what a person needs at a glance. --json has everything.
_COLUMNS: Final[dict[What, dict[str, str]]] = {
    "status": {
        "function": "function",
        "high": "high",
        "normal": "normal",
        "low": "low",
        "delayed": "delayed",
        "running": "running",
        "workers": "workers",
        "sleeping": "sleeping",
        "mean s": "seconds",
    },
    "workers": {
        "name": "name",
        "host": "host",
        "pid": "pid",
        "child": "child",
        "python": "python",
        "cloudpickle": "cloudpickle",
        "labels": "labels",
        "state": "state",
        "since s": "since",
        "jobs": "jobs",
        "abilities": "abilities",
    },
    "jobs": {
        "handle": "handle",
        "function": "function",
        "state": "state",
        "priority": "priority",
        "listeners": "listeners",
        "background": "background",
        "items": "items",
        "attempt": "attempt",
        "age s": "age",
        "worker": "worker",
        "host": "host",
        "status": "status",
        "map": "description",
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 1 if a server or the job was not found."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        servers = endpoints(options.servers)
    except ValueError as error:
        parser.error(str(error))
    if options.command == "cancel":
        return _cancel(servers, options.handle, timeout=options.timeout, as_json=options.json)
    return _show(servers, options.command, timeout=options.timeout, as_json=options.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dmap",
        description="Look at job servers, and cancel jobs.",
        epilog="exit code: 0; 1 if a server or the job was not found; 2 if the command is wrong",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--servers",
        default=os.environ.get("DMAP_SERVERS") or LOCAL,
        metavar="A,B",
        help=f"the job servers, such as sammy,kenny:4731 (default: DMAP_SERVERS, or {LOCAL})",
    )
    common.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for them (default: %(default)g)",
    )
    common.add_argument("--json", action="store_true", help="everything, for programs")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in (
        ("status", "functions: jobs that are ready, delayed, running; workers"),
        ("workers", "processes that run jobs"),
        ("jobs", "jobs, the running ones first"),
    ):
        commands.add_parser(name, parents=[common], help=text, description=text)
    text = "end a job for all who wait for it"
    cancel = commands.add_parser("cancel", parents=[common], help=text, description=text)
    cancel.add_argument(
        "handle", type=_handle, metavar="HANDLE", help="as `dmap jobs` shows it: name:boot:number"
    )
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"not a number of seconds above 0: {text!r}")
    return seconds


def _handle(text: str) -> tuple[str, str, int]:
    try:
        return parse_handle(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _show(servers: Sequence[str], what: What, *, timeout: float, as_json: bool) -> int:
    def question(_: Welcome) -> Message:
        return Show(1, what)

    answers = ask(servers, question, timeout)
    rows: list[Row] = []
    for answer in answers:
        if answer.message is not None and answer.welcome is not None:
            server: Mapping[str, object] = {"server": answer.welcome.name}
            rows += [{**server, **_row(row)} for row in _rows(answer.bodies)]
    if as_json:
        print(json.dumps(rows, indent=1))
    elif any(answer.message for answer in answers):
        columns = _COLUMNS[what]
        if len(servers) > 1:
            columns = {"server": "server", **columns}
        print(table(list(columns), ([_cell(row, key) for key in columns.values()] for row in rows)))
    return _complain(answers, timeout)


def _row(row: Row) -> Row:
    """Return a row as people see it: no label says which version of something there is."""
    labels = row.get("labels")
    if not isinstance(labels, list):
        return row
    versions, others = split_labels(labels)
    return {**row, "labels": others, "cloudpickle": ", ".join(versions)}


def _cell(row: Row, key: str) -> object:
    match key, row.get(key):
        case "status", [numerator, denominator]:
            return f"{numerator}/{denominator}"
        case _, value:
            return value


def _rows(bodies: tuple[Body, ...]) -> list[Row]:
    [body] = bodies
    packed = body if isinstance(body, bytes) else b"".join(body)
    return msgspec.msgpack.decode(packed, type=list[Row])


def _cancel(
    servers: Sequence[str], handle: tuple[str, str, int], *, timeout: float, as_json: bool
) -> int:
    name, boot, number = handle

    def question(welcome: Welcome) -> Message | None:
        return CancelHandle(1, number) if (welcome.name, welcome.boot) == (name, boot) else None

    answers = ask(servers, question, timeout)
    for answer in answers:
        if isinstance(answer.message, StatusIs):
            return _tell_cancelled(handle, answer.message, as_json=as_json)
    if _complain(answers, timeout) == 0:
        there = ", ".join(f"{w.name}:{w.boot}" for answer in answers if (w := answer.welcome))
        _say(f"none of these servers ({escaped(there)}) is {name}:{boot}; has it restarted?")
    return 1


def _tell_cancelled(handle: tuple[str, str, int], status: StatusIs, *, as_json: bool) -> int:
    if as_json:
        ended = status.ended if status.known else None
        print(json.dumps({"handle": handle_text(*handle), "ended": ended}))
    if not status.known:
        _say("that server does not know the job: it ended long ago, or never was")
        return 1
    if not as_json:
        if status.ended != "cancelled":
            print(f"it had ended before: {escaped(status.ended)}")
        elif status.running:
            print("cancelled; it was running, and its worker is told to stop it")
        else:
            print("cancelled")
    return 0


def _complain(answers: Sequence[Answer], timeout: float) -> int:
    """Say which servers did not answer, and why; return the exit code."""
    code = 0
    for answer in answers:
        if answer.refusal:
            _say(f"{answer.endpoint} refused: {escaped(answer.refusal)}")
        elif not answer.complete:
            _say(
                f"{answer.endpoint} did not answer within {timeout:g} s: is a job server running "
                f"there? (`jobserver` starts one)"
            )
        else:
            continue
        code = 1
    return code


def _say(text: str) -> None:
    print(f"dmap: {text}", file=sys.stderr)
