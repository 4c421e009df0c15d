"""The limit of what goes through a server: a ROUTER that passes messages on and knows nothing.

::

    client (DEALER) --ipc--> ROUTER --ipc--> worker (DEALER)
                    <------         <------

The router, and each worker, is a process of its own, as with dmap. No job is kept, none is looked
up, nothing is pickled: what remains is libzmq, the kernel and Python's loop around them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Process
from typing import Any

from benchmarks.harness import Call
from benchmarks.peers import N_WORKERS

PAYLOAD = b"x" * 56
"""With the item's number in eight bytes: 64."""
CLIENT = b"client"


def route(endpoint: str) -> None:
    """Pass on: what the client sends to each worker in turn, what workers send to the client."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.SNDHWM, 0)
        router.setsockopt(zmq.RCVHWM, 0)
        router.bind(endpoint)
        workers = [b"worker%d" % number for number in range(N_WORKERS)]
        turn = 0
        while True:
            router.poll()
            # As many as are there, as dmap's server does.
            while True:
                try:
                    sender, message = router.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                if sender == CLIENT:
                    turn = (turn + 1) % len(workers)
                    router.send_multipart((workers[turn], message))
                else:
                    router.send_multipart((CLIENT, message))


def work(endpoint: str, number: int) -> None:
    """Send back whatever comes."""
    with dealer(endpoint, b"worker%d" % number) as socket:
        while True:
            socket.send(socket.recv())


def dealer(endpoint: str, identity: bytes) -> Any:
    """Return a socket that is connected."""
    import zmq

    socket: Any = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(endpoint)
    return socket


@contextmanager
def echo(how: str) -> Iterator[Call]:
    """Start the router and its workers; yield what sends n items and gathers them, or one item.

    Args:
        how: ``each`` or ``once``.
    """
    folder = tempfile.mkdtemp()
    endpoint = f"ipc://{folder}/router"
    processes = [Process(target=route, args=(endpoint,), daemon=True)]
    processes += [
        Process(target=work, args=(endpoint, number), daemon=True) for number in range(N_WORKERS)
    ]
    for process in processes:
        process.start()
    try:
        with dealer(endpoint, CLIENT) as socket:
            # What the router cannot yet send on, it drops.
            came = 0
            while came < N_WORKERS:
                came = 0
                for _ in range(N_WORKERS):
                    socket.send(b"")
                while socket.poll(100):
                    socket.recv()
                    came += 1

            def once(item: int) -> int:
                socket.send(item.to_bytes(8, "big") + PAYLOAD)
                return int.from_bytes(socket.recv()[:8], "big")

            def each(n: int) -> list[int]:
                for item in range(n):
                    socket.send(item.to_bytes(8, "big") + PAYLOAD)
                return sorted(int.from_bytes(socket.recv()[:8], "big") for _ in range(n))

            yield once if how == "once" else each
    finally:
        for process in processes:
            process.terminate()
            process.join()
        shutil.rmtree(folder, ignore_errors=True)
