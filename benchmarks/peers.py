"""The peers: each started, and asked, in the way that its own documentation recommends.

All have as many processes as dmap's local cluster has workers. A peer's class is made in the runner
of its way, before there are threads, since some of them fork; its imports are inside, so that only
who is measured need be installed.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Call, Open, Way
from dmap.cores import n_cores

N_WORKERS = n_cores()
"""As many as dmap starts on this machine."""

Function = Callable[..., Any]
Items = Sequence[Any]


class Running:
    """A peer that is up.

    A peer says what it calls each of these; what it does not name, it has not.
    """

    EACH = ""
    ONCE = ""
    MAP = ""
    BEST = ""
    """A map with a chunk size; empty where there is nothing better than the default."""

    def each(self, function: Function, items: Items) -> list[Any]:
        """Submit each item as a job of its own, then gather all results in order."""
        raise NotImplementedError

    def once(self, function: Function, item: Any) -> Any:
        """Submit one job and wait for its result."""
        raise NotImplementedError

    def map(self, function: Function, items: Items) -> list[Any]:
        """Map with the peer's own default of a chunk size."""
        raise NotImplementedError

    def best(self, function: Function, items: Items, size: int) -> list[Any]:
        """Map with this chunk size."""
        raise NotImplementedError


class Dmap(Running):
    EACH, ONCE, MAP = "dmap.submit", "dmap.submit().result", "dmap"

    def each(self, function: Function, items: Items) -> list[Any]:
        from dmap import submit

        return [job.result() for job in [submit(function, item) for item in items]]

    def once(self, function: Function, item: Any) -> Any:
        from dmap import submit

        return submit(function, item).result()

    def map(self, function: Function, items: Items) -> list[Any]:
        from dmap import dmap

        return dmap(function, items)


@contextmanager
def dmap_up() -> Iterator[Dmap]:
    from dmap import shutdown, submit

    submit(abs, 1).result(60)  # starts the local cluster
    yield Dmap()
    shutdown()


class Pool(Running):
    EACH, ONCE, MAP, BEST = "Pool.apply_async", "Pool.apply", "Pool.map", "Pool.map"

    def __init__(self, pool: Any) -> None:
        self.pool = pool

    def each(self, function: Function, items: Items) -> list[Any]:
        apply = self.pool.apply_async
        return [result.get() for result in [apply(function, (item,)) for item in items]]

    def once(self, function: Function, item: Any) -> Any:
        return self.pool.apply(function, (item,))

    def map(self, function: Function, items: Items) -> list[Any]:
        return list(self.pool.map(function, items))

    def best(self, function: Function, items: Items, size: int) -> list[Any]:
        return list(self.pool.map(function, items, size))


@contextmanager
def pool_up() -> Iterator[Pool]:
    from multiprocessing import Pool as StandardPool

    with StandardPool(N_WORKERS) as pool:
        yield Pool(pool)


class Executor(Running):
    """What has the interface of ``concurrent.futures``: that itself, loky and mpi4py."""

    def __init__(self, executor: Any, name: str) -> None:
        self.executor = executor
        self.EACH, self.ONCE = f"{name}.submit", f"{name}.submit().result"
        self.MAP = self.BEST = f"{name}.map"

    def each(self, function: Function, items: Items) -> list[Any]:
        submit = self.executor.submit
        return [future.result() for future in [submit(function, item) for item in items]]

    def once(self, function: Function, item: Any) -> Any:
        return self.executor.submit(function, item).result()

    def map(self, function: Function, items: Items) -> list[Any]:
        return list(self.executor.map(function, items))

    def best(self, function: Function, items: Items, size: int) -> list[Any]:
        return list(self.executor.map(function, items, chunksize=size))


@contextmanager
def executor_up() -> Iterator[Executor]:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(N_WORKERS) as executor:
        yield Executor(executor, "ProcessPoolExecutor")


@contextmanager
def loky_up() -> Iterator[Executor]:
    from loky import get_reusable_executor

    # Its processes must outlast the turns of the others.
    executor = get_reusable_executor(max_workers=N_WORKERS, timeout=600)
    yield Executor(executor, "loky")
    executor.shutdown(kill_workers=True)


@contextmanager
def mpi_up() -> Iterator[Executor]:
    from mpi4py.futures import MPIPoolExecutor

    with MPIPoolExecutor(N_WORKERS) as executor:
        yield Executor(executor, "MPIPoolExecutor")


class Joblib(Running):
    MAP = BEST = "joblib Parallel"

    def map(self, function: Function, items: Items) -> list[Any]:
        from joblib import Parallel, delayed

        return list(Parallel(N_WORKERS)(delayed(function)(item) for item in items))

    def best(self, function: Function, items: Items, size: int) -> list[Any]:
        from joblib import Parallel, delayed

        parallel = Parallel(N_WORKERS, batch_size=size)
        return list(parallel(delayed(function)(item) for item in items))


@contextmanager
def joblib_up() -> Iterator[Joblib]:
    from joblib.externals.loky import get_reusable_executor

    # Parallel keeps its processes between calls by itself.
    yield Joblib()
    get_reusable_executor().shutdown(kill_workers=True)


class Mpire(Running):
    EACH, ONCE = "mpire apply_async", "mpire apply"
    MAP = BEST = "mpire WorkerPool.map"

    def __init__(self, pool: Any) -> None:
        self.pool = pool

    def each(self, function: Function, items: Items) -> list[Any]:
        apply = self.pool.apply_async
        return [result.get() for result in [apply(function, (item,)) for item in items]]

    def once(self, function: Function, item: Any) -> Any:
        return self.pool.apply(function, (item,))

    def map(self, function: Function, items: Items) -> list[Any]:
        return list(self.pool.map(function, items, concatenate_numpy_output=False))

    def best(self, function: Function, items: Items, size: int) -> list[Any]:
        return list(self.pool.map(function, items, chunk_size=size, concatenate_numpy_output=False))


@contextmanager
def mpire_up() -> Iterator[Mpire]:
    from mpire import WorkerPool

    with WorkerPool(n_jobs=N_WORKERS, keep_alive=True) as pool:
        yield Mpire(pool)


class Dask(Running):
    EACH, ONCE = "dask Client.submit", "dask Client.submit().result"
    MAP, BEST = "dask Client.map", "dask.bag, by partitions"

    def __init__(self, client: Any) -> None:
        self.client = client

    # With pure=True an equal call would be looked up and not run.

    def each(self, function: Function, items: Items) -> list[Any]:
        submit = self.client.submit
        return list(self.client.gather([submit(function, item, pure=False) for item in items]))

    def once(self, function: Function, item: Any) -> Any:
        return self.client.submit(function, item, pure=False).result()

    def map(self, function: Function, items: Items) -> list[Any]:
        return list(self.client.gather(self.client.map(function, items, pure=False)))

    def best(self, function: Function, items: Items, size: int) -> list[Any]:
        import dask.bag

        return list(dask.bag.from_sequence(items, partition_size=size).map(function).compute())


@contextmanager
def dask_up() -> Iterator[Dask]:
    from dask.distributed import Client

    with Client(
        processes=True, n_workers=N_WORKERS, threads_per_worker=1, dashboard_address=None
    ) as client:
        yield Dask(client)


class Ray(Running):
    EACH, ONCE = "ray remote", "ray.get of one"
    MAP, BEST = "ray remote, an item a task", "ray remote, batches"

    def __init__(self) -> None:
        self._remotes: dict[Function, Any] = {}

    def remote(self, function: Function) -> Any:
        """Return the function as ray decorates it, once."""
        import ray

        if function not in self._remotes:
            self._remotes[function] = ray.remote(function)
        return self._remotes[function]

    def each(self, function: Function, items: Items) -> list[Any]:
        import ray

        remote = self.remote(function)
        return list(ray.get([remote.remote(item) for item in items]))

    map = each

    def once(self, function: Function, item: Any) -> Any:
        import ray

        return ray.get(self.remote(function).remote(item))

    def best(self, function: Function, items: Items, size: int) -> list[Any]:
        import ray

        @ray.remote
        def batch(items: Items) -> list[Any]:
            return [function(item) for item in items]

        parts = [batch.remote(items[at : at + size]) for at in range(0, len(items), size)]
        return [result for part in ray.get(parts) for result in part]


@contextmanager
def ray_up() -> Iterator[Ray]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # or it warns
    import ray

    ray.init(
        num_cpus=N_WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield Ray()
    ray.shutdown()


class Ipyparallel(Running):
    EACH, ONCE = "ipyparallel apply_async", "ipyparallel apply_sync"
    MAP = BEST = "ipyparallel map_sync"

    def __init__(self, client: Any) -> None:
        self.client = client
        self.view = client.load_balanced_view()

    def each(self, function: Function, items: Items) -> list[Any]:
        apply = self.view.apply_async
        results = [result.get() for result in [apply(function, item) for item in items]]
        self.client.purge_local_results("all")  # or it keeps them all
        return results

    def once(self, function: Function, item: Any) -> Any:
        return self.view.apply_sync(function, item)

    def map(self, function: Function, items: Items) -> list[Any]:
        return list(self.view.map_sync(function, items))

    def best(self, function: Function, items: Items, size: int) -> list[Any]:
        return list(self.view.map_sync(function, items, chunksize=size))


@contextmanager
def ipyparallel_up() -> Iterator[Ipyparallel]:
    import ipyparallel

    with ipyparallel.Cluster(n=N_WORKERS) as client:
        yield Ipyparallel(client)


@dataclass(frozen=True)
class Peer:
    """What is known of a peer before it is started.

    Attributes:
        title: How people call it.
        distribution: What is installed; empty for the standard library.
        up: Starts it and ends it.
        kind: Its class, or one that is up, for the names of its calls.
        is_restless: Whether its processes use some hundredths of a core while nothing is asked of
            them, and are stopped meanwhile.
        is_slow: Whether it takes seconds to start, and is left out with ``--quick``.
    """

    title: str
    distribution: str
    up: Callable[[], AbstractContextManager[Running]]
    kind: type[Running] | Running
    is_restless: bool = False
    is_slow: bool = False

    def version(self) -> str | None:
        """Return its version, None if it is not installed."""
        if not self.distribution:
            return ""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def missing(self) -> str:
        """Return why it cannot be measured, if it cannot."""
        return "" if self.version() is not None else "not installed"


PEERS = {
    "dmap": Peer("dmap", "dmap", dmap_up, Dmap),
    "pool": Peer("multiprocessing.Pool", "", pool_up, Pool),
    "executor": Peer("ProcessPoolExecutor", "", executor_up, Executor(None, "ProcessPoolExecutor")),
    "joblib": Peer("joblib", "joblib", joblib_up, Joblib),
    "loky": Peer("loky", "loky", loky_up, Executor(None, "loky")),
    "mpire": Peer("mpire", "mpire", mpire_up, Mpire),
    "mpi": Peer("mpi4py.futures", "mpi4py", mpi_up, Executor(None, "MPIPoolExecutor"), True, True),
    "dask": Peer("dask.distributed", "distributed", dask_up, Dask, True, True),
    "ray": Peer("ray", "ray", ray_up, Ray, True, True),
    "ipyparallel": Peer("ipyparallel", "ipyparallel", ipyparallel_up, Ipyparallel, is_slow=True),
}


def ways(call: str, work: Callable[[Any], Call]) -> list[Way]:
    """Return a way of each peer that has a call.

    Args:
        call: ``EACH``, ``ONCE`` or ``MAP``.
        work: Gets the peer that is up, and returns the call that does the work on n items.
    """
    return [
        Way(who, name, opened(name, work))
        for name, peer in PEERS.items()
        if (who := getattr(peer.kind, call))
    ]


def map_ways(function: Function) -> list[Way]:
    """Return a way of each peer to map a function over n numbers, by default and at its best."""

    def work(running: Running) -> Call:
        def call(n: int, size: int | None = None) -> list[Any]:
            if size is None:
                return running.map(function, range(n))
            return running.best(function, range(n), size)

        return call

    return [
        Way(
            peer.kind.MAP,
            name,
            opened(name, work),
            N_WORKERS if peer.kind.BEST else 0,
            peer.kind.BEST,
        )
        for name, peer in PEERS.items()
    ]


def opened(name: str, work: Callable[[Any], Call]) -> Open:
    """Return what starts a peer, hands it to ``work``, and yields the call that this returns."""

    @contextmanager
    def open_it() -> Iterator[Call]:
        with PEERS[name].up() as running:
            yield work(running)

    return open_it
