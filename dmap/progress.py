"""A bar that shows how many items of a map are done."""

from __future__ import annotations

import sys
import time
from typing import Any, Final

DELAY: Final = 0.5
"""Seconds that a map must have taken before a bar is shown that nobody has asked for."""


class Progress:
    """The bar of one map. It appears when there is reason to, and costs nothing before.

    Args:
        wanted: True shows it at once, False never, None after DELAY seconds if stderr is a
            terminal.
        description: What stands before it.
        total: How many items there are; None if nobody knows.
    """

    def __init__(self, wanted: bool | None, description: str | None, total: int | None) -> None:
        self._description = description
        self._total = total
        self._n_done = 0
        self._bar: Any = None
        self._show_at: float | None = None
        if wanted:
            self._show_at = 0.0
        elif wanted is None and sys.stderr is not None and sys.stderr.isatty():
            self._show_at = time.monotonic() + DELAY

    def add(self, n_items: int) -> None:
        """Note that so many more items are done."""
        if self._show_at is None:
            return
        self._n_done += n_items
        if self._bar is not None:
            self._bar.update(n_items)
        elif time.monotonic() >= self._show_at:
            from tqdm.auto import tqdm

            self._bar = tqdm(
                desc=self._description, total=self._total, initial=self._n_done, unit="item"
            )

    def close(self, note: str = "") -> None:
        """Leave the bar as it is, with a note behind it."""
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note)
            self._bar.close()
