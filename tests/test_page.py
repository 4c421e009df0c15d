"""The page that a supervisor and a child share: a job is started or given back, never both."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmap import page as page_module
from dmap.page import (
    MAX_DEPTH,
    MAX_HELD,
    Key,
    Page,
    Settings,
    View,
    boot_key,
    make_page,
    read_settings,
)
from jobserver.protocol import Assigned, LaneId, Origin

SETTINGS = Settings(["ipc:///x"], "sammy", "host", b"s" * 16, child=3, parent=1, notify_fd=0)
SESSION = b"c" * 16
BOOT = boot_key("boot1")


@pytest.fixture
def page() -> Iterator[Page]:
    page = Page(make_page(SETTINGS))
    yield page
    page.close()


def key(handle: int, server: int = 0) -> Key:
    return Key(handle, BOOT, server)


def job(handle: int, **fields: object) -> Assigned:
    whole = Assigned(
        handle,
        Origin(SESSION, 100 + handle),
        "resize",
        0,
        n_items=9,
        attempt=2,
        encoding="pickle",
        uniq=b"u",
        timeout=0.0,
        item_timeout=0.0,
        blobs=(),
        ancestors=(),
        lane=LaneId(SESSION, 0),
    )
    return msgspec.structs.replace(whole, **fields)


def test_a_child_reads_the_settings_behind_its_page() -> None:
    fd = make_page(SETTINGS)
    assert read_settings(fd) == SETTINGS
    os.close(fd)


def test_a_new_page_shows_nothing(page: Page) -> None:
    assert page.view() == ((), (), ())
    assert (page.ready, page.draining, page.watched) == (False, False, False)
    assert page.cancelled is None


def test_a_claim_shows_what_runs_since_when_and_until_when(page: Page) -> None:
    page.claim(key(7), job(7, timeout=5.0), 100.0)
    (claim,) = page.view().claims
    assert claim.key == key(7)
    assert (claim.origin, claim.function, claim.uniq) == (Origin(SESSION, 107), "resize", b"u")
    assert (claim.attempt, claim.since, claim.deadline) == (2, 100.0, 105.0)
    assert (claim.item, claim.n_items) == (0, 9)


def test_a_claim_shows_the_item_at_which_it_is(page: Page) -> None:
    page.claim(key(7), job(7), 100.0)
    page.at(4, 2, 101.0, 103.0)
    (claim,) = page.view().claims
    assert (claim.item, claim.n_items, claim.item_since, claim.item_deadline) == (4, 2, 101, 103)


def test_the_longest_names_fit(page: Page) -> None:
    page.claim(key(1), job(1, function="\N{GRINNING FACE}" * 256, uniq=b"q" * 256), 0.0)
    page.claim(key(2), job(2), 0.0)
    inner, outer = page.view().claims
    assert (outer.function, outer.uniq) == ("\N{GRINNING FACE}" * 256, b"q" * 256)
    assert inner.function == "resize"


def test_claims_inside_each_other_are_shown_innermost_first(page: Page) -> None:
    page.claim(key(1), job(1), 0.0)
    page.claim(key(2), job(2), 0.0)
    assert [claim.key.handle for claim in page.view().claims] == [2, 1]
    page.release()
    assert [claim.key.handle for claim in page.view().claims] == [1]


def test_claims_inside_each_other_have_a_bound(page: Page) -> None:
    for handle in range(1, MAX_DEPTH + 1):
        page.claim(key(handle), job(handle), 0.0)
    with pytest.raises(RecursionError):
        page.claim(key(99), job(99), 0.0)
    assert len(page.view().claims) == MAX_DEPTH


def test_a_single_job_may_be_claimed_without_being_written_down_first(page: Page) -> None:
    for handle in range(1, 2 * MAX_HELD):
        assert page.claim(key(handle), job(handle), 0.0)
        page.release()
        page.reported()
    assert page.claim(key(1), job(1), 0.0)
    assert page.view().claims[0].key == key(1)
    page.release()
    assert page.view().ended == (key(1),)


def test_a_claim_may_take_the_place_of_one_that_ended(page: Page) -> None:
    page.hold([key(1), key(2)])
    page.claim(key(1), job(1), 0.0)
    page.cancel(key(1))
    page.claim(key(2), job(2), 0.0, instead=True)
    assert [claim.key for claim in page.view().claims] == [key(2)]
    assert page.view().ended == (key(1),)
    assert page.cancelled is None


def hold(page: Page, *jobs: Assigned) -> None:
    page.hold([key(job.handle) for job in jobs], jobs)


def test_a_job_claimed_by_its_entry_is_shown_as_one_claimed_in_full(page: Page) -> None:
    one, two = job(1), job(2, function="\N{GRINNING FACE}" * 256, uniq=b"q" * 256)
    hold(page, one, two)
    page.claim(key(1), one, 100.0)
    page.claim(key(2), two, 101.0, instead=True)
    in_full = page.view()
    page.release()
    page.reported()
    hold(page, one, two)
    assert page.claim_next(one, 100.0)
    assert page.claim_next(two, 101.0, instead=True)
    assert page.view() == in_full
    page.release()
    assert page.view() == ((), (key(1), key(2)), ())


@pytest.mark.parametrize("next", ["hold", "at", "claim"])
def test_a_claim_stays_whatever_comes_after_it(page: Page, next: str) -> None:
    jobs = [job(1), job(2), job(3)]
    hold(page, *jobs)
    page.claim_next(jobs[0], 100.0)
    page.claim_next(jobs[1], 101.0, instead=True)
    (claim,) = page.view().claims
    if next == "hold":
        page.hold([key(3), key(4)], [jobs[2], job(4)])
        assert page.view() == ((claim,), (key(1),), (key(3), key(4)))
    elif next == "at":
        page.at(3, 1, 102.0)
        assert page.view().claims == (claim._replace(item=3, n_items=1, item_since=102.0),)
    else:
        assert page.claim_next(jobs[2], 102.0) is None
        page.claim(key(3), jobs[2], 102.0)
        assert page.view().claims[1:] == (claim,)


def test_a_job_that_was_taken_is_not_claimed_by_its_entry(page: Page) -> None:
    jobs = [job(1), job(2), job(3)]
    hold(page, *jobs)
    assert page.claim_next(jobs[0], 0.0)
    assert page.take([key(2)]) == [key(2)]
    assert page.claim_next(jobs[1], 0.0, instead=True) is False
    assert page.view() == ((), (key(1), key(2)), (key(3),))
    assert page.claim_next(jobs[2], 0.0)
    assert page.view().claims[0].key == key(3)


@pytest.mark.parametrize("fields", [{"timeout": 1.0}, {"item_timeout": 1.0}])
def test_a_job_with_a_limit_is_claimed_in_full(page: Page, fields: dict[str, float]) -> None:
    jobs = [job(1, **fields), job(2)]
    hold(page, *jobs)
    assert page.claim_next(jobs[0], 0.0) is None
    assert page.claim(key(1), jobs[0], 0.0)
    assert page.claim_next(jobs[1], 0.0, instead=True)


def test_only_the_next_job_is_claimed_by_its_entry(page: Page) -> None:
    jobs = [job(1), job(2)]
    assert page.claim_next(jobs[0], 0.0) is None
    hold(page, *jobs)
    assert page.claim_next(jobs[1], 0.0) is None
    assert page.claim_next(job(1), 0.0) is None  # another of the same name


def test_a_job_that_comes_alone_behind_many_is_claimed_in_full(page: Page) -> None:
    jobs = [job(handle) for handle in range(1, 5)]
    hold(page, *jobs[:2])
    page.claim_next(jobs[0], 0.0)
    page.claim_next(jobs[1], 0.0, instead=True)
    hold(page, jobs[2])  # behind two that ran
    page.claim_next(jobs[2], 0.0, instead=True)
    page.release()
    page.reported()
    assert page.claim_next(jobs[3], 1.0) is None
    assert page.claim(key(4), jobs[3], 1.0)
    page.release()
    assert page.claim_next(jobs[3], 2.0) is None


def test_what_ended_and_is_known_makes_room_for_what_is_held(page: Page) -> None:
    jobs = [job(handle) for handle in range(1, 4)]
    hold(page, *jobs[:2])
    page.claim_next(jobs[0], 0.0)
    page.claim_next(jobs[1], 0.0, instead=True)
    page.release()
    assert page.n_ended == 2
    page.hold([key(3)], jobs[2:], {key(2)})
    assert page.n_ended == 1
    assert page.view().ended == (key(2),)


def test_a_cancel_that_came_too_late_is_removed_by_the_next_claim(page: Page) -> None:
    jobs = [job(1), job(2), job(3)]
    hold(page, *jobs)
    page.claim_next(jobs[0], 0.0)
    assert page.cancel(key(1))
    assert page.claim_next(jobs[1], 0.0, instead=True) is None
    page.claim(key(2), jobs[1], 0.0, instead=True)
    assert page.cancelled is None
    assert page.claim_next(jobs[2], 0.0, instead=True)


def test_what_is_shown_of_very_many_long_names_is_shown_by_full_claims(page: Page) -> None:
    jobs = [job(n, function="\N{GRINNING FACE}" * 256) for n in range(1, MAX_HELD + 1)]
    hold(page, *jobs)
    assert page.claim_next(jobs[0], 0.0) is None
    assert page.claim(key(1), jobs[0], 0.0)
    assert len(page.view().unclaimed) == MAX_HELD - 1


def test_only_one_job_that_began_just_now_and_has_no_limit_is_brief(page: Page) -> None:
    jobs = [job(1), job(2, timeout=9.0), job(3)]
    assert not page.is_brief(0.0)
    hold(page, *jobs)
    assert not page.is_brief(0.0)
    page.claim_next(jobs[0], 100.0)
    assert page.is_brief(100.0)
    assert not page.is_brief(100.1)
    page.claim(key(2), jobs[1], 200.0, instead=True)
    assert not page.is_brief(200.0)
    page.release()
    page.claim(key(4), job(4), 300.0)
    page.claim(key(3), jobs[2], 300.0)
    assert not page.is_brief(300.0)


def test_without_an_atomic_exchange_each_job_is_claimed_under_the_lock(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "_tokens", lambda: (None, 1))
    jobs = [job(1), job(2), job(3)]
    hold(page, *jobs)
    assert page.claim_next(jobs[0], 0.0) is None
    assert page.claim(key(1), jobs[0], 0.0)
    assert page.take([key(1), key(2)]) == [key(2)]
    assert not page.claim(key(2), jobs[1], 0.0, instead=True)
    assert page.claim(key(3), jobs[2], 0.0)


# --- what the other side sees, whenever it looks ----------------------------------------------


def at_each_line(act: Callable[[], object], look: Callable[[], object]) -> None:
    """Act, and look before each line of the page's code that this runs."""
    is_looking = False

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal is_looking
        if frame.f_code.co_filename != page_module.__file__ or is_looking:
            return None
        is_looking = True
        try:
            look()
        finally:
            is_looking = False
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)


JOBS = [job(1), job(2), job(3)]
OTHERS = [job(4), job(5)]

# What a child does -> what it does before that
STEPS: dict[str, tuple[Callable[[Page], object], list[Callable[[Page], object]]]] = {
    "hold": (lambda page: hold(page, *JOBS), []),
    "hold more": (
        lambda page: page.hold([key(3), key(4), key(5)], [JOBS[2], *OTHERS]),
        [
            lambda page: hold(page, *JOBS),
            lambda page: page.claim_next(JOBS[0], 1.0),
            lambda page: page.claim_next(JOBS[1], 2.0, instead=True),
        ],
    ),
    "hold others behind a report": (
        lambda page: page.hold([key(3), key(4), key(5)], [JOBS[2], *OTHERS]),
        [
            lambda page: hold(page, *JOBS),
            lambda page: page.claim_next(JOBS[0], 1.0),
            lambda page: page.reported(),
            lambda page: page.claim_next(JOBS[1], 2.0, instead=True),
        ],
    ),
    "claim the first": (
        lambda page: page.claim_next(JOBS[0], 1.0),
        [lambda page: hold(page, *JOBS)],
    ),
    "claim the next": (
        lambda page: page.claim_next(JOBS[1], 1.0, instead=True),
        [lambda page: hold(page, *JOBS), lambda page: page.claim_next(JOBS[0], 1.0)],
    ),
    "claim behind what was taken": (
        lambda page: page.claim_next(JOBS[1], 1.0, instead=True),
        [
            lambda page: hold(page, *JOBS),
            lambda page: page.claim_next(JOBS[0], 1.0),
            lambda page: page.take([key(2)]),
        ],
    ),
    "claim a single one": (lambda page: page.claim(key(1), JOBS[0], 1.0), []),
    "claim another single one": (
        lambda page: page.claim(key(4), OTHERS[0], 1.0, instead=True),
        [lambda page: page.claim(key(1), JOBS[0], 1.0), lambda page: page.reported()],
    ),
    "claim one inside": (
        lambda page: page.claim(key(2), JOBS[1], 1.0),
        [lambda page: hold(page, *JOBS), lambda page: page.claim_next(JOBS[0], 1.0)],
    ),
    "at": (
        lambda page: page.at(0, 9, 1.0),
        [lambda page: hold(page, *JOBS), lambda page: page.claim_next(JOBS[0], 1.0)],
    ),
    "release": (
        lambda page: page.release(),
        [lambda page: hold(page, *JOBS), lambda page: page.claim_next(JOBS[0], 1.0)],
    ),
    "report": (
        lambda page: page.reported(),
        [
            lambda page: hold(page, *JOBS),
            lambda page: page.claim_next(JOBS[0], 1.0),
            lambda page: page.release(),
        ],
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_whatever_line_a_child_dies_at_the_page_is_as_before_or_after_a_step(
    page: Page, step: str
) -> None:
    act, before = STEPS[step]
    for one in before:
        one(page)
    seen: list[View] = [page.view_unlocked()]

    def look() -> None:
        view = page.view_unlocked()
        if view != seen[-1]:
            seen.append(view)

    at_each_line(lambda: act(page), look)
    look()
    # In the place of another one is two steps: that ended, and this began.
    instead = step in ("claim another single one",)
    assert len(seen) <= 2 + instead
    if instead:
        assert seen[1].claims == ()


def take_at_line(line: int, instead: bool) -> tuple[bool | None, bool, int]:
    """Take a job when its claim is at that line; say if it is claimed, taken, and of how many."""
    page = Page(make_page(SETTINGS))
    hold(page, *JOBS)
    if instead:
        page.claim_next(JOBS[0], 0.0)
    wanted = JOBS[1 if instead else 0]
    claimed: list[bool | None] = []
    taken: list[Key] = []
    n_lines = 0

    def look() -> None:
        nonlocal n_lines
        if n_lines == line:
            taken.extend(page.take([key(wanted.handle)]))
        n_lines += 1

    at_each_line(lambda: claimed.append(page.claim_next(wanted, 0.0, instead=instead)), look)
    page.close()
    return claimed[0], bool(taken), n_lines


@pytest.mark.parametrize("instead", [False, True])
def test_at_whatever_line_a_job_is_taken_it_is_claimed_or_taken(instead: bool) -> None:
    n_lines = take_at_line(-1, instead)[2]
    outcomes = [take_at_line(line, instead)[:2] for line in range(n_lines)]
    assert set(outcomes) == {(True, False), (False, True)}


ACTS = ["claim", "claim", "claim", "end", "report", "hold", "unhold", "take", "take all", "cancel"]


@given(st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 7)), max_size=40))
def test_each_job_is_started_or_taken_and_the_page_says_which(
    acts: list[tuple[str, int]],
) -> None:
    """What child and supervisor may do, in any order, beside a list of who should have what."""
    page = Page(make_page(SETTINGS))
    held: list[Assigned] = []  # as the child believes
    running: Assigned | None = None
    started: list[int] = []
    given: list[int] = []  # back, by either side
    last = 0
    is_open = False  # the last claim is of a job that has ended
    for act, n in acts:
        if act == "hold":
            new = [job(last + 1 + i, timeout=float(n == 5)) for i in range(n)]
            last += n
            held += new
            gone = page.hold([key(one.handle) for one in held], held if n != 6 else ())
            held = [one for one in held if key(one.handle) not in gone]
        elif act == "claim" and held:
            one = held.pop(0)
            claimed = page.claim_next(one, 1.0, instead=is_open)
            if claimed is None:
                claimed = page.claim(key(one.handle), one, 1.0, instead=is_open)
            assert claimed is (one.handle not in given)
            running, is_open = (one, True) if claimed else (None, False)
            if claimed:
                started.append(one.handle)
        elif act == "end" and is_open:
            page.release()
            running, is_open = None, False
        elif act == "report" and not is_open:
            page.reported()
            started.clear()
        elif act == "unhold":
            gone = page.unhold()
            assert {one.handle for one in gone} == {
                one.handle for one in held if one.handle in given
            }
            held.clear()
        elif act in ("take", "take all"):
            wanted = None if act == "take all" else [key(n + 1)]
            for one_key in page.take(wanted):
                assert one_key.handle not in given, "nothing is given back twice"
                given.append(one_key.handle)
        elif act == "cancel":
            assert page.cancel(key(n + 1)) is (running is not None and running.handle == n + 1)
        view = page.view()
        assert [claim.key.handle for claim in view.claims] == (
            [running.handle] if running is not None else []
        )
        assert {one.handle for one in view.ended} >= set(started) - {
            running.handle if running is not None else 0
        }
        assert [one.handle for one in view.unclaimed] == [
            one.handle for one in held if one.handle not in given
        ]
    page.close()


def test_what_is_held_is_unclaimed_until_it_is_claimed(page: Page) -> None:
    page.hold([key(1), key(2), key(3)])
    page.claim(key(1), job(1), 0.0)
    assert page.view().unclaimed == (key(2), key(3))


def test_a_job_that_was_taken_cannot_be_claimed(page: Page) -> None:
    page.hold([key(1), key(2)])
    page.claim(key(1), job(1), 0.0)
    assert page.take() == [key(2)]
    assert not page.claim(key(2), job(2), 0.0)
    assert [claim.key for claim in page.view().claims] == [key(1)]


def test_a_job_that_was_claimed_cannot_be_taken(page: Page) -> None:
    page.hold([key(1), key(2)])
    page.claim(key(1), job(1), 0.0)
    assert page.take([key(1)]) == []


def test_only_what_is_wanted_is_taken(page: Page) -> None:
    page.hold([key(1), key(2), key(3)])
    assert page.take([key(2), key(9)]) == [key(2)]
    assert page.view().unclaimed == (key(1), key(3))


def test_a_claim_passes_over_what_was_taken_in_front_of_it(page: Page) -> None:
    page.hold([key(1), key(2)])
    page.take([key(1)])
    assert page.claim(key(2), job(2), 0.0)
    assert page.view().unclaimed == ()


def test_the_same_handle_of_another_server_is_another_job(page: Page) -> None:
    page.hold([key(1, server=0), key(1, server=1)])
    assert page.take([key(1, server=1)]) == [key(1, server=1)]
    assert page.claim(key(1, server=0), job(1), 0.0)


def test_holding_more_tells_what_was_taken_meanwhile(page: Page) -> None:
    page.hold([key(1), key(2)])
    page.take([key(1)])
    assert page.hold([key(1), key(2), key(3)]) == {key(1)}
    assert page.view().unclaimed == (key(2), key(3))


def test_holding_nothing_tells_what_was_taken_and_leaves_nothing_to_take(page: Page) -> None:
    page.hold([key(1), key(2)])
    page.take([key(2)])
    assert page.unhold() == {key(2)}
    assert page.take() == []


def test_more_than_fits_is_held_but_cannot_be_taken(page: Page) -> None:
    many = [key(handle) for handle in range(1, MAX_HELD + 3)]
    page.hold(many)
    assert page.take() == many[:MAX_HELD]
    page.unhold()
    page.hold(many)
    for one in many:
        assert page.claim(one, job(one.handle), 0.0)
        page.release()


def test_what_ended_is_shown_until_its_end_is_known(page: Page) -> None:
    page.hold([key(1), key(2)])
    page.claim(key(1), job(1), 0.0)
    page.release()
    page.claim(key(2), job(2), 0.0)
    assert page.view().ended == (key(1),)
    page.hold([key(3)])
    assert page.view().ended == (key(1),)
    page.reported()
    assert page.view().ended == ()


def test_a_job_that_runs_can_be_cancelled(page: Page) -> None:
    page.claim(key(1), job(1), 0.0)
    page.claim(key(2), job(2), 0.0)
    assert page.cancel(key(1))
    assert page.cancelled == key(1)


def test_a_job_that_does_not_run_cannot_be_cancelled(page: Page) -> None:
    page.hold([key(1)])
    page.claim(key(2), job(2), 0.0)
    assert not page.cancel(key(1))
    assert page.cancelled is None


def test_an_item_that_is_over_is_not_cancelled_any_more(page: Page) -> None:
    page.claim(key(1), job(1), 0.0)
    page.at(3, 1, 1.0, 2.0)
    (late,) = page.view().claims
    page.at(4, 1, 1.5, 2.5)
    assert not page.cancel(key(1), late)
    (now,) = page.view().claims
    assert page.cancel(key(1), now)


def test_a_cancel_ends_with_its_job(page: Page) -> None:
    page.claim(key(1), job(1), 0.0)
    page.claim(key(2), job(2), 0.0)
    page.cancel(key(1))
    page.release()
    assert page.cancelled == key(1)
    page.release()
    assert page.cancelled is None


def run_on_page(page: Page, code: str) -> subprocess.Popen[str]:
    """Run code in another process that has the page as `page`."""
    start = "import sys; from dmap.page import *; page = Page(int(sys.argv[1]))\n"
    return subprocess.Popen(
        [sys.executable, "-c", start + code, str(page.fd)],
        pass_fds=[page.fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


LOCK_AND_WAIT = """
fcntl.lockf(page.fd, fcntl.LOCK_EX, 1)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_supervisor_does_not_wait_for_a_child_that_has_the_page_locked(page: Page) -> None:
    with run_on_page(page, LOCK_AND_WAIT) as child:
        assert child.stdout is not None
        child.stdout.readline()
        for look in (page.view, page.take, lambda: page.cancel(key(1))):
            with pytest.raises(BlockingIOError):
                look()
        child.kill()


def test_a_child_that_dies_frees_the_page(page: Page) -> None:
    with run_on_page(page, LOCK_AND_WAIT) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.kill()
    assert page.view() == ((), (), ())


@pytest.mark.parametrize("method", ["by its entry", "in full"])
def test_of_a_job_that_two_processes_want_one_gets_it(page: Page, method: str) -> None:
    """The child claims one after the other while the supervisor takes what it can."""
    n = 400
    keys = [key(handle) for handle in range(1, n + 1)]
    code = f"""
from jobserver.protocol import *
jobs = [Assigned(handle, Origin(b"c" * 16, 1), "f", 0, 1, 1, "pickle", b"", 0.0, 0.0, (), (),
                 LaneId(b"c" * 16, 0)) for handle in range(1, {n + 1})]
keys = [Key(job.handle, {BOOT}, 0) for job in jobs]
by_entry = {method == "by its entry"}
page.hold(keys, jobs if by_entry else ())
print("held", flush=True)
got = []
for key, job in zip(keys, jobs):
    if page.claim_next(job, 0.0) if by_entry else page.claim(key, job, 0.0):
        got.append(job.handle)
        page.release()
print(*got)
"""
    taken: list[int] = []
    with run_on_page(page, code) as child:
        assert child.stdout is not None
        child.stdout.readline()
        claimed: list[str] = []
        reader = threading.Thread(target=lambda: claimed.extend(child.stdout.read().split()))
        reader.start()
        for one in reversed(keys):
            while True:
                try:
                    taken += [found.handle for found in page.take([one])]
                    break
                except BlockingIOError:
                    continue
        reader.join()
    assert sorted([*taken, *map(int, claimed)]) == list(range(1, n + 1))
