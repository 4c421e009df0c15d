"""Ended jobs, remembered for a while."""

from __future__ import annotations

from jobserver.endings import Endings
from jobserver.jobs import Ended, Limits, Untaken
from jobserver.protocol import JobFail


def ended(at: float = 0.0, uniq: bytes = b"", nbytes: int | None = None) -> Ended:
    end = None if nbytes is None else Untaken(JobFail(0, "failed"), (), nbytes)
    return Ended(at, "complete", "f", uniq, end)


def remember(endings: Endings, handle: int, one: Ended) -> None:
    endings.remember(handle, one)
    endings.check()


def test_the_oldest_go_when_there_are_too_many() -> None:
    endings = Endings(Limits(n_ended=2))
    for handle in (1, 2, 3):
        remember(endings, handle, ended())
    assert [endings.get(handle) is not None for handle in (1, 2, 3)] == [False, True, True]


def test_the_oldest_go_when_their_results_are_too_large() -> None:
    endings = Endings(Limits(ended_nbytes=10))
    for handle in (1, 2, 3):
        remember(endings, handle, ended(nbytes=4))
    assert endings.get(1) is None
    assert endings.nbytes == 8


def test_what_is_too_old_is_forgotten() -> None:
    endings = Endings(Limits())
    for handle in (1, 2, 3):
        remember(endings, handle, ended(at=handle))
    endings.forget_before(2.0)
    endings.check()
    assert [endings.get(handle) is not None for handle in (1, 2, 3)] == [False, True, True]


def test_the_newest_of_a_uniq_is_found_when_an_older_one_is_forgotten() -> None:
    endings = Endings(Limits())
    remember(endings, 1, ended(1.0, b"u", 4))
    remember(endings, 2, ended(2.0, b"u", 4))
    endings.forget_before(2.0)
    endings.check()
    assert endings.of_uniq("f", b"u") == 2
    endings.forget_before(3.0)
    assert endings.of_uniq("f", b"u") is None


def test_what_has_no_result_is_not_found_by_its_uniq() -> None:
    endings = Endings(Limits())
    remember(endings, 1, ended(uniq=b"u"))
    assert endings.of_uniq("f", b"u") is None
