"""Values that a process makes once: who shares them, and how they end."""

from __future__ import annotations

import functools
import gc
import logging
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from cluster import Cluster, wait_for

from dmap import Client, factories, identity, per_worker, pickling
from dmap.factories import PerWorker, close_all


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    close_all()


class Diary(list[str]):
    """What happened in this process, in order; whatever is in it, it is the same diary."""

    def __dmap_identity__(self) -> bytes:
        return b"diary"


happened = Diary()


class Value:
    """Says when it is closed."""

    def __init__(self, name: str) -> None:
        self.name = name
        happened.append(f"{name} made")

    def close(self) -> None:
        happened.append(f"{self.name} closed")


@pytest.fixture
def said() -> list[str]:
    happened.clear()
    return happened


def of(name: str) -> PerWorker[Value]:
    """Decorate anew; factories of the same name are equal."""

    @per_worker
    def value() -> Value:
        return Value(name)

    return value


@per_worker
def importable() -> Value:
    """Make a value."""
    return Value("importable")


def copied(value: PerWorker[Any]) -> PerWorker[Any]:
    """Return a factory as it arrives in another process."""
    copy: PerWorker[Any] = pickling.loads(pickling.dumps(value))
    return copy


# --- one value ---------------------------------------------------------------------------------


def test_all_calls_get_one_value(said: list[str]) -> None:
    value = of("a")
    assert value() is value()
    assert said == ["a made"]


def test_equal_factories_share_a_value() -> None:
    assert of("a")() is of("a")()


def test_factories_that_capture_other_values_do_not() -> None:
    one, other = of("a"), of("b")
    assert [one().name, other().name] == ["a", "b"]


def test_a_factory_that_travelled_finds_the_value_that_is_there(said: list[str]) -> None:
    value = of("a")
    copy = copied(value)
    assert copy is not value
    assert copy() is value()
    assert said == ["a made"]


def test_a_factory_in_two_closures_is_one() -> None:
    value = of("a")
    closures = [lambda: value(), lambda: (value(), 1)[0]]
    first, second = [pickling.loads(pickling.dumps(closure)) for closure in closures]
    assert first() is second()


class Unidentifiable:
    """May be anything."""

    def __dmap_identity__(self) -> NoReturn:
        raise identity.Unidentifiable("it may be anything")


def of_anything() -> PerWorker[object]:
    anything = Unidentifiable()

    @per_worker
    def value() -> object:
        return anything, object()

    return value


def test_a_factory_that_cannot_be_told_shares_with_its_own_copies_only() -> None:
    value, other = of_anything(), of_anything()
    assert value() is copied(value)()
    assert value() is copied(copied(value))()
    assert value() is not other()


def test_a_factory_can_be_told_also_if_it_names_itself() -> None:
    def make() -> PerWorker[str]:
        @per_worker
        def value() -> str:
            return repr(value)

        return value

    assert make()() is make()()


def test_what_a_factory_captures_at_its_pickling_counts() -> None:
    name = "a"

    @per_worker
    def value() -> str:
        return name

    assert value.__dmap_identity__() == value.__dmap_identity__()
    before = copied(value)
    name = "b"
    after = copied(value)
    assert [before(), after()] == ["a", "b"]


# --- how it travels ----------------------------------------------------------------------------


def test_a_factory_that_can_be_imported_goes_by_its_name() -> None:
    assert copied(importable) is importable


def test_a_factory_whose_name_is_another_things_goes_by_value() -> None:
    hidden = PerWorker[Value](importable.__wrapped__)  # type: ignore[attr-defined]
    assert hidden.__qualname__ == "importable"  # type: ignore[attr-defined]
    assert copied(hidden) not in (hidden, importable)


def test_the_value_stays_where_it_is() -> None:
    lock = per_worker(lambda: threading.Lock())
    assert lock() is copied(lock)()  # a lock cannot be pickled


def test_it_looks_like_the_function_that_it_decorates() -> None:
    assert importable.__name__ == "importable"  # type: ignore[attr-defined]
    assert importable.__doc__ == "Make a value."
    assert importable.__module__ == __name__
    assert repr(importable) == "<per_worker importable>"


# --- how it ends -------------------------------------------------------------------------------


def test_a_value_is_closed_when_no_closure_has_its_factory(said: list[str]) -> None:
    value: PerWorker[Value] | None = of("a")
    assert value is not None
    value()
    copy: PerWorker[Value] | None = copied(value)
    del value
    gc.collect()
    assert said == ["a made"]  # the copy, which never asked for it, keeps it
    del copy
    gc.collect()
    assert said == ["a made", "a closed"]
    assert not factories._open


def test_what_is_made_last_is_closed_first(said: list[str]) -> None:
    values = [of(name) for name in "abc"]
    for value in values:
        value()
    close_all()
    assert said[3:] == ["c closed", "b closed", "a closed"]


def test_what_a_value_was_made_of_is_closed_behind_it(said: list[str]) -> None:
    def connected() -> PerWorker[Value]:
        pool = of("pool")

        @per_worker
        def connection() -> Value:
            pool()
            return Value("connection")

        return connection

    connection: PerWorker[Value] | None = connected()
    assert connection is not None
    connection()
    assert said == ["pool made", "connection made"]
    del connection
    gc.collect()
    assert said[2:] == ["connection closed", "pool closed"]


def test_a_closed_value_is_made_anew_when_it_is_asked_for(said: list[str]) -> None:
    value = of("a")
    value()
    close_all()
    value()
    close_all()
    assert said == ["a made", "a closed"] * 2


@pytest.mark.parametrize("thing", [None, 5, [], type("Odd", (), {"close": "never"})()])
def test_a_value_without_a_close_is_let_go(thing: object, caplog: pytest.LogCaptureFixture) -> None:
    value = per_worker(lambda: thing)
    assert value() is thing
    close_all()
    assert not caplog.records


def test_an_error_at_the_end_is_logged_and_stops_no_other(
    said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Value):
        def close(self) -> None:
            raise ConnectionError("the peer was gone before")

    @per_worker
    def broken() -> Broken:
        return Broken("broken")

    first, last = of("first"), of("last")
    for value in (first, broken, last):
        value()
    with caplog.at_level(logging.ERROR):
        close_all()
    assert said[3:] == ["last closed", "first closed"]
    (record,) = caplog.records
    assert "broken" in record.getMessage()
    assert "the peer was gone before" in str(record.exc_info)


def test_a_generator_goes_on_at_the_end(said: list[str]) -> None:
    @per_worker
    def value() -> Generator[int, None, None]:
        happened.append("begin")
        yield 5
        happened.append("end")

    assert value() == value() == 5
    assert said == ["begin"]
    close_all()
    assert said == ["begin", "end"]


def test_what_a_generator_yields_is_not_closed_for_it(said: list[str]) -> None:
    @per_worker
    def value() -> Generator[Value, None, None]:
        yield Value("a")

    value()
    close_all()
    assert said == ["a made"]


def test_a_generator_that_yields_once_more_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    @per_worker
    def value() -> Generator[int, None, None]:
        yield 1
        yield 2

    value()
    close_all()
    assert "second value" in str(caplog.records[0].exc_info)


# --- making it ---------------------------------------------------------------------------------


def test_a_factory_that_raises_is_tried_again() -> None:
    tries: list[int] = []

    @per_worker
    def value() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("not yet")
        return 5

    for _ in range(2):
        with pytest.raises(ConnectionError, match="not yet"):
            value()
    assert value() == value() == 5
    assert len(tries) == 3


def test_a_generator_that_yields_nothing_is_an_error_with_its_name() -> None:
    @per_worker
    def value() -> Generator[int, None, None]:
        return
        yield

    with pytest.raises(RuntimeError, match="value yields nothing"):
        value()


def test_a_factory_that_calls_itself_is_an_error_with_its_name() -> None:
    @per_worker
    def value() -> Any:
        return value()

    with pytest.raises(RuntimeError, match="value is called while it makes its value"):
        value()


def test_two_threads_that_call_at_once_make_one_value() -> None:
    inside, go = threading.Event(), threading.Event()
    n_made: Counter[str] = Counter()

    @per_worker
    def value() -> object:
        n_made["value"] += 1
        inside.set()
        assert go.wait(20)
        return object()

    values: list[object] = []
    first, second = [threading.Thread(target=lambda: values.append(value())) for _ in range(2)]

    def is_waiting() -> bool:
        assert second.ident is not None
        frame = sys._current_frames().get(second.ident)
        return n_made["value"] > 1 or (frame is not None and frame.f_code.co_name == "get")

    first.start()
    assert inside.wait(20)
    second.start()
    wait_for(is_waiting)
    go.set()
    first.join(20)
    second.join(20)
    assert n_made["value"] == 1
    assert values[0] is values[1]


def needs_one(path: str) -> None: ...
def needs_a_keyword(*, path: str) -> None: ...
def needs_the_second(path: str, mode: str, encoding: str = "utf-8") -> None: ...
async def is_async() -> None: ...
async def is_an_async_generator() -> Any:
    yield


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        (needs_one, r"needs_one needs arguments \(path\)"),
        (needs_a_keyword, r"needs_a_keyword needs arguments \(path\)"),
        (needs_the_second, r"needs arguments \(path, mode\)"),
        (functools.partial(needs_the_second, "a"), r"needs arguments \(mode\)"),
        (Value, r"Value needs arguments \(name\)"),
        (is_async, "is async"),
        (is_an_async_generator, "is async"),
        (functools.partial(is_async), "is async"),
        (5, "not int"),
    ],
)
def test_what_makes_no_value_is_refused(factory: Callable[[], Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        per_worker(factory)


class Maker:
    def make(self, kind: str = "made", *more: str, **options: str) -> str:
        return kind


@pytest.mark.parametrize(
    "factory",
    [
        Maker().make,
        functools.partial(Maker.make, Maker()),
        functools.partial(needs_one, "a"),
        dict,
        lambda path="a", *, mode="r": path,
    ],
)
def test_whatever_can_be_called_without_arguments_makes_a_value(factory: Any) -> None:
    value = per_worker(factory)
    assert value() is copied(value)()
    assert value() == factory()


# --- processes ---------------------------------------------------------------------------------

SCRIPT = """
import os, sys
from dmap import per_worker

parent = os.getpid()

def say(*words):
    print(*words, "by", "parent" if os.getpid() == parent else "child", flush=True)

class Value:
    def __init__(self):
        self.pid = os.getpid()
    def close(self):
        say("value of", "parent" if self.pid == parent else "child", "closed")

@per_worker
def value():
    return Value()

@per_worker
def generated():
    pid = os.getpid()
    try:
        yield pid
    finally:
        say("generator of", "parent" if pid == parent else "child", "ended")
"""


def run(code: str) -> list[str]:
    said = subprocess.run(
        [sys.executable, "-c", SCRIPT + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (said.returncode, said.stderr) == (0, "")
    return said.stdout.splitlines()


def test_a_process_closes_its_values_when_it_ends() -> None:
    assert run("value(); generated()") == [
        "generator of parent ended by parent",
        "value of parent closed by parent",
    ]


FORK = """
value(); generated()
pid = os.fork()
if pid:
    assert os.waitpid(pid, 0)[1] == 0
    assert value().pid == generated() == parent
"""


def test_a_forked_process_makes_and_closes_values_of_its_own() -> None:
    assert run(FORK + "else: assert value().pid == generated() == os.getpid()")[:2] == [
        "generator of child ended by child",
        "value of child closed by child",
    ]


@pytest.mark.parametrize("child", ["pass", "value(); generated()", "del value, generated"])
def test_a_forked_process_leaves_the_values_of_the_other_alone(child: str) -> None:
    said = run(FORK + f"else: {child}")
    assert [line for line in said if "of parent" in line] == [
        "generator of parent ended by parent",
        "value of parent closed by parent",
    ]


JOB = """
import os, sys
from dmap import Client, per_worker
endpoint, path, factor = sys.argv[1:]

class Value:
    def say(self, word):
        with open(path, "a") as file:
            file.write(f"{word} {os.getpid()}\\n")
    def __init__(self):
        self.say("made")
    def close(self):
        self.say("closed")

@per_worker
def value():
    return Value()

factor = int(factor)

def work(n):
    import time
    value()
    time.sleep(0.01)
    return os.getpid()

with Client([endpoint]) as client:
    pids = set(client.dmap(work, range(20), chunksize=1))
    pids |= set(client.dmap(lambda n: (value(), work(n * factor))[1], range(20), chunksize=1))
print(*pids)
"""


@pytest.mark.slow
def test_a_worker_process_makes_one_value_for_all_clients_and_closes_it_when_it_leaves(
    tmp_path: Path,
) -> None:
    path = tmp_path / "said"
    workers: set[str] = set()
    with Cluster() as cluster:
        worker = cluster.start_worker(2)
        while len(workers) < 2:
            for factor in range(2):
                workers.update(
                    subprocess.run(
                        [sys.executable, "-c", JOB, *cluster.endpoints, str(path), str(factor)],
                        stdout=subprocess.PIPE,
                        text=True,
                        timeout=60,
                        check=True,
                    ).stdout.split()
                )
        made = path.read_text().splitlines()
        worker.end()
    closed = path.read_text().splitlines()[len(made) :]
    assert sorted(made) == sorted(f"made {pid}" for pid in workers)
    assert sorted(closed) == sorted(f"closed {pid}" for pid in workers)


@pytest.mark.slow
def test_a_process_that_leaves_for_an_interrupted_job_closes_its_values_too(
    tmp_path: Path,
) -> None:
    path = tmp_path / "said"

    @per_worker
    def value() -> Generator[int, None, None]:
        path.touch()
        yield 5
        path.write_text("closed")

    def work() -> None:
        import time

        import dmap.connection  # noqa: F401  # interrupted, it may be in any state

        value()
        time.sleep(60)

    with Cluster() as cluster:
        cluster.start_worker(1)
        with Client(cluster.endpoints) as client:
            job = client.submit(work)
            wait_for(path.exists)
            job.cancel()
        wait_for(lambda: path.read_text() == "closed")


@pytest.mark.slow
def test_a_factory_of_a_module_makes_one_value_for_all_functions_that_name_it() -> None:
    with Cluster() as cluster:
        cluster.start_worker(1)
        with Client(cluster.endpoints) as client:
            names = client.dmap(lambda n: (importable().name, id(importable())), range(3))
            others = client.dmap(lambda n: ("importable", id(importable())), range(3))
    assert len({*names, *others}) == 1
    assert names[0][0] == "importable"
