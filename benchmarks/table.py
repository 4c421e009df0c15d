"""The report as text: tables in Markdown."""

from __future__ import annotations

import datetime
import statistics
from typing import Any

Way = dict[str, Any]
Asked = dict[str, Any]


def machine(report: dict[str, Any]) -> str:
    """Return when and on what it was measured, in a sentence."""
    there = report["machine"]
    date = datetime.datetime.fromisoformat(report["date"])
    load = ", ".join(f"{load:.1f}" for load in there["load_average"])
    text = (
        f"{date.day} {date:%B %Y}, {there['n_cores']} cores ({there['processor']}), "
        f"{there['memory_gib']:g} GiB, {there['system']}, Python {report['versions']['python']}; "
        f"load average before: {load}."
    )
    if report["is_quick"]:
        text += " Measured with `--quick`."
    return text


def heading(report: dict[str, Any]) -> str:
    """Return when, on what and of what it was measured, in a paragraph."""
    versions = [
        f"{name} {version}" for name, version in report["versions"].items() if name != "python"
    ]
    text = (
        f"{machine(report)} Versions: {', '.join(versions)}. "
        f"Medians of {report['rounds']} rounds, of fewer where a round is long."
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
    """Return the table of one question: a row a way, dmap first; what failed has its reason."""
    found = units(asked)
    if len(found) == 1:
        lines = ["| | median | least to largest | dmap is |", "|---|---:|---:|---:|"]
    else:
        lines = [
            f"| | {' | '.join(found)} | dmap is |",
            f"|---|{'---:|' * len(found)}---:|",
        ]
    for way in asked["ways"]:
        fewer = "" if way["failed"] or way["n"] == asked["n"] else f" ({way['n']:,} items)"
        cells = [f"{way['who']}{fewer}"]
        if way["failed"]:
            cells += [f"failed: {way['failed'].replace('|', '/')}", *[""] * max(2, len(found))]
        else:
            for unit in found:
                median, spread = spread_of(way["values"].get(unit, []))
                if len(found) == 1:
                    cells += [f"{median} {unit}", spread]
                else:
                    cells.append(f"{median} ({spread})" if spread else median)
            cells.append(ratios(asked, way, found))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def units(asked: Asked) -> list[str]:
    """Return the units in which a question is answered."""
    return list(dict.fromkeys(unit for way in asked["ways"] for unit in way["values"]))


def spread_of(values: list[float]) -> tuple[str, str]:
    """Return the median, and the least and the largest if they differ."""
    if not values:
        return "", ""
    least, median, largest = map(shown, (min(values), statistics.median(values), max(values)))
    return median, "" if least == largest else f"{least} to {largest}"


def ratios(asked: Asked, way: Way, units: list[str]) -> str:
    """Return how many times better dmap is, in each unit; nothing beside dmap itself."""
    if way["peer"] == "dmap" and way is asked["ways"][0]:
        return ""
    found = [beside_dmap(asked, way, unit) for unit in units]
    if not any(found):
        return ""
    return ", ".join("" if ratio is None else shown(ratio) for ratio in found) + " x"


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
    if not dmaps or not way["values"].get(unit):
        return None
    reference = statistics.median(dmaps[0]["values"][unit])
    median = statistics.median(way["values"][unit])
    above, below = (reference, median) if asked["is_more_better"] else (median, reference)
    return above / below if below else None


def summary(report: dict[str, Any]) -> str:
    """Return one row a question that a peer answers too: dmap, the best of these, the limit."""
    lines = ["| | dmap | best peer | limit |", "|---|---:|---:|---:|"]
    for asked in report["questions"].values():
        for unit in units(asked):
            ways = answered(asked, unit)
            dmap = best_of(asked, [way for way in ways if way["peer"] == "dmap"], unit)
            limit = best_of(asked, [way for way in ways if way["peer"] == "limit"], unit)
            peers = [way for way in ways if way["peer"] not in {"dmap", "limit"}]
            peer = best_of(asked, peers, unit)
            if peer is None:
                continue  # its ways are of dmap alone, and one cell would mix them
            cells = [f"{asked['title']}", cell(dmap, unit), cell(peer, unit), cell(limit, unit)]
            cells[2] += f" ({peer['who'].removesuffix(' (best)')})"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(way: Way | None, unit: str) -> str:
    """Return a median with its unit."""
    return f"{shown(statistics.median(way['values'][unit]))} {unit}" if way else ""


def shown(value: float) -> str:
    """Return a number with three digits that count, or all that stand before its point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
