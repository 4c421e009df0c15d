"""What a closure by value needs of a worker beside its Python: cloudpickle of the same kind.

Such a closure refers to functions of cloudpickle's own, which differ from one major version to the
next. The wire knows labels only, so a worker says ``cloudpickle-3`` among its labels, and a job
with such a closure asks for it. People are told of a version, not of a label.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

_LABEL: Final = "cloudpickle-"
_VERSION: Final = re.compile(rb"^__version__\s*=\s*[\"'](\d+)", re.MULTILINE)


@functools.cache
def cloudpickle_label() -> str:
    """Return the label that says which major version of cloudpickle is here; empty if none can be.

    cloudpickle is not imported for that (15 ms), but its source is looked at (0.3 ms).
    """
    with suppress(ImportError, ValueError, AttributeError, OSError):
        spec = importlib.util.find_spec("cloudpickle")
        # Whatever is not there is an AttributeError, and no label.
        source: bytes = spec.loader.get_data(spec.origin)  # type: ignore[union-attr]
        found = _VERSION.search(source)
        if found is not None:
            return _LABEL + found[1].decode()
    return ""


def with_cloudpickle(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the labels that a worker says, which was given these."""
    label = cloudpickle_label()
    return tuple(dict.fromkeys((*labels, label) if label else labels))


def split_labels(labels: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the versions of cloudpickle that labels say, and those labels that people gave.

    >>> split_labels(["cloudpickle-3", "gpu"])
    (['3'], ['gpu'])
    """
    versions: list[str] = []
    others: list[str] = []
    for label in labels:
        number = label.removeprefix(_LABEL)
        if number != label and number.isdecimal():
            versions.append(number)
        else:
            others.append(label)
    return versions, others
