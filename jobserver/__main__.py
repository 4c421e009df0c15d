"""The command ``jobserver``: run one job server until it is told to leave."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import resource
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Final

from jobserver import keys
from jobserver.errors import InsecureBind
from jobserver.jobs import Limits
from jobserver.machine import machine_id
from jobserver.protocol import DEFAULT_PORT
from jobserver.server import Server
from jobserver.state import State

log = logging.getLogger("jobserver")

LINGER: Final = 1.0
"""Seconds that the last messages have to go out, when the server leaves in order."""

_EPILOG: Final = f"""\
Job servers are strangers to each other: start as many as you like, and name them all to clients
and workers. A first try, in three shells on one machine:

  jobserver
  dmap-worker --servers 127.0.0.1
  DMAP_SERVERS=127.0.0.1 python your_script.py

On a network that you trust as you trust your own account, since whoever reaches the server can
run code on its workers:

  jobserver --bind 'tcp://*:{DEFAULT_PORT}' --insecure

SIGTERM (or Ctrl-C) drains the server: it takes nothing new, finishes what runs, and leaves.
A second one ends it at once. `dmap status`, `dmap workers` and `dmap jobs` tell what it has.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s jobserver %(levelname)s %(message)s",
    )
    limits = Limits(max_jobs=options.max_jobs, max_nbytes=options.max_bytes)
    boot = secrets.token_hex(4)
    state = State(options.name, boot, limits=limits, machine=machine_id())
    server = Server(state, max_nbytes=options.max_bytes, lifeline=options.lifeline)
    linger = 0.0
    try:
        for bind in dict.fromkeys(options.bind or [f"tcp://127.0.0.1:{DEFAULT_PORT}"]):
            _listen(server, bind, insecure=options.insecure)
        _raise_file_limit()
        _never_collect_all()
        _drain_on_signals(server)
        linger = LINGER if server.run() else 0.0
    except (InsecureBind, OSError) as error:
        parser.exit(1, f"jobserver: {error}\n")
    finally:
        server.close(linger)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobserver",
        description="Take jobs from clients and give them to workers that ask for some.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--bind",
        action="append",
        type=_bind,
        metavar="ENDPOINT",
        help=f"where to listen: tcp://HOST:PORT (port 0: any free one) or ipc://PATH; may be given "
        f"several times (default: tcp://127.0.0.1:{DEFAULT_PORT})",
    )
    parser.add_argument(
        "--name",
        type=_name,
        default=socket.gethostname(),
        help="what this server is called in handles and listings (default: the host's name)",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="listen where strangers can reach it, without keys: they can run code on the workers",
    )
    parser.add_argument(
        "--max-jobs",
        type=_count,
        default=Limits.max_jobs,
        metavar="N",
        help="take no more jobs while there are so many (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bytes",
        type=_count,
        default=Limits.max_nbytes,
        metavar="N",
        help="nor while arguments and results have so many bytes (default: %(default)s)",
    )
    parser.add_argument(
        "--lifeline",
        type=int,
        metavar="FD",
        help="an inherited pipe: end at once when its other end is closed",
    )
    parser.add_argument("--verbose", action="store_true", help="log more")
    return parser


def _bind(text: str) -> str:
    try:
        return keys.endpoint(text, to_bind=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _name(text: str) -> str:
    if not 0 < len(text) <= 256 or not text.isprintable():
        raise argparse.ArgumentTypeError("a name has 1 to 256 printable characters")
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"not a whole number above 0: {text!r}")
    return int(text)


def _listen(server: Server, bind: str, *, insecure: bool) -> None:
    if insecure:
        try:
            keys.require_private(bind)
        except InsecureBind:
            log.warning(
                "%s is open to strangers: whoever reaches it can run code on my workers", bind
            )
    log.info("listening on %s", server.bind(bind, insecure=insecure))


def _raise_file_limit() -> None:
    """Let as many peers connect as the system allows: each is one file descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS says "unlimited" and means less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _never_collect_all() -> None:
    """Leave the garbage collector only the young objects.

    The state makes no reference cycles (a test holds that), and a full collection among a million
    jobs would stop the loop for most of a second.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 2**31 - 1)


def _drain_on_signals(server: Server) -> None:
    n_signals = 0

    def on_signal(number: int, _: FrameType | None) -> None:
        nonlocal n_signals
        n_signals += 1
        if n_signals > 1:
            server.stop()
        else:
            server.drain()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


if __name__ == "__main__":
    sys.exit(main())
