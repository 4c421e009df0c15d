"""Measure dmap beside the standard library's pools, in one run, and print a table in Markdown.

    python benchmarks/run.py --json benchmarks/results/latest.json
    python benchmarks/run.py --rounds 3 --scale 0.2
    python benchmarks/run.py --only single,back

In every round every contender has its turn, each time another one first, so that what else the
machine does meets all of them. The table has the median of the rounds, and their least and largest.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import figures
import zmq

Rounds = dict[str, list[float]]  # unit -> one value a round


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each contender (5)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of items (1.0)")
    parser.add_argument("--only", metavar="A,B", help="these figures: single, back, noop, ms, cold")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there, too")
    arguments = parser.parse_args(argv)

    known, end = figures.start()
    wanted = arguments.only.split(",") if arguments.only else [figure.name for figure in known]
    if unknown := set(wanted) - {figure.name for figure in known}:
        end()
        parser.error(f"no figure is called {', '.join(sorted(unknown))}")
    report: dict[str, Any] = {
        **circumstances(),
        "rounds": arguments.rounds,
        "scale": arguments.scale,
        "figures": {},
    }
    try:
        print(heading(report), flush=True)
        for figure in known:
            if figure.name in wanted:
                measured = take_rounds(figure, arguments.rounds, arguments.scale)
                title = figure.title.format(n=f"{figure.n * arguments.scale:,.0f}")
                report["figures"][figure.name] = {"title": title, "ways": measured}
                print(*rows(title, figure, measured), sep="\n", flush=True)
    finally:
        end()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def circumstances() -> dict[str, Any]:
    """Return when and on what this runs."""
    versions = {name: importlib.metadata.version(name) for name in ("pyzmq", "msgspec", "dmap")}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(),
            "n_cores": figures.N_WORKERS,
            "system": platform.platform(),
            "load_average": list(os.getloadavg()),
        },
        "versions": {
            "python": platform.python_version(),
            "libzmq": zmq.zmq_version(),
            **versions,
        },
    }


def processor() -> str:
    """Return what the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def take_rounds(figure: figures.Figure, n_rounds: int, scale: float) -> dict[str, Rounds]:
    """Return the values of each contender in each round."""
    ways = []
    for way in figure.ways:
        figure.take(way, scale / 20) if not way.try_chunksizes else None  # warm up
        ways.append(way.settle(figure.n_items(way, scale)))
    measured: dict[str, Rounds] = {way.who: {} for way in ways}
    for number in range(n_rounds):
        first = number % len(ways)
        for way in ways[first:] + ways[:first]:
            print(f"{figure.name}: round {number + 1}, {way.who} ...", file=sys.stderr)
            gc.collect()
            for unit, value in figure.take(way, scale).items():
                measured[way.who].setdefault(unit, []).append(value)
    return measured


def heading(report: dict[str, Any]) -> str:
    """Return what stands above the rows."""
    machine, versions = report["machine"], report["versions"]
    load = ", ".join(f"{load:.1f}" for load in machine["load_average"])
    return (
        f"{report['date']}: {machine['n_cores']} cores ({machine['processor']}), "
        f"{machine['system']}, load {load}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; {report['rounds']} rounds\n\n"
        "| | | median | least and largest | dmap is |\n"
        "|---|---|---:|---:|---:|"
    )


def rows(title: str, figure: figures.Figure, measured: dict[str, Rounds]) -> Iterable[str]:
    """Yield a figure's rows of the table; the last column has how many times better dmap is."""
    dmaps = next(iter(measured.values()))
    for unit, values in dmaps.items():
        reference = statistics.median(values)
        for who, rounds in measured.items():
            median = statistics.median(rounds[unit])
            spread = f"{shown(min(rounds[unit]))} to {shown(max(rounds[unit]))}"
            ratio = reference / median if figure.is_more_better else median / reference
            better = "" if rounds is dmaps else f"{ratio:.2f} x"
            first = title if rounds is dmaps else ""
            yield f"| {first} | {who} | {shown(median)} {unit} | {spread} | {better} |"


def shown(value: float) -> str:
    """Return a number with three digits that count, or all that stand before its point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
