"""Measure dmap beside its peers, and print tables in Markdown.

python -m benchmarks --json benchmarks/results/latest.json
python -m benchmarks --quick
python -m benchmarks --only single,back --peers pool,dask
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import questions, table
from benchmarks.machine import circumstances
from benchmarks.peers import PEERS
from benchmarks.processes import adopt_orphans, end_descendants
from benchmarks.rounds import ask


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer items and rounds, and no peer that is slow"
    )
    parser.add_argument("--only", metavar="A,B", help=f"of {', '.join(questions.names())}")
    parser.add_argument("--peers", metavar="X,Y", help=f"beside dmap, of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, help="of each way (5; 2 with --quick)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there, too")
    arguments = parser.parse_args(argv)

    wanted = named(parser, arguments.only, questions.names(), "question")
    quick_peers = [name for name, peer in PEERS.items() if not (arguments.quick and peer.is_slow)]
    peers = named(parser, arguments.peers, list(PEERS), "peer", quick_peers)
    missing = {name: why for name in peers if (why := PEERS[name].missing())}
    unasked = "not asked for" if arguments.peers else "slow to start"
    report: dict[str, Any] = {
        **circumstances(),
        "rounds": arguments.rounds or (2 if arguments.quick else 5),
        "is_quick": arguments.quick,
        "left_out": [
            f"{peer.title} ({missing.get(name) or unasked})"
            for name, peer in PEERS.items()
            if name != "dmap" and (name not in peers or name in missing)
        ],
        "questions": {},
    }
    adopt_orphans()
    # Whoever ends it, what it has started, and stopped, ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    begin = time.monotonic()
    print(table.heading(report), flush=True)
    for name in wanted:
        question = questions.load(name)
        start = time.monotonic()
        rows = ask(
            question,
            report["rounds"],
            is_quick=arguments.quick,
            peers=[name for name in peers if name not in missing],
            say=lambda what: print(
                f"{time.monotonic() - begin:6.1f} s  {what}", file=sys.stderr, flush=True
            ),
        )
        # What the runners have left behind was adopted by this process.
        end_descendants(os.getpid(), patience=1.0)
        n = question.quick_n if arguments.quick else question.n
        report["questions"][name] = {
            "title": question.title.format(n=f"{n:,}"),
            "about": question.about,
            "is_more_better": question.is_more_better,
            "n": n,
            "seconds": round(time.monotonic() - start, 1),
            "ways": [asdict(row) for row in rows],
        }
        print(f"\n{table.section(report['questions'][name])}", flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def named(
    parser: argparse.ArgumentParser,
    text: str | None,
    known: list[str],
    what: str,
    default: list[str] | None = None,
) -> list[str]:
    """Return the names in an argument; all known ones without it."""
    if not text:
        return known if default is None else default
    names = text.split(",")
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"no {what} is called {', '.join(unknown)}")
    return [name for name in known if name in names]


if __name__ == "__main__":
    sys.exit(main())
