"""Warnings that name the line which called into dmap."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Final

from dmap.errors import DmapWarning

MAX_SAID: Final = 1000

_said: set[str] = set()


def warn(text: str) -> None:
    """Warn whoever called into dmap, in whatever depth of it this is."""
    warnings.warn(text, DmapWarning, stacklevel=_level_of_caller())


def warn_once(text: str) -> None:
    """Warn, but of each thing only once a process, whichever lines it came from."""
    if text not in _said:
        if len(_said) >= MAX_SAID:
            _said.clear()
        _said.add(text)
        warnings.warn(text, DmapWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """Return the ``stacklevel``, in the function that asks, of the line that called into dmap."""
    level = 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__package__") == __package__:
        level += 1
        frame = frame.f_back
    return level if frame is not None else 1
