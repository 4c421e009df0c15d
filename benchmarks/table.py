"""The report as text: tables in Markdown."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Iterator
from typing import Any

HEAD = "| | median | least to largest | dmap is |\n|---|---:|---:|---:|"

Way = dict[str, Any]
Asked = dict[str, Any]


def heading(report: dict[str, Any]) -> str:
    """Return when and on what it was measured, in a paragraph."""
    machine = report["machine"]
    date = datetime.datetime.fromisoformat(report["date"])
    load = ", ".join(f"{load:.1f}" for load in machine["load_average"])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    text = (
        f"{date.day} {date:%B %Y}, {machine['n_cores']} cores ({machine['processor']}), "
        f"{machine['memory_gib']:g} GiB, {machine['system']}; load average before: {load}. "
        f"Versions: {versions}. Medians of {report['rounds']} rounds, or of fewer where a round is "
        "long."
    )
    if report["left_out"]:
        text += f" Left out: {', '.join(report['left_out'])}."
    return text


def section(asked: Asked) -> str:
    """Return a question's title, how it is read, and its table."""
    title = asked["title"]
    title = title[0].upper() + title[1:] if title.split()[0] != "dmap" else title
    return f"### {title}\n\n{asked['about']}\n\n{table(asked)}"


def table(asked: Asked) -> str:
    """Return the table of one question: each unit's rows, dmap first, then what failed."""
    lines = [HEAD]
    for unit in units(asked):
        lines += rows(asked, unit)
    lines += [
        f"| {way['who']} | failed: {way['failed'].replace('|', '/')} | | |"
        for way in asked["ways"]
        if way["failed"]
    ]
    return "\n".join(lines)


def units(asked: Asked) -> list[str]:
    """Return the units in which a question is answered."""
    return list(dict.fromkeys(unit for way in asked["ways"] for unit in way["values"]))


def rows(asked: Asked, unit: str) -> Iterator[str]:
    """Yield the rows of a unit; the last column has how many times better dmap is."""
    for way in answered(asked, unit):
        values = way["values"][unit]
        spread = f"{shown(min(values))} to {shown(max(values))}" if len(values) > 1 else ""
        ratio = beside_dmap(asked, way, unit)
        better = "" if ratio is None or way["peer"] == "dmap" else f"{shown(ratio)} x"
        fewer = "" if way["n"] == asked["n"] else f" ({way['n']:,} items)"
        median = f"{shown(statistics.median(values))} {unit}"
        yield f"| {way['who']}{fewer} | {median} | {spread} | {better} |"


def answered(asked: Asked, unit: str) -> list[Way]:
    """Return the ways that have values in this unit."""
    return [way for way in asked["ways"] if way["values"].get(unit)]


def best_of(asked: Asked, ways: list[Way], unit: str) -> Way | None:
    """Return the way whose median is the best; None if there is none."""
    if not ways:
        return None
    best = max if asked["is_more_better"] else min
    return best(ways, key=lambda way: statistics.median(way["values"][unit]))


def beside_dmap(asked: Asked, way: Way, unit: str) -> float | None:
    """Return how many times better dmap's median is than this way's; None if it cannot be said."""
    dmaps = [one for one in answered(asked, unit) if one["peer"] == "dmap"]
    if not dmaps:
        return None
    reference = statistics.median(dmaps[0]["values"][unit])
    median = statistics.median(way["values"][unit])
    above, below = (reference, median) if asked["is_more_better"] else (median, reference)
    return above / below if below else None


def summary(report: dict[str, Any]) -> str:
    """Return one row a question: dmap, the best of the peers, and the limit."""
    lines = ["| | dmap | best peer | limit |", "|---|---:|---:|---:|"]
    for asked in report["questions"].values():
        for unit in units(asked):
            ways = answered(asked, unit)
            dmap = best_of(asked, [way for way in ways if way["peer"] == "dmap"], unit)
            limit = best_of(asked, [way for way in ways if way["peer"] == "limit"], unit)
            peers = [way for way in ways if way["peer"] not in {"dmap", "limit"}]
            peer = best_of(asked, peers, unit)
            cells = [f"{asked['title']}", cell(dmap, unit), cell(peer, unit), cell(limit, unit)]
            if peer:
                cells[2] += f" ({peer['who']})"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(way: Way | None, unit: str) -> str:
    """Return a median with its unit."""
    return f"{shown(statistics.median(way['values'][unit]))} {unit}" if way else ""


def shown(value: float) -> str:
    """Return a number with three digits that count, or all that stand before its point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
