"""Which call failed, in a note; and the same call once more, here."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import pickle
import random
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster import Cluster

from dmap import Client, current_job, job, raised, registry, work
from dmap.closures import Closure
from dmap.errors import JobTimeout, WorkerLost
from dmap.replay import ItemCall, JobCall, Replay, attach, of_ticket, short_repr
from dmap.tickets import NOBODY, Attached, Blob, Terms, Ticket


@dataclasses.dataclass
class Point:
    x: int
    y: int


class Framed:
    """As a data frame is: it has a shape, and its repr is long."""

    shape = (1000, 5)

    def __repr__(self) -> str:
        raise AssertionError("its repr was made")


class Refuses:
    def __repr__(self) -> str:
        raise SystemExit("no")


class Interrupted:
    def __repr__(self) -> str:
        raise KeyboardInterrupt


class Endless:
    def __init__(self) -> None:
        self.is_asked = False

    def __repr__(self) -> str:
        self.is_asked = True
        return "x" * 1000


def refuse(*args: Any, **kwargs: Any) -> None:
    raise ValueError(*args, *kwargs.values())


def ticket_of(func: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Ticket:
    """Return the ticket that a submit of this call makes."""
    if isinstance(func, str):
        return Ticket(1, Terms(func), work.dump_named(args, kwargs), NOBODY)
    terms = Terms(work.FUNCTION, blobs=Closure(func).blobs)
    return Ticket(1, terms, work.dump_call(args, kwargs), NOBODY)


# --- how people read it -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (17, "17"),
        ("it's", '"it\'s"'),
        (Point(1, 2), "Point(x=1, y=2)"),
        ([1, [2, [3, [4]]]], "[1, [2, [3, [...]]]]"),
        ((1,), "(1,)"),
        ((), "()"),
        ({"a": {1}}, "{'a': {1}}"),
        (frozenset({1}), "frozenset({1})"),
        (set(), "set()"),
        (list(range(10**6)), "[0, 1, 2, 3, 4, 5, ...]"),
        (10**5000, "<int of 16610 bits>"),
        (np.zeros((1000, 3)), "ndarray float64 (1000, 3)"),
        ([np.zeros(2, dtype=np.int8)], "[ndarray int8 (2,)]"),
        (np.float64(2.5), "np.float64(2.5)"),
        (Framed(), "Framed (1000, 5)"),
        (object(), "<object object>"),
        (Refuses(), "<Refuses>"),
        ([Refuses(), 1], "[<Refuses>, 1]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_shown_in_a_few_words(value: object, text: str) -> None:
    assert short_repr(value) == text


@pytest.mark.parametrize(
    "value",
    ["a" * 10**6 + "z", b"a" * 10**6 + b"z", Endless(), {"a" * 1000: "b" * 1000}, ["a" * 999] * 9],
    ids=lambda value: type(value).__name__,
)
def test_what_is_shown_has_at_most_120_characters(value: object) -> None:
    text = short_repr(value)
    assert "..." in text
    assert len(text) <= 120


def test_a_text_that_is_too_long_is_shown_with_both_its_ends() -> None:
    text = short_repr("begin" + "-" * 1000 + "end")
    assert text.startswith("'begin")
    assert text.endswith("end'")


def test_what_is_shown_is_one_line() -> None:
    assert "\n" not in short_repr(type("Lines", (), {"__repr__": lambda self: "a\n  b"})())


def test_ctrl_c_while_a_value_is_shown_is_the_clients_own() -> None:
    with pytest.raises(KeyboardInterrupt):
        short_repr(Interrupted())


def test_an_object_that_is_large_is_not_asked() -> None:
    endless = Endless()
    assert short_repr(endless, nbytes=2**30) == "<Endless>"
    assert not endless.is_asked


@pytest.mark.parametrize(
    ("call", "index", "where", "note"),
    [
        (ItemCall(abs, Point(1, 2)), 17, "on papag", "item 17 (Point(x=1, y=2)), on papag"),
        (ItemCall(pow, (2, 5), star=True), 0, "on papag", "item 0 (2, 5), on papag"),
        (ItemCall(pow, (2, 5)), 0, "", "item 0 ((2, 5))"),
        (None, 3, "on papag", "item 3, on papag"),
        (None, None, "on papag", "on papag"),
    ],
)
def test_a_note_says_which_item_of_a_map_it_was(
    call: ItemCall | None, index: int | None, where: str, note: str
) -> None:
    error = ValueError()
    error.add_note("mind the gap")
    attach(error, call, index, where)
    assert error.__notes__ == ["mind the gap", note]


def test_an_error_without_anything_to_say_has_no_note() -> None:
    error = ValueError()
    attach(error, None)
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize(
    ("ticket", "text"),
    [
        (ticket_of(refuse, 3, b=4), "refuse(3, b=4)"),
        (ticket_of(lambda: 0), "<lambda>()"),
        (ticket_of("resize", "a.png", width=3), "resize('a.png', width=3)"),
        (ticket_of(refuse, *range(100)), f"refuse({', '.join(map(str, range(32)))}, ...)"),
        (ticket_of(refuse, bytes(2**21)), "refuse(...)"),
        (Ticket(1, Terms("read", encoding="raw"), (b"ab", b"c"), NOBODY), "read(b'abc')"),
        (Ticket(1, Terms("read"), b"junk", NOBODY), "read(...)"),
        (Ticket(1, Terms("dmap", blobs=(Blob(b"x", b"junk"),)), b"", NOBODY), "a function(...)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_job_is_shown_as_a_call(ticket: Ticket, text: str) -> None:
    assert JobCall(ticket).text() == text


def test_the_name_of_a_jobs_function_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = ticket_of(lambda: "a function of its own")
    assert JobCall(ticket).text() == "<lambda>()"
    monkeypatch.setattr("dmap.functions.load_function", None)
    assert JobCall(ticket).text() == "<lambda>()"


def test_a_job_of_somebody_else_is_not_known_here() -> None:
    assert of_ticket(Attached(1, "sammy:boot", 3, NOBODY)) is None


# --- the call once more -----------------------------------------------------------------------


def replayed(error: Any) -> Any:
    """Return what replaying an error raises."""
    with pytest.raises(type(error)) as caught:
        error.replay()
    return caught.value


def test_an_item_is_replayed_with_the_callers_own_function_and_object() -> None:
    seen: list[object] = []
    point = Point(1, 2)
    error: Any = ValueError()
    attach(error, ItemCall(seen.append, point), 0)
    assert error.replay() is None
    assert seen[0] is point


def test_a_starred_item_is_replayed_as_arguments() -> None:
    assert ItemCall(pow, (2, 5), star=True).run() == 32


def test_a_replay_raises_with_the_frames_of_the_function() -> None:
    error: Any = ValueError()
    attach(error, ItemCall(refuse, 3), 0)
    again = replayed(error)
    assert again is not error
    assert traceback.extract_tb(again.__traceback__)[-1].name == "refuse"


def test_a_replay_in_a_map_with_a_seed_has_the_items_numbers() -> None:
    def draw(item: object) -> Any:
        rng = current_job().rng
        return random.random(), np.random.random(), rng.random()

    first, again, other = (ItemCall(draw, 0, seeding=(7, index)).run() for index in (3, 3, 4))
    assert first == again
    assert not set(first) & set(other)


def test_a_replay_leaves_the_random_numbers_of_its_process_alone() -> None:
    before = random.getstate()
    ItemCall(lambda item: random.random(), 0, seeding=(7, 3)).run()
    assert random.getstate() == before


def test_a_job_is_replayed_from_what_was_sent() -> None:
    captured = ["as it was"]

    def func(extra: list[str], *, more: str) -> list[str]:
        return [*captured, *extra, more]

    call = JobCall(ticket_of(func, ["sent"], more="named"))
    captured.append("changed")
    assert call.run() == ["as it was", "sent", "named"]


seen: list[object] = []


def test_a_replay_uses_the_local_modules_of_this_process() -> None:
    def func(item: object) -> None:
        refuse.__globals__["seen"].append(item)

    ticket = ticket_of(func, 3)
    assert len(ticket.terms.blobs) == 2, "a local module went along"
    JobCall(ticket).run()
    assert seen.pop() == 3


def test_a_named_function_is_replayed_if_it_is_here() -> None:
    @job("replayed-here")
    def function(a: int, b: int) -> int:
        return a - b

    assert JobCall(ticket_of("replayed-here", 5, b=3)).run() == 2


def test_a_named_function_that_is_not_here_is_named() -> None:
    with pytest.raises(LookupError, match=r"no function 'nowhere' is registered in this process"):
        JobCall(ticket_of("nowhere")).run()


def test_a_job_of_raw_bytes_is_replayed_with_them() -> None:
    @job("raw-here")
    def function(body: bytes) -> bytes:
        return body[::-1]

    assert JobCall(Ticket(1, Terms("raw-here", encoding="raw"), b"abc", NOBODY)).run() == b"cba"


def test_a_replay_can_use_the_current_job() -> None:
    def talk(item: int) -> tuple[str, int, bool]:
        here = current_job()
        here.status(1, 2)
        here.data({"rows": 3})
        here.warning("no coffee")
        here.cant_do("talk")
        return here.function, here.attempt, here.cancelled

    assert ItemCall(talk, 3).run() == ("dmap", 1, False)
    with pytest.raises(RuntimeError, match="outside a job"):
        current_job()


def test_a_replay_in_a_job_leaves_that_jobs_worker_in_its_place() -> None:
    class Worker:
        def innermost(self) -> None:
            return None

    worker: Any = Worker()
    registry.set_host(worker)
    try:
        assert ItemCall(abs, -3).run() == 3
        assert registry._host is worker
    finally:
        registry.set_host(None)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_copy_of_an_error_can_be_replayed(again: Callable[[Any], Any]) -> None:
    error: Any = ValueError("text")
    attach(error, ItemCall(lambda lock: 3, threading.Lock()), 0)
    assert again(error).replay() == 3


def test_an_error_from_another_process_says_where_it_can_be_replayed() -> None:
    error: Any = ValueError("text")
    attach(error, ItemCall(abs, threading.Lock()), 0)
    back = pickle.loads(pickle.dumps(error))
    with pytest.raises(RuntimeError, match="only in the process that made its map or job"):
        back.replay()


def test_an_error_that_comes_home_again_is_replayed_where_it_arrives() -> None:
    inner: Any = ValueError("text")
    attach(inner, ItemCall(abs, -1), 0)
    outer: Any = raised.restore(*raised.describe(inner))
    assert isinstance(outer.replay, Replay)
    attach(outer, ItemCall(abs, -3), 5)
    assert outer.replay() == 3


def test_an_attribute_of_the_users_own_is_left_alone() -> None:
    class Film(Exception):
        replay = "in slow motion"

    error = Film()
    attach(error, ItemCall(abs, -1), 0)
    assert error.replay == "in slow motion"


def test_a_replay_keeps_only_its_item_and_function_alive() -> None:
    class Thing:
        pass

    item, other = Thing(), Thing()
    chunk = [item, other]
    error = ValueError()
    attach(error, ItemCall(id, chunk[0]), 0)
    watched, gone = weakref.ref(item), weakref.ref(other)
    del item, other, chunk
    gc.collect()
    assert gone() is None
    assert watched() is not None
    del error
    gc.collect()
    assert watched() is None


# --- over real processes ----------------------------------------------------------------------

MODULE = """
from dmap import job

@job("refuse")
def refuse(path, width=1):
    raise LookupError(path, width)
"""


@pytest.fixture(scope="module")
def cluster(kept: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "jobs_to_replay.py").write_text(MODULE)
    with Cluster() as one:
        one.start_worker(2, "--name", "papag", "--import", "jobs_to_replay", path=folder)
        yield one


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.endpoints) as one:
        yield one


def caught(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a call raises."""
    with pytest.raises(Exception) as found:
        call(*args, **kwargs)
    return found.value


HOST = os.uname().nodename


@pytest.mark.slow
def test_an_item_that_raised_is_named_and_replayed(client: Client) -> None:
    def func(n: int) -> float:
        return 10 / n

    error = caught(client.dmap, func, [5, 0, 2], chunksize=3)
    (note,) = error.__notes__
    assert note.startswith(f"item 1 (0), on {HOST} (pid ")
    assert int(note.rpartition("pid ")[2].rstrip(")")) != os.getpid()
    again = replayed(error)
    assert traceback.extract_tb(again.__traceback__)[-1].name == "func"
    assert error.results == {0: 2.0}


@pytest.mark.slow
def test_a_tuple_of_arguments_that_raised_is_named_and_replayed(client: Client) -> None:
    error = caught(client.starmap, refuse, [("a", 1)])
    assert error.__notes__[0].startswith("item 0 ('a', 1), on ")
    assert replayed(error).args == ("a", 1)


@pytest.mark.slow
def test_errors_that_are_returned_can_be_replayed(client: Client) -> None:
    errors: list[Any] = client.dmap(refuse, [Point(1, 2), Point(3, 4)], on_error="return")
    assert [replayed(error).args for error in errors] == [(Point(1, 2),), (Point(3, 4),)]
    assert [error.__notes__[0].partition(", on ")[0] for error in errors] == [
        "item 0 (Point(x=1, y=2))",
        "item 1 (Point(x=3, y=4))",
    ]


@pytest.mark.slow
def test_a_replay_draws_what_the_item_drew(client: Client) -> None:
    def draw(item: int) -> None:
        rng = current_job().rng
        raise ValueError(random.random(), rng.random())

    errors: list[Any] = client.dmap(draw, range(3), seed=7, on_error="return")
    assert [replayed(error).args for error in errors] == [error.args for error in errors]
    assert len({error.args for error in errors}) == 3


@pytest.mark.slow
def test_a_job_that_raised_is_named_and_replayed(client: Client) -> None:
    error = caught(client.submit(refuse, 3, b=4).result)
    assert error.__notes__[0].startswith(f"of refuse(3, b=4), on {HOST} (pid ")
    assert replayed(error).args == (3, 4)


@pytest.mark.slow
def test_a_named_job_that_raised_is_named(client: Client) -> None:
    error = caught(client.submit("refuse", "a.png", width=3).result)
    assert error.__notes__[0].startswith("of refuse('a.png', width=3), on ")
    with pytest.raises(LookupError, match="no function 'refuse' is registered"):
        error.replay()


@pytest.mark.slow
def test_a_background_job_of_somebody_else_cannot_be_replayed(client: Client) -> None:
    error = caught(client.attach(client.background("refuse", "a.png")).result)
    with pytest.raises(RuntimeError, match="only in the process that made"):
        error.replay()


@pytest.mark.slow
def test_an_item_that_killed_its_worker_is_named_and_replayed(client: Client) -> None:
    here = os.getpid()

    def kill(n: int) -> int:
        if n == 1 and os.getpid() != here:
            os._exit(3)
        return n

    error = caught(client.dmap, kill, range(3), attempts=1)
    assert isinstance(error, WorkerLost)
    assert error.__notes__ == ["item 1 (1)"]
    assert error.replay() == 1


@pytest.mark.slow
def test_an_item_out_of_its_time_is_named_and_replayed(client: Client) -> None:
    here = os.getpid()

    def linger(name: str) -> str:
        while os.getpid() != here:
            threading.Event().wait(0.1)
        return name

    error = caught(client.dmap, linger, ["a"], item_timeout=0.2)
    assert isinstance(error, JobTimeout)
    assert error.__notes__ == ["item 0 ('a')"]
    assert error.replay() == "a"


@pytest.mark.slow
def test_an_item_that_cannot_be_pickled_is_named(client: Client) -> None:
    error = caught(client.dmap, abs, [1, threading.Lock()])
    assert error.__notes__ == ["item 1 (<unlocked _thread.lock object>)"]


@pytest.mark.slow
def test_a_map_in_a_replay_runs(client: Client) -> None:
    servers = client._servers
    here = os.getpid()

    def outer(n: int) -> list[int]:
        if os.getpid() != here:
            raise ValueError(n)
        with Client(servers) as inner:
            return inner.dmap(lambda m: m * n, range(3))

    error = caught(client.dmap, outer, [2])
    assert error.replay() == [0, 2, 4]


@pytest.mark.slow
def test_the_attempt_that_raised_is_named_if_others_were_lost(
    client: Client, tmp_path: Path
) -> None:
    path = str(tmp_path / "was-here")

    def die_first(n: int) -> None:
        if not os.path.exists(path):
            open(path, "w").close()
            os._exit(3)
        raise ValueError(n)

    error = caught(client.dmap, die_first, [1])
    assert error.__notes__[0].endswith("), attempt 2")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::dmap.errors.DmapWarning")
def test_writing_to_a_captured_array_says_what_to_do(client: Client) -> None:
    array = np.zeros(10)

    def write(n: int) -> None:
        array[n] = 1

    error = caught(client.dmap, write, [1])
    assert isinstance(error, ValueError)
    assert error.__notes__[0] == raised.READ_ONLY
    assert "a = a.copy()" in str(error.__cause__)
