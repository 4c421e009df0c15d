"""Python's map, spread over every core of every machine you have, results back in order.

    from dmap import dmap

    dmap(lambda price: price * rate, prices)

Without a server named, the work is done by a private cluster on this machine, which starts at the
first call and goes with the process. ``set_job_servers("sammy", "kenny")``, or the environment's
``DMAP_SERVERS=sammy,kenny``, send the same calls to the cluster behind those job servers.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers see it, True; to import that of typing takes 10 ms

__version__ = "0.1.0"

__all__ = [
    "dmap",
    "imap",
    "starmap",
    "submit",
    "background",
    "attach",
    "wait",
    "as_completed",
    "Client",
    "Job",
    "job",
    "current_job",
    "per_worker",
    "set_job_servers",
    "shutdown",
    "DmapError",
    "NoServer",
    "NoWorker",
    "Busy",
    "AuthError",
    "InsecureBind",
    "ProtocolError",
    "WorkerLost",
    "RemoteError",
    "ClosureError",
    "JobTimeout",
    "JobCancelled",
    "DmapWarning",
]

if TYPE_CHECKING:
    from dmap.calls import (
        attach,
        background,
        dmap,
        imap,
        set_job_servers,
        shutdown,
        starmap,
        submit,
    )
    from dmap.client import Client
    from dmap.errors import (
        AuthError,
        Busy,
        ClosureError,
        DmapError,
        DmapWarning,
        InsecureBind,
        JobCancelled,
        JobTimeout,
        NoServer,
        NoWorker,
        ProtocolError,
        RemoteError,
        WorkerLost,
    )
    from dmap.factories import per_worker
    from dmap.jobs import Job, as_completed, wait
    from dmap.registry import current_job, job
else:
    # Nothing is loaded until it is used: `import dmap` takes a millisecond, and a worker that only
    # registers functions never loads the client.
    _FROM = {  # name -> module that has it
        **dict.fromkeys(
            (
                "attach",
                "background",
                "dmap",
                "imap",
                "set_job_servers",
                "shutdown",
                "starmap",
                "submit",
            ),
            "dmap.calls",
        ),
        "Client": "dmap.client",
        "per_worker": "dmap.factories",
        **dict.fromkeys(("Job", "as_completed", "wait"), "dmap.jobs"),
        **dict.fromkeys(("current_job", "job"), "dmap.registry"),
        **dict.fromkeys(
            (
                "AuthError",
                "Busy",
                "ClosureError",
                "DmapError",
                "DmapWarning",
                "InsecureBind",
                "JobCancelled",
                "JobTimeout",
                "NoServer",
                "NoWorker",
                "ProtocolError",
                "RemoteError",
                "WorkerLost",
            ),
            "dmap.errors",
        ),
    }

    def __getattr__(name: str) -> object:
        module = _FROM.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        value = globals()[name] = getattr(importlib.import_module(module), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
