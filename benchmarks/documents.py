"""Write into README and docs what the last report says: ``python -m benchmarks.documents``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "latest.json"
PLOT = RESULTS.with_suffix(".svg")

Report = dict[str, Any]


def in_readme(report: Report) -> str:
    """Return what the README says: the figure, and a row a question."""
    return (
        f"![each question, each peer beside dmap](benchmarks/results/{PLOT.name})\n\n"
        f"{table.summary(report)}\n\n{table.machine(report)}"
    )


def in_performance(report: Report) -> str:
    """Return what docs/performance.md says: the figure, and a table a question."""
    sections = [table.section(asked) for asked in report["questions"].values()]
    plot = f"![each question, each peer beside dmap](../benchmarks/results/{PLOT.name})"
    return "\n\n".join([table.heading(report), plot, *sections])


PLACES: dict[Path, tuple[str, Callable[[Report], str]]] = {
    ROOT / "README.md": ("figures", in_readme),
    ROOT / "docs" / "performance.md": ("tables", in_performance),
}  # document -> the name of the place in it, and what is written there


def written(text: str, place: str, content: str) -> str:
    """Return a document with other content between the two comments of a place.

    Raises:
        ValueError: it has no such place, or several.
    """
    pattern = rf"(<!-- {place} -->\n).*?(<!-- end of {place} -->)"
    text, n = re.subn(
        pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL
    )
    if n != 1:
        raise ValueError(f"there must be one place for the {place}, and there are {n}")
    return text


def main() -> int:
    """Run the command."""
    report = json.loads(RESULTS.read_text())
    for path, (place, content) in PLACES.items():
        path.write_text(written(path.read_text(), place, content(report)))
    try:
        from benchmarks.plot import draw

        draw(report, PLOT)
    except ImportError as error:
        print(f"no new figure: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
