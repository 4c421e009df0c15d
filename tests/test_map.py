"""Maps: over a workshop in memory where a test decides what becomes of each chunk, and for real."""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from cluster import Cluster
from hypothesis import given, settings

from dmap import Client, closures, raised, work
from dmap import map as map_module
from dmap.errors import ClosureError, DmapWarning, JobTimeout, NoWorker, WorkerLost
from dmap.map import Items, Map, Settings
from dmap.tickets import Completed, Failed, NoWorkers, Refused, Ticket
from jobserver.protocol import JobException, JobFail

Event = Completed | Failed | Refused
Fate = Callable[[Ticket, Sequence[Any]], Event]


class Workshop:
    """Stands where a connection does. Each wait lets one chunk meet its fate."""

    session = b"s" * 16
    servers = ("sammy",)

    def __init__(self, func: Callable[..., Any], fates: Iterator[Fate] | None = None) -> None:
        self.func = func
        self.fates = fates
        self.numbers = itertools.count(1)
        self.lanes = itertools.count(1)
        self.waiting: deque[Ticket] = deque()
        self.cancelled: list[int] = []
        self.sizes: list[int] = []
        self.attempts: list[int] = []
        self.most_out = 0
        self.n_workers: int | None = 2
        self.choose: Callable[[int], int] = lambda n: 0

    def next_number(self) -> int:
        return next(self.numbers)

    def next_lane(self) -> int:
        return next(self.lanes)

    def command(self, command: object) -> None: ...

    def cancel(self, numbers: Sequence[int]) -> None:
        self.cancelled += numbers
        self.waiting = deque(t for t in self.waiting if t.number not in numbers)

    def why_no_server(self) -> str:
        return ""

    def submit_all(self, tickets: Sequence[Ticket]) -> None:
        self.waiting.extend(tickets)
        self.sizes += [ticket.n_items for ticket in tickets]
        self.attempts += [ticket.terms.attempts for ticket in tickets]
        self.most_out = max(self.most_out, sum(t.n_items for t in self.waiting))
        for ticket in tickets:
            ticket.terms.n_workers = self.n_workers

    def wait(self, done: Callable[[], bool], timeout: float | None, lanes: object) -> bool:
        if self.waiting and not done():
            index = self.choose(len(self.waiting))
            ticket = self.waiting[index]
            del self.waiting[index]
            argument = work.load_argument(ticket.argument)
            fate = complete(self.func) if self.fates is None else next(self.fates)
            ticket.owner.hear(fate(ticket, argument.items))  # type: ignore[union-attr]
        return done()


def complete(func: Callable[..., Any], at_most: int = 2**31) -> Fate:
    """Run the first items, as a worker does."""

    def fate(ticket: Ticket, items: Sequence[Any]) -> Event:
        values: list[Any] = []
        for item in items[:at_most]:
            try:
                values.append(func(item))
            except Exception as error:
                summary, pickled = raised.describe(error)
                message = JobException(ticket.number, *summary, len(values), 1, "papag", 17, 0.001)
                return Failed(
                    ticket.owner, ticket, message, (pickled, whole(work.dump_results(values)))
                )
        body = work.dump_results(values)
        return Completed(ticket.owner, ticket, body, len(values), 0.001, "papag", 2)

    return fate


def whole(body: Any) -> bytes:
    return body if isinstance(body, bytes) else b"".join(body)


def fail(code: str, item: int = 0, n_items: int = 0, attempt: int = 1) -> Fate:
    def fate(ticket: Ticket, items: Sequence[Any]) -> Event:
        message = JobFail(ticket.number, code, "", item, n_items, attempt, "SIGKILL", "papag")  # type: ignore[arg-type]
        return Failed(ticket.owner, ticket, message, ())

    return fate


def make(
    func: Callable[..., Any],
    items: Any,
    fates: Iterator[Fate] | None = None,
    *,
    keep: bool = True,
    **options: Any,
) -> tuple[Map, Workshop]:
    workshop = Workshop(func, fates)
    one = Map(
        workshop,  # type: ignore[arg-type]
        closures.Closure(func),
        Items([items], whole=keep),
        Settings(**options),
        "f",
        keep=keep,
    )
    return one, workshop


def double(x: int) -> int:
    return 2 * x


def flat(parts: Iterator[list[Any]]) -> Iterator[Any]:
    for values in parts:
        yield from values


def test_values_come_in_order() -> None:
    run, workshop = make(double, range(1000))
    workshop.choose = lambda n: n - 1
    assert run.all() == [2 * x for x in range(1000)]


def test_chunks_grow() -> None:
    run, workshop = make(double, range(1000))
    run.all()
    assert workshop.sizes[0] == 1
    assert max(workshop.sizes) > 4


def test_a_chunksize_that_was_said_is_kept() -> None:
    run, workshop = make(double, range(100), chunksize=7)
    run.all()
    assert workshop.sizes == [7] * 14 + [2]


def test_the_rest_of_a_chunk_that_came_home_in_part_is_cut_anew() -> None:
    fates = itertools.chain([complete(double, 3)], itertools.repeat(complete(double)))
    run, _ = make(double, range(20), fates, chunksize=10)
    assert run.all() == [2 * x for x in range(20)]


def test_an_item_that_raises_ends_the_map_with_its_own_error() -> None:
    def invert(x: int) -> float:
        return 1 / (x - 3)

    run, _ = make(invert, range(10), chunksize=2)
    with pytest.raises(ZeroDivisionError) as caught:
        run.all()
    assert "item 3" in "".join(caught.value.__notes__)
    assert run.results() == {0: invert(0), 1: invert(1), 2: invert(2)}


@pytest.mark.parametrize(("on_error", "n"), [("return", 10), ("skip", 9)])
def test_an_item_that_raises_can_be_returned_or_skipped(on_error: str, n: int) -> None:
    run, _ = make(lambda x: 1 / (x - 3), range(10), chunksize=4, on_error=on_error)
    values = run.all()
    assert len(values) == n
    assert sum(isinstance(value, ZeroDivisionError) for value in values) == n - 9


def test_an_ordered_map_yields_what_was_before_the_error() -> None:
    run, _ = make(lambda x: 1 / (x - 3), range(10), keep=False)
    got: list[float] = []
    with pytest.raises(ZeroDivisionError):
        got.extend(flat(run.parts()))
    assert got == [1 / (x - 3) for x in range(3)]


def test_retries_run_the_item_again_alone() -> None:
    n_runs = [0]

    def moody(x: int) -> int:
        if x == 5:
            n_runs[0] += 1
            if n_runs[0] < 3:
                raise OSError("not yet")
        return x

    run, _ = make(moody, range(10), chunksize=4, retries=2)
    assert run.all() == list(range(10))
    assert n_runs == [3]


def test_retries_are_counted_for_each_item() -> None:
    run, _ = make(lambda x: 1 / (x - 3), range(10), chunksize=4, retries=2)
    with pytest.raises(ZeroDivisionError):
        run.all()


def test_the_suspects_of_a_lost_chunk_go_alone_and_the_others_together() -> None:
    fates = itertools.chain([fail("lost", 4, 2)], itertools.repeat(complete(double)))
    run, workshop = make(double, range(10), fates, chunksize=10)
    assert run.all() == [2 * x for x in range(10)]
    assert workshop.sizes == [10, 4, 1, 1, 4]
    assert workshop.attempts == [1, 1, 2, 2, 1], "the lost attempt counts for the suspects only"


def test_nobody_is_blamed_for_a_chunk_that_ended_before_its_worker_died() -> None:
    fates = itertools.chain([fail("lost", 0, 0)] * 5, itertools.repeat(complete(double)))
    run, workshop = make(double, range(10), fates, chunksize=10)
    assert run.all() == [2 * x for x in range(10)]
    assert set(workshop.sizes) == {10}


def test_an_item_that_kills_its_workers_fails_alone() -> None:
    def fates() -> Iterator[Fate]:
        yield fail("lost", 4, 1)
        while True:
            yield lambda t, items: (fail("lost", 0, 1, 2) if items == [4] else complete(double))(
                t, items
            )

    run, _ = make(double, range(10), fates(), chunksize=10, on_error="return")
    values = run.all()
    error = values.pop(4)
    assert isinstance(error, WorkerLost)
    assert (error.index, error.attempts, error.exit) == (4, 3, "SIGKILL")
    assert values == [2 * x for x in range(10) if x != 4]


def test_at_most_once_fails_what_was_lost_and_repeats_nothing() -> None:
    ran: list[int] = []

    def note(x: int) -> int:
        ran.append(x)
        return x

    fates = itertools.chain([fail("lost", 0, 1)], itertools.repeat(complete(note)))
    run, workshop = make(note, range(5), fates, attempts=1, on_error="skip")
    assert run.all() == [1, 2, 3, 4]
    assert ran == [1, 2, 3, 4]
    assert set(workshop.sizes) == {1}


def test_an_item_out_of_time_fails_alone() -> None:
    fates = itertools.chain([fail("timeout", 3, 1)], itertools.repeat(complete(double)))
    run, _ = make(double, range(10), fates, chunksize=10, on_error="return", item_timeout=1.0)
    values = run.all()
    assert isinstance(values.pop(3), JobTimeout)
    assert values == [2 * x for x in range(10) if x != 3]


def test_an_item_that_will_not_pickle_is_named_and_harms_no_other() -> None:
    items = [0, 1, (n for n in ()), 3, 4]
    run, _ = make(lambda x: x, items, chunksize=5, on_error="return")
    values = run.all()
    error = values.pop(2)
    assert isinstance(error, ClosureError)
    assert error.index == 2
    assert values == [0, 1, 3, 4]


def test_a_chunk_that_is_too_large_is_halved() -> None:
    def fates() -> Iterator[Fate]:
        while True:
            yield (
                lambda t, items: (
                    Refused(t.owner, t, "too_large", "no")
                    if len(items) > 2
                    else complete(double)(t, items)
                )
            )

    run, _ = make(double, range(20), fates(), chunksize=8)
    assert run.all() == [2 * x for x in range(20)]


def test_a_whole_map_that_cannot_go_on_raises() -> None:
    fate: Fate = lambda t, items: Refused(t.owner, t, "no_server", "sammy")  # noqa: E731
    run, _ = make(double, range(20), itertools.repeat(fate), on_error="skip")
    with pytest.raises(Exception, match="sammy"):
        run.all()


def test_a_lazy_map_reads_no_more_than_its_buffer() -> None:
    read = itertools.count()
    run, workshop = make(double, read, keep=False, buffersize=10)
    values = flat(run.parts())
    got = list(itertools.islice(values, 100))
    assert got == [2 * x for x in range(100)]
    assert next(read) <= 111
    assert workshop.most_out <= 10


def test_a_lazy_map_reads_no_more_items_ahead_than_it_has_memory_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(map_module, "WINDOW_ITEMS", 100)
    n_read = n_taken = most = 0

    def read() -> Iterator[int]:
        nonlocal n_read, most
        for n in range(5_000):
            n_read = n + 1
            most = max(most, n_read - n_taken)
            yield n

    run, _ = make(double, read(), keep=False)
    for part in run.parts():
        n_taken += len(part)
    assert n_taken == 5_000
    assert 50 < most <= 100 + 65  # a part is taken when the next one is asked for


def test_a_lazy_map_is_bounded_by_itself() -> None:
    read = itertools.count()
    run, _ = make(double, read, keep=False)
    next(flat(run.parts()))
    assert next(read) < 1000


def test_an_unordered_map_yields_what_comes_first() -> None:
    run, workshop = make(double, range(4), keep=False, ordered=False, chunksize=1)
    workshop.choose = lambda n: n - 1
    assert next(flat(run.parts())) != 0


def test_closing_cancels_what_is_out() -> None:
    run, workshop = make(double, itertools.count(), keep=False)
    next(flat(run.parts()))
    out = {ticket.number for ticket in workshop.waiting}
    assert out
    commands: list[Any] = []
    workshop.command = commands.append  # type: ignore[method-assign,assignment]
    run.close()
    cancelled: list[int] = []

    class State:
        def cancel(self, numbers: list[int]) -> None:
            cancelled.extend(numbers)

        def close_lane(self, lane: int) -> None: ...

    commands[0](State(), 0.0)
    assert set(cancelled) == out


def test_a_map_out_of_time_says_so() -> None:
    never: Fate = lambda t, items: fail("cancelled")(t, items)  # noqa: E731
    run, workshop = make(double, range(10), itertools.repeat(never), timeout=1e-9)
    workshop.wait = lambda done, timeout, lanes: False  # type: ignore[method-assign]
    with pytest.raises(JobTimeout):
        run.all()


def test_a_map_out_of_time_without_workers_says_that() -> None:
    run, workshop = make(double, range(10), timeout=1e-9, labels=["gpu"])
    workshop.n_workers = 0
    workshop.wait = lambda done, timeout, lanes: False  # type: ignore[method-assign]
    with pytest.raises(NoWorker, match=r"no worker at sammy .* the label gpu.*1e-09 s are over"):
        run.all()


def test_a_map_out_of_time_without_workers_tells_what_the_warning_told() -> None:
    run, workshop = make(double, range(10), timeout=1e-9, labels=["gpu"])
    workshop.n_workers = 0
    submit_all = workshop.submit_all

    def submit(tickets: Sequence[Ticket]) -> None:
        submit_all(tickets)
        for ticket in tickets:
            ticket.terms.absence = NoWorkers(ticket.terms, 4, ("3.11",), ("big",))

    workshop.submit_all = submit  # type: ignore[method-assign]
    workshop.wait = lambda done, timeout, lanes: False  # type: ignore[method-assign]
    with pytest.raises(NoWorker, match=r"there are 4 with Python 3\.11, the label big"):
        run.all()


def test_equal_items_of_a_merged_map_have_equal_uniqs() -> None:
    run, workshop = make(double, [3, 4, 3], merge=True)
    uniqs: list[bytes] = []
    submit_all = workshop.submit_all

    def see(tickets: Sequence[Ticket]) -> None:
        uniqs.extend(ticket.uniq for ticket in tickets)
        submit_all(tickets)

    workshop.submit_all = see  # type: ignore[method-assign]
    assert run.all() == [6, 8, 6]
    assert uniqs[0] == uniqs[2] != uniqs[1]


def test_chunks_come_from_both_ends_of_a_list_and_the_values_are_in_order() -> None:
    run, workshop = make(double, list(range(300)))
    firsts: list[int] = []
    submit_all = workshop.submit_all

    def see(tickets: Sequence[Ticket]) -> None:
        firsts.extend(work.load_argument(ticket.argument).items[0] for ticket in tickets)  # type: ignore[union-attr]
        submit_all(tickets)

    workshop.submit_all = see  # type: ignore[method-assign]
    assert run.all() == [2 * n for n in range(300)]
    assert firsts[:4] == [0, 299, 1, 298]


@pytest.mark.parametrize("options", [{"chunksize": 7}, {"attempts": 1}, {"merge": True}])
def test_who_says_how_to_cut_has_his_chunks_from_the_front(options: dict[str, Any]) -> None:
    run, workshop = make(double, list(range(30)), **options)
    firsts: list[int] = []
    submit_all = workshop.submit_all

    def see(tickets: Sequence[Ticket]) -> None:
        firsts.extend(work.load_argument(ticket.argument).items[0] for ticket in tickets)  # type: ignore[union-attr]
        submit_all(tickets)

    workshop.submit_all = see  # type: ignore[method-assign]
    assert run.all() == [2 * n for n in range(30)]
    assert firsts == sorted(firsts)


def test_a_lazy_map_sees_what_is_added_to_its_list() -> None:
    todo = list(range(5))
    run, _ = make(double, todo, keep=False)
    values: list[int] = []
    for part in run.parts():
        values += part
        if len(todo) < 20:
            todo.append(len(todo))
    assert values == [2 * n for n in range(20)]


@pytest.mark.parametrize("kind", [list, tuple, range, iter])
@pytest.mark.parametrize("n_others", [0, 1])
def test_items_are_the_same_from_whatever_they_come(kind: Any, n_others: int) -> None:
    items = Items([kind(range(9)) if kind is not range else range(9)] + [range(12)] * n_others)
    taken = [*items.take(4), *items.take(3), *items.take(9), *items.take(1)]
    assert taken == (list(zip(range(9), range(9), strict=True)) if n_others else list(range(9)))


def test_items_meet_in_the_middle() -> None:
    items = Items([["a", "b", "c", "d", "e"], range(4)], whole=True)
    assert items.has_end
    assert items.take_last(1) == (3, [("d", 3)])
    assert items.take(2) == [("a", 0), ("b", 1)]
    assert items.take_last(5) == (2, [("c", 2)])
    assert items.take_last(1)[1] == items.take(1) == []


def test_each_item_of_a_starmap_is_a_tuple_from_either_end() -> None:
    items = Items([[[1, 2], [3, 4]]], star=True, whole=True)
    assert items.take_last(1) == (1, [(3, 4)])
    assert items.take(1) == [(1, 2)]


def test_a_subclass_of_list_has_its_own_ways() -> None:
    class Odd(list[int]):
        def __iter__(self) -> Iterator[int]:
            return iter([7, 8, 9])

    items = Items([Odd([1, 2, 3])], whole=True)
    assert not items.has_end
    assert items.take(3) == [7, 8, 9]


def test_a_range_is_sent_as_ranges() -> None:
    run, workshop = make(double, range(100_000))
    sent: list[Any] = []
    submit_all = workshop.submit_all

    def see(tickets: Sequence[Ticket]) -> None:
        sent.extend(work.load_argument(ticket.argument).items for ticket in tickets)  # type: ignore[union-attr]
        submit_all(tickets)

    workshop.submit_all = see  # type: ignore[method-assign]
    assert run.all() == list(range(0, 200_000, 2))
    assert {type(items) for items in sent} == {range}


class SlowWorkshop:
    """Holds back the first chunk of a map until that has copied it, and then decides what ends how.

    Args:
        ends: what becomes of the two runs of it, in turn: who ("first" or "copy"), and its fate.
    """

    def __init__(self, ends: list[tuple[str, Fate]], **options: Any) -> None:
        self.run, self.workshop = make(double, range(3), backup=True, chunksize=1, **options)
        self.ends = deque(ends)
        self.runs: dict[str, Ticket] = {}
        self.wait_for_others = self.workshop.wait
        self.workshop.wait = self.wait  # type: ignore[method-assign]

    def wait(self, done: Callable[[], bool], timeout: float | None, lanes: object) -> bool:
        waiting = self.workshop.waiting
        if not self.runs:
            self.runs["first"] = waiting.popleft()
        if not waiting:
            time.sleep(timeout or 0)
            return done()
        if waiting[0].argument is self.runs["first"].argument:
            self.runs["copy"] = waiting.popleft()
            self.end()
            return done()
        return self.wait_for_others(done, timeout, lanes)

    def end(self) -> None:
        while self.ends:
            who, fate = self.ends.popleft()
            ticket = self.runs[who]
            argument = work.load_argument(ticket.argument)
            assert isinstance(argument, work.Chunk)
            ticket.owner.hear(fate(ticket, argument.items))  # type: ignore[arg-type]


def raises(ticket: Ticket, items: Sequence[Any]) -> Event:
    def bad(item: Any) -> Any:
        raise KeyError(item)

    return complete(bad)(ticket, items)


@pytest.mark.parametrize(("winner", "loser"), [("first", "copy"), ("copy", "first")])
def test_a_late_chunk_is_copied_and_the_first_result_wins(winner: str, loser: str) -> None:
    slow = SlowWorkshop([(winner, complete(double))])
    assert slow.run.all() == [0, 2, 4]
    assert slow.workshop.cancelled == [slow.runs[loser].number]


@pytest.mark.parametrize("failure", [raises, fail("lost", n_items=1), fail("timeout")])
@pytest.mark.parametrize(("one", "other"), [("first", "copy"), ("copy", "first")])
def test_a_run_that_fails_does_not_hurt_while_the_other_goes_on(
    failure: Fate, one: str, other: str
) -> None:
    slow = SlowWorkshop([(one, failure), (other, complete(double))])
    assert slow.run.all() == [0, 2, 4]
    assert slow.workshop.cancelled == []


def test_what_raises_in_both_runs_is_raised() -> None:
    slow = SlowWorkshop([("copy", raises), ("first", raises)])
    with pytest.raises(KeyError):
        slow.run.all()


def test_the_losses_of_both_runs_are_attempts() -> None:
    lost = fail("lost", n_items=1)
    slow = SlowWorkshop([("copy", lost), ("first", lost)], attempts=2)
    with pytest.raises(WorkerLost, match="2"):
        slow.run.all()


def test_a_result_that_comes_after_the_other_is_dropped() -> None:
    slow = SlowWorkshop([("copy", complete(double)), ("first", complete(str))])
    assert slow.run.all() == [0, 2, 4]


@pytest.mark.parametrize(
    "options",
    [
        {"chunksize": 0},
        {"retries": -1},
        {"attempts": 0},
        {"on_error": "ignore"},
        {"priority": "urgent"},
        {"timeout": 0},
        {"item_timeout": -1.0},
        {"buffersize": 0},
        {"labels": "gpu"},
        {"merge": True, "chunksize": 5},
        {"merge": True, "backup": True},
        {"attempts": 1, "backup": True},
    ],
)
def test_an_option_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Settings(**options)


@given(
    n=st.integers(0, 60),
    seed=st.integers(0, 2**32),
    chunksize=st.one_of(st.just("auto"), st.integers(1, 20)),
    keep=st.booleans(),
    ordered=st.booleans(),
    retries=st.integers(0, 2),
    bad=st.sets(st.integers(0, 59), max_size=4),
    buffersize=st.one_of(st.none(), st.integers(1, 9)),
)
@settings(max_examples=200)
def test_whatever_becomes_of_chunks_each_item_has_one_value(
    n: int,
    seed: int,
    chunksize: Any,
    keep: bool,
    ordered: bool,
    retries: int,
    bad: set[int],
    buffersize: int | None,
) -> None:
    chance = random.Random(seed)

    def invert(x: int) -> float:
        if x in bad:
            raise ValueError(x)
        return x + 0.5

    def fates() -> Iterator[Fate]:
        n_lost = 0
        while True:
            kind = chance.choice(["complete", "complete", "part", "lost", "lost"])
            if kind == "lost" and n_lost < 30:
                n_lost += 1
                first = chance.randint(0, 3)
                yield lambda t, items, first=first: (  # type: ignore[misc]
                    fail("lost", min(first, len(items) - 1), 1)(t, items)
                    if t.terms.attempts < 3
                    else complete(invert)(t, items)
                )
            else:
                yield complete(invert, chance.randint(1, 5) if kind == "part" else 2**31)

    run, workshop = make(
        invert,
        range(n),
        fates(),
        keep=keep,
        chunksize=chunksize,
        ordered=ordered or keep,
        retries=retries,
        on_error="return",
        attempts=200,
        buffersize=buffersize,
    )
    workshop.choose = lambda n: chance.randrange(n)
    values = run.all() if keep else list(flat(run.parts()))
    shown = [value.args[0] if isinstance(value, ValueError) else value for value in values]
    expected = [x if x in bad else x + 0.5 for x in range(n)]
    assert shown == expected if ordered or keep else sorted(shown) == sorted(expected)
    assert not workshop.waiting


# --- over real processes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(kept: None) -> Iterator[Cluster]:
    with Cluster() as one:
        one.start_worker(2, "--name", "papag")
        yield one


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.endpoints) as one:
        yield one


@pytest.mark.slow
def test_a_map_over_a_closure(client: Client) -> None:
    rate = 1.07
    prices = list(range(5000))
    assert client.dmap(lambda price: price * rate, prices) == [p * rate for p in prices]


@pytest.mark.slow
def test_the_shortest_iterable_ends_the_map(client: Client) -> None:
    assert client.dmap(pow, [2, 3, 4], itertools.count()) == [1, 3, 16]


@pytest.mark.slow
def test_tuples_are_not_unpacked_but_by_starmap(client: Client) -> None:
    assert client.dmap(lambda pair: pair, [(1, 2)]) == [(1, 2)]
    assert client.starmap(pow, ([n, 2] for n in range(4))) == [0, 1, 4, 9]


@pytest.mark.slow
def test_endless_input_ends_with_its_iterator(client: Client) -> None:
    values = client.imap(lambda x: x * x, itertools.count())
    assert list(itertools.islice(values, 1000)) == [x * x for x in range(1000)]
    values.close()


@pytest.mark.slow
def test_the_exception_carries_where_it_was_and_what_was_finished(client: Client) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        client.dmap(lambda x: 1 / (17 - x), range(30))
    assert any("item 17" in note for note in caught.value.__notes__)
    assert "ZeroDivisionError" in str(caught.value.__cause__)
    assert caught.value.results[0] == 1 / 17  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_bad_item_among_hundreds_fails_alone(client: Client) -> None:
    def work(x: int) -> int:
        import os

        if x == 77:
            raise ValueError("raises")
        if x == 177:
            os._exit(3)
        if x == 277:
            os.kill(os.getpid(), 9)
        return x

    values = client.dmap(work, range(500), on_error="return", attempts=2)
    assert isinstance(values[77], ValueError)
    assert isinstance(values[177], WorkerLost)
    assert values[177].exit == "exit code 3"
    assert isinstance(values[277], WorkerLost)
    assert values[277].index == 277
    good = [x for x in range(500) if x not in (77, 177, 277)]
    assert [values[x] for x in good] == good


@pytest.mark.slow
def test_the_time_of_one_item_is_bounded(client: Client) -> None:
    def work(x: int) -> int:
        import time

        if x == 5:
            time.sleep(60)
        return x

    values = client.dmap(work, range(20), item_timeout=0.5, on_error="return")
    assert isinstance(values.pop(5), JobTimeout)
    assert values == [x for x in range(20) if x != 5]


@pytest.mark.slow
def test_the_time_of_a_whole_map_is_bounded(client: Client) -> None:
    def work(x: int) -> int:
        import time

        if x > 3:
            time.sleep(60)
        return x

    with pytest.raises(JobTimeout) as caught:
        client.dmap(work, range(20), timeout=1.0, chunksize=1)
    assert caught.value.results == {n: n for n in range(4)}  # type: ignore[attr-defined]


@pytest.mark.slow
def test_nobody_to_run_it_is_a_warning_first_and_then_an_error(cluster: Cluster) -> None:
    with (
        Client(cluster.endpoints) as own,
        pytest.warns(DmapWarning, match="gpu") as warned,
        pytest.raises(NoWorker, match="gpu"),
    ):
        own.dmap(double, range(3), labels=["gpu"], timeout=6.0)
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.slow
def test_equal_items_are_run_once(client: Client, tmp_path: Path) -> None:
    def note(path: str) -> str:
        import time

        with open(path, "a") as file:
            file.write("x")
        time.sleep(0.3)
        return path

    path = str(tmp_path / "runs")
    assert client.dmap(note, [path] * 50, merge=True) == [path] * 50
    assert Path(path).read_text() == "x"


@pytest.mark.slow
def test_a_backed_up_map_is_right(client: Client) -> None:
    def work(x: int) -> int:
        import time

        time.sleep(0.3 if x == 19 else 0.001)
        return x

    assert client.dmap(work, range(20), backup=True) == list(range(20))


@pytest.mark.slow
def test_large_items_and_results_come_through(client: Client) -> None:
    blocks = [bytes([n]) * 3_000_000 for n in range(6)]
    assert client.dmap(lambda block: block + b"!", blocks) == [block + b"!" for block in blocks]


def resident(_: object = None) -> int:
    """Return the bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc")
def test_a_lazy_map_over_millions_takes_little_memory(client: Client) -> None:
    workers = max(client.dmap(resident, range(50), chunksize=1))
    here = most = resident()
    for n, value in enumerate(client.imap(double, iter(range(1_000_000)))):
        assert value == 2 * n
        if n % 50_000 == 0:
            most = max(most, resident())
    assert most - here < 150e6
    assert max(client.dmap(resident, range(50), chunksize=1)) - workers < 150e6


@pytest.mark.slow
def test_a_bar_counts_the_items(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.dmap(double, range(100), progress=True, desc="squares")
    said = capsys.readouterr().err
    assert "squares" in said
    assert "100/100" in said


@pytest.mark.slow
@pytest.mark.parametrize("victim", range(3))
def test_any_one_of_three_servers_may_be_killed_in_the_middle(victim: int, tmp_path: Path) -> None:
    def note(x: int) -> int:
        import time

        time.sleep(0.002)
        return x

    with Cluster(n_servers=3) as cluster:
        cluster.start_worker(2)
        with Client(cluster.endpoints) as client:
            values = client.imap(note, range(1500))
            got = list(itertools.islice(values, 200))
            cluster.servers[victim].kill()
            got += values
    assert got == list(range(1500))


@pytest.mark.slow
def test_jobs_survive_each_server_in_turn(tmp_path: Path) -> None:
    with Cluster(n_servers=3) as cluster:
        cluster.start_worker(2)
        with Client(cluster.endpoints) as client:
            jobs = [client.submit(double, n) for n in range(400)]
            for server in cluster.servers:
                server.kill()
                server.start()
                jobs += [client.submit(double, n) for n in range(400)]
            assert [job.result(60) for job in jobs] == [2 * n for n in range(400)] * 4


@pytest.mark.slow
def test_a_worker_may_be_killed_in_the_middle(tmp_path: Path) -> None:
    with Cluster() as cluster:
        cluster.start_worker(1)
        cluster.start_worker(1)
        with Client(cluster.endpoints) as client:
            values = client.imap(slow_double, range(500))
            got = list(itertools.islice(values, 50))
            cluster.workers[0].kill()
            got += values
    assert got == [2 * n for n in range(500)]


def slow_double(x: int) -> int:
    time.sleep(0.002)
    return 2 * x
