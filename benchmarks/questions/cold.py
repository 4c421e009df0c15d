"""How long it takes from nothing to ten results."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from benchmarks.harness import Call, Question, Way, duration
from benchmarks.peers import N_WORKERS

SCRIPTS = {
    "dmap": ("dmap", "from dmap import dmap; print(dmap(abs, range({n})))"),
    "pool": (
        "Pool.map",
        "from multiprocessing import Pool\n"
        "with Pool({workers}) as pool: print(pool.map(abs, range({n})))",
    ),
    "executor": (
        "ProcessPoolExecutor.map",
        "from concurrent.futures import ProcessPoolExecutor\n"
        "with ProcessPoolExecutor({workers}) as executor:\n"
        "    print(list(executor.map(abs, range({n}))))",
    ),
    "joblib": (
        "joblib Parallel",
        "from joblib import Parallel, delayed\n"
        "print(list(Parallel({workers})(delayed(abs)(i) for i in range({n}))))",
    ),
    "loky": (
        "loky.map",
        "from loky import get_reusable_executor\n"
        "print(list(get_reusable_executor(max_workers={workers}).map(abs, range({n}))))",
    ),
    "mpire": (
        "mpire WorkerPool.map",
        "from mpire import WorkerPool\n"
        "with WorkerPool({workers}) as pool: print(pool.map(abs, range({n})))",
    ),
    "mpi": (
        "MPIPoolExecutor.map",
        "from mpi4py.futures import MPIPoolExecutor\n"
        "with MPIPoolExecutor({workers}) as executor:\n"
        "    print(list(executor.map(abs, range({n}))))",
    ),
    "dask": (
        "dask Client.map",
        "from dask.distributed import Client\n"
        "with Client(\n"
        "    n_workers={workers}, threads_per_worker=1, dashboard_address=None\n"
        ") as client:\n"
        "    print(client.gather(client.map(abs, range({n}))))",
    ),
    "ray": (
        "ray remote",
        "import ray\n"
        "ray.init(num_cpus={workers}, include_dashboard=False, log_to_driver=False)\n"
        "@ray.remote\n"
        "def same(item): return abs(item)\n"
        "print(ray.get([same.remote(item) for item in range({n})]))",
    ),
    "ipyparallel": (
        "ipyparallel map_sync",
        "import ipyparallel\n"
        "with ipyparallel.Cluster(n={workers}, log_level=40) as client:\n"
        "    print(list(client.load_balanced_view().map_sync(abs, range({n}))))",
    ),
    "limit": ("limit: Python itself", "print(list(map(abs, range({n}))))"),
}  # peer -> how it is called, and a script as its documentation begins


def in_a_new_process(code: str) -> Callable[[], AbstractContextManager[Call]]:
    """Return what opens a way to run the code in a Python of its own."""

    @contextmanager
    def opened() -> Iterator[Call]:
        def call(n: int) -> str:
            argv = [sys.executable, "-c", code.format(n=n, workers=N_WORKERS)]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            return done.stdout.strip()

        yield call

    return opened


QUESTION = Question(
    name="cold",
    title="cold start: a new Python, ten items, exit",
    about="The limit is a Python that does the ten items itself.",
    ways=[Way(who, peer, in_a_new_process(code)) for peer, (who, code) in SCRIPTS.items()],
    n=10,
    quick_n=10,
    take=duration("s", lambda n: str(list(range(n)))),
    is_more_better=False,
    n_rounds=3,
    warm_up=0,
)
