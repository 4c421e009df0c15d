import sys
import warnings

import pytest

from dmap import warn
from dmap.errors import DmapWarning


def inside(text: str) -> None:
    """Warn, as code of dmap that calls itself would."""
    namespace = {"__package__": "dmap", "warn": warn}
    exec("def outer(text): inner(text)\ndef inner(text): warn.warn(text)", namespace)
    namespace["outer"](text)  # type: ignore[operator]


def test_a_warning_names_the_line_that_called_into_dmap() -> None:
    with pytest.warns(DmapWarning, match="hear") as caught:
        inside("hear")
    assert caught[0].filename == __file__


def test_the_same_thing_is_said_once_from_wherever() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            warn.warn_once("only once, said by this test")
        warn.warn_once("another thing, said by this test")
    assert len(caught) == 2


def test_what_has_been_said_is_not_kept_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    said: set[str] = set()
    monkeypatch.setattr(warn, "_said", said)
    monkeypatch.setattr(warn, "MAX_SAID", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for n in range(10):
            warn.warn_once(str(n))
    assert len(said) <= 3


def test_outside_of_any_caller_the_warning_is_still_given(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = type("Frame", (), {"f_globals": {"__package__": "dmap"}, "f_back": None})()
    monkeypatch.setattr(sys, "_getframe", lambda depth: frame)
    with pytest.warns(DmapWarning):
        warn.warn("nobody called")
