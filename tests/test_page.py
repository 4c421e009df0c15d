"""The page that a supervisor and a child share: a job is started or given back, never both."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import msgspec
import pytest

from dmap.page import MAX_DEPTH, MAX_HELD, Key, Page, Settings, boot_key, make_page, read_settings
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


def test_of_a_job_that_two_processes_want_one_gets_it(page: Page) -> None:
    """The child claims one after the other while the supervisor takes what it can."""
    n = 400
    keys = [key(handle) for handle in range(1, n + 1)]
    page.hold(keys)
    code = f"""
from jobserver.protocol import *
job = Assigned(1, Origin(b"c" * 16, 1), "f", 0, 1, 1, "pickle", b"", 0.0, 0.0, (), (),
               LaneId(b"c" * 16, 0))
got = []
for handle in range(1, {n + 1}):
    if page.claim(Key(handle, {BOOT}, 0), job, 0.0):
        got.append(handle)
        page.release()
print(*got)
"""
    taken: list[int] = []
    with run_on_page(page, code) as child:
        assert child.stdout is not None
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
