"""What a captured array costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.harness import Call, Question, Values, Way, measured
from benchmarks.peers import N_WORKERS, PEERS, Dask, Ipyparallel, Joblib, Ray, Running, opened
from benchmarks.work import read, read_shared, reader, share

MB = 100
FEW = 4
"""Items for who copies the array for each: 200 would take a minute."""

Mapped = Callable[[Any, int], list[float]]  # the array and the number of items -> the results


def on_a_fresh_array(mapped: Mapped) -> Call:
    """Return what times a map, each time over another array: none is at the workers already."""
    import numpy as np

    chance = np.random.default_rng()

    def call(n: int) -> Values:
        array = chance.random(MB * 125_000)
        start = time.perf_counter()
        results = mapped(array, n)
        seconds = time.perf_counter() - start
        assert results == array[:n].tolist()
        return {"items/s": n / seconds}

    return call


def plain(make: Callable[[Any], Callable[[int], float]]) -> Callable[[Running], Call]:
    """Return what maps the function that ``make`` makes of the array."""
    return lambda running: on_a_fresh_array(lambda array, n: running.map(make(array), range(n)))


def captured(array: Any) -> Callable[[int], float]:
    """Return a function for who pickles no closures."""
    return partial(read, array)


# --- each peer's own way to give an array to all items ----------------------------------------


@contextmanager
def pool_initializer() -> Iterator[Call]:
    from multiprocessing import Pool

    def mapped(array: Any, n: int) -> list[float]:
        with Pool(N_WORKERS, share, (array,)) as pool:
            return list(pool.map(read_shared, range(n)))

    yield on_a_fresh_array(mapped)


@contextmanager
def executor_initializer() -> Iterator[Call]:
    from concurrent.futures import ProcessPoolExecutor

    yield on_a_fresh_array(with_initializer(ProcessPoolExecutor))


@contextmanager
def loky_initializer() -> Iterator[Call]:
    from loky import ProcessPoolExecutor

    yield on_a_fresh_array(with_initializer(ProcessPoolExecutor))


def with_initializer(executor_type: Any) -> Mapped:
    def mapped(array: Any, n: int) -> list[float]:
        with executor_type(N_WORKERS, initializer=share, initargs=(array,)) as executor:
            return list(executor.map(read_shared, range(n)))

    return mapped


def joblib_memmap(_: Joblib) -> Call:
    def mapped(array: Any, n: int) -> list[float]:
        from joblib import Parallel, delayed

        # An argument of a megabyte and more is written to shared memory, once.
        return list(Parallel(N_WORKERS)(delayed(read)(array, item) for item in range(n)))

    return on_a_fresh_array(mapped)


@contextmanager
def mpire_shared_objects() -> Iterator[Call]:
    from mpire import WorkerPool

    def mapped(array: Any, n: int) -> list[float]:
        with WorkerPool(N_WORKERS, shared_objects=array) as pool:
            return list(pool.map(read, range(n)))

    yield on_a_fresh_array(mapped)


def dask_scatter(running: Dask) -> Call:
    def mapped(array: Any, n: int) -> list[float]:
        client = running.client
        there = client.scatter(array, broadcast=True)
        futures = [client.submit(read, there, item, pure=False) for item in range(n)]
        return list(client.gather(futures))

    return on_a_fresh_array(mapped)


def ray_put(running: Ray) -> Call:
    def mapped(array: Any, n: int) -> list[float]:
        import ray

        there = ray.put(array)
        remote = running.remote(read)
        return list(ray.get([remote.remote(there, item) for item in range(n)]))

    return on_a_fresh_array(mapped)


def ipyparallel_push(running: Ipyparallel) -> Call:
    def mapped(array: Any, n: int) -> list[float]:
        import ipyparallel

        running.client[:].push({"array": array}, block=True)
        there = ipyparallel.Reference("array")
        apply = running.view.apply_async
        return [result.get() for result in [apply(read, there, item) for item in range(n)]]

    return on_a_fresh_array(mapped)


def ways() -> list[Way]:
    def plainly(name: str, make: Callable[[Any], Any], at_most: int = 0) -> Way:
        return Way(
            f"{PEERS[name].kind.MAP}, captured", name, opened(name, plain(make)), at_most=at_most
        )

    return [
        replace(plainly("dmap", reader), who="dmap"),
        plainly("pool", captured),
        Way("Pool.map, initializer", "pool", pool_initializer),
        plainly("executor", captured, FEW),
        Way("ProcessPoolExecutor.map, initializer", "executor", executor_initializer),
        plainly("joblib", reader, FEW),
        Way("joblib Parallel, memmap of the argument", "joblib", opened("joblib", joblib_memmap)),
        plainly("loky", reader, FEW),
        Way("loky.map, initializer", "loky", loky_initializer),
        plainly("mpire", captured, FEW),
        Way("mpire WorkerPool.map, shared_objects", "mpire", mpire_shared_objects),
        plainly("mpi", captured, FEW),
        plainly("dask", reader, FEW),
        Way("dask Client.scatter(broadcast=True)", "dask", opened("dask", dask_scatter)),
        plainly("ray", reader),
        Way("ray.put", "ray", opened("ray", ray_put)),
        plainly("ipyparallel", captured, FEW),
        Way("ipyparallel push", "ipyparallel", opened("ipyparallel", ipyparallel_push)),
        Way("limit: one copy into fresh memory, then the builtin map", "limit", one_copy),
    ]


@contextmanager
def one_copy() -> Iterator[Call]:
    def mapped(array: Any, n: int) -> list[float]:
        copy = array.copy()
        return list(map(reader(copy), range(n)))

    yield on_a_fresh_array(mapped)


QUESTION = Question(
    name="closure",
    title="a map of {n} items with a function over a captured array of 100 MB",
    about=(
        "Each round has another array, so none is at the workers already. First plainly: the "
        "function closes over the array, or is a `functools.partial` of it for who cannot pickle "
        "closures. Then each peer's own way to give an array to all items, from the array on; "
        "processes that it has to start for that included. Who copies the array for each item is "
        "given fewer items, since the rate is what counts. A pool that forks when the array is "
        "there already copies nothing at all, and may pass the limit."
    ),
    ways=ways(),
    n=200,
    quick_n=200,
    take=measured,
    n_rounds=3,
    warm_up=2,
)
