"""Rows as a table for people's eyes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

MAX_LIST_WIDTH: Final = 40
"""Columns for a list, such as a worker's abilities; the rest of it would hide the other columns."""


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    r"""Return lines under headings; numbers stand to the right.

    Strings come from strangers: control characters are escaped, lest they steer the terminal.

    >>> print(table(["function", "ready"], [["resize", 3], ["a\x1b[2J", None]]))
    function  ready
    resize        3
    a\x1b[2J
    """
    values = [list(row) for row in rows]
    texts = [list(columns), *([_text(value) for value in row] for row in values)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    to_right = [
        any(_is_number(value) for value in column) for column in zip(*values, strict=True)
    ] or [False] * len(columns)
    lines = (
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, to_right, strict=True)
        ).rstrip()
        for row in texts
    )
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Return a text without characters that a terminal would obey or not show."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def _text(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else ""
        case float():
            return f"{value:.3g}" if value < 100 else f"{value:.0f}"
        case list():
            text = ",".join(map(_text, value))
            return text if len(text) <= MAX_LIST_WIDTH else text[: MAX_LIST_WIDTH - 3] + "..."
        case _:
            return escaped(str(value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
