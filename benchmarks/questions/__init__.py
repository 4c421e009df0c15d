"""One file a question. A file that has a ``QUESTION`` is asked; nothing else need know of it."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks.harness import Question

ORDER = ("single", "back", "noop", "items", "tail", "closure", "results", "arguments", "cold")
"""What comes first, in this order; the others follow by name."""


def names() -> list[str]:
    """Return the names of all questions."""
    found = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in ORDER if name in found] + sorted(set(found) - set(ORDER))


def load(name: str) -> Question:
    """Return a question.

    Raises:
        ModuleNotFoundError: there is no file of this name.
    """
    question: Question = importlib.import_module(f"{__name__}.{name}").QUESTION
    return question
