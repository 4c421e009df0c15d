"""Ask job servers one question each, with a bound on the wait."""

from __future__ import annotations

import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import zmq

from dmap.link import Connected, Disconnected, Received, ServerLink
from jobserver.protocol import (
    MAJOR,
    MINOR,
    Body,
    Error,
    Goodbye,
    Hello,
    Message,
    Shown,
    StatusIs,
    Welcome,
)

LINGER: Final = 0.1
"""Seconds that a Goodbye has to go out."""


@dataclass
class Answer:
    """What one server said.

    Attributes:
        endpoint: which server was asked.
        complete: whether it said all that was to be heard of it.
        welcome: None if it was not reached.
        message: None if it did not answer the question, or was not the one to be asked.
        bodies: those of the message.
        refusal: why it did not answer, in its own words.
    """

    endpoint: str
    complete: bool = False
    welcome: Welcome | None = None
    message: Message | None = None
    bodies: tuple[Body, ...] = ()
    refusal: str = ""


Question: TypeAlias = Callable[[Welcome], Message | None]
"""What to ask a server that said this Welcome; None if it is not the one to be asked."""


def ask(endpoints: Sequence[str], question: Question, timeout: float) -> list[Answer]:
    """Ask all servers at the same time; return their answers in the order of the endpoints.

    Blocks until all have answered, at most ``timeout`` seconds.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    answers = {ServerLink(context, endpoint): Answer(endpoint) for endpoint in endpoints}
    open_links = list(answers)
    deadline = time.monotonic() + timeout
    try:
        while open_links and (left := deadline - time.monotonic()) > 0:
            poller = zmq.Poller()
            for link in open_links:
                link.register(poller)
            poller.poll(math.ceil(left * 1000))
            for link in open_links:
                _go_on(link, answers[link], question)
            open_links = [link for link in open_links if not answers[link].complete]
    finally:
        for link in answers:
            link.send(Goodbye())
            link.close(LINGER)
        context.term()
    return list(answers.values())


def _go_on(link: ServerLink, answer: Answer, question: Question) -> None:
    """Take in what a server said."""
    for event in link.receive():
        match event:
            case Connected():
                link.send(_hello())
            case Disconnected():
                answer.welcome = None  # it may come back within the time
            case Received(Welcome() as welcome, _):
                answer.welcome = welcome
                request = question(welcome)
                if request is None:
                    answer.complete = True
                else:
                    link.send(request)
            case Received((Shown() | StatusIs()) as message, bodies):
                answer.message, answer.bodies = message, bodies
                answer.complete = True
            case Received(Error() as error, _):
                answer.refusal = error.text
                answer.complete = True
            case _:
                pass  # heartbeats, and what is meant for clients with jobs


def _hello() -> Hello:
    return Hello(
        MAJOR,
        MINOR,
        "client",
        secrets.token_bytes(16),
        name="dmap",
        host=socket.gethostname(),
        pid=os.getpid(),
    )
