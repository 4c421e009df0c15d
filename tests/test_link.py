"""The link to a server: what it tells of its connection, and in which order."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from fake_server import WITHIN, FakeServer

from dmap.link import MAX_OUTBOX, Connected, Disconnected, Event, Received, ServerLink
from jobserver.pieces import Link, Returned
from jobserver.protocol import (
    Blob,
    Goodbye,
    Heartbeat,
    Hello,
    NoJob,
    PutBlob,
    Welcome,
    decode_to_server,
)

HELLO = Hello(1, 0, "client", b"s" * 16)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with (
        tempfile.TemporaryDirectory(prefix="dmap-") as folder,
        FakeServer(Path(folder)) as fake,
    ):
        yield fake


@pytest.fixture
def link(server: FakeServer) -> Iterator[ServerLink]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = ServerLink(context, server.address)
    yield link
    link.close()
    context.term()


def events_until(link: ServerLink, server: FakeServer, last: Event | type) -> list[Event]:
    """Drive both ends until the link tells of `last`, and return all that it told."""
    events: list[Event] = []
    deadline = time.monotonic() + WITHIN
    while not any(event == last or type(event) is last for event in events):
        assert time.monotonic() < deadline, events
        poller = zmq.Poller()
        link.register(poller)
        poller.poll(10)
        events += link.receive()
        server.pump(0)
    return events


def connect(link: ServerLink, server: FakeServer) -> bytes:
    """Bring the link up and say Hello; return what the server calls it."""
    events_until(link, server, Connected)
    assert link.send(HELLO)
    events_until(link, server, Received)
    return server.wait(Hello).peer


def test_a_link_tells_that_it_is_connected_before_anything_else(
    link: ServerLink, server: FakeServer
) -> None:
    assert events_until(link, server, Connected) == [Connected()]


def test_nothing_is_taken_before_the_link_is_connected(link: ServerLink) -> None:
    assert link.monitor.poll(int(WITHIN * 1000))
    assert not link.send(HELLO)


def test_what_is_sent_arrives_and_is_answered(link: ServerLink, server: FakeServer) -> None:
    events_until(link, server, Connected)
    link.send(HELLO)
    (event,) = events_until(link, server, Received)
    assert isinstance(event, Received)
    assert isinstance(event.message, Welcome)


def test_a_body_of_twenty_megabytes_goes_and_comes_in_pieces(
    link: ServerLink, server: FakeServer
) -> None:
    peer = connect(link, server)
    body = bytes(range(256)) * 80_000
    link.send(PutBlob(b"b" * 32), (body,))
    while not (put := server.find(PutBlob)):
        link.receive()
    assert b"".join(put.bodies[0]) == body
    server.say(peer, Blob(b"b" * 32, True), body)
    (event,) = events_until(link, server, Received)
    assert isinstance(event, Received)
    assert b"".join(event.bodies[0]) == body
    assert link.idle


def test_what_the_server_declines_is_told(link: ServerLink, server: FakeServer) -> None:
    peer = connect(link, server)
    server._links[peer] = Link(2**21, decode=decode_to_server)
    link.send(PutBlob(b"b" * 32), (bytes(2**22),))
    (event,) = events_until(link, server, Returned)
    assert isinstance(event, Returned)
    assert event.message == PutBlob(b"b" * 32)
    assert event.text == "a body of 4194304 bytes; at most 2097152 are taken"
    assert link.idle


def test_a_lost_connection_is_told_and_comes_back_by_itself(
    link: ServerLink, server: FakeServer
) -> None:
    connect(link, server)
    server.restart()
    events = events_until(link, server, Connected)
    assert events == [Disconnected(), Connected()]


def test_what_the_server_said_on_a_lost_connection_is_not_told_after_its_end(
    link: ServerLink, server: FakeServer
) -> None:
    peer = connect(link, server)
    for _ in range(3):
        server.say(peer, NoJob())
    assert link.socket.poll(int(WITHIN * 1000))
    server.stop()
    assert link.monitor.poll(int(WITHIN * 1000))
    server.start()
    events = events_until(link, server, Connected)
    assert events[-2:] == [Disconnected(), Connected()]


def test_a_send_notices_by_itself_that_the_connection_is_new(
    link: ServerLink, server: FakeServer
) -> None:
    connect(link, server)
    server.stop()
    assert link.monitor.poll(int(WITHIN * 1000))
    assert not link.send(Goodbye())
    assert link.has_events


def test_what_waited_for_a_lost_connection_is_not_sent_on_the_next(
    link: ServerLink, server: FakeServer
) -> None:
    connect(link, server)
    # An offer is sent; what it offers is not, as the server does not read.
    link.send(PutBlob(b"b" * 32), (bytes(2**21),))
    server.restart()
    events_until(link, server, Connected)
    assert link.idle


def test_a_hello_on_the_same_connection_forgets_what_was_under_way(
    link: ServerLink, server: FakeServer
) -> None:
    connect(link, server)
    link.send(PutBlob(b"b" * 32), (bytes(2**21),))
    assert not link.idle
    link.send(HELLO)
    assert link.idle


def test_a_full_outbox_takes_no_more_and_the_link_stays(
    link: ServerLink, server: FakeServer
) -> None:
    connect(link, server)
    while link.send(Blob(b"b" * 32, True), (bytes(2**20),)):
        pass
    assert link.connected


def test_an_outbox_that_only_waits_for_company_is_not_full(
    link: ServerLink, server: FakeServer
) -> None:
    connect(link, server)
    n = MAX_OUTBOX + 1
    for _ in range(n):
        assert link.send(Heartbeat(), more=True)
    link.send(Goodbye())
    server.wait(Goodbye)
    assert sum(map(len, server.together)) >= n


def test_the_outbox_empties_when_the_server_reads(link: ServerLink, server: FakeServer) -> None:
    connect(link, server)
    n = 0
    while link.send(PutBlob(n.to_bytes(32, "little")), (bytes(2**20),)):
        n += 1
    for number in range(n):
        while not (put := server.find(PutBlob)):
            link.receive()
        assert put.message.blob == number.to_bytes(32, "little")
    assert link.send(Heartbeat())
