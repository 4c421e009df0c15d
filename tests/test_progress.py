import pytest

from dmap.progress import Progress


def test_the_last_line_has_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(True, "primes", 3)
    progress.add(3)
    progress.close("shipped 20.0 MB once to 2 servers")
    last = capsys.readouterr().err.split("\r")[-1]
    assert "primes" in last
    assert "3/3" in last
    assert "shipped 20.0 MB once to 2 servers" in last


def test_nothing_is_shown_that_nobody_sees(capsys: pytest.CaptureFixture[str]) -> None:
    for wanted in (False, None):  # None: there is no terminal here
        progress = Progress(wanted, None, 3)
        progress.add(3)
        progress.close("shipped nothing")
    assert capsys.readouterr().err == ""
