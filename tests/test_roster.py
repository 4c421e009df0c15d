"""Who is there, over which link, and until when."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_net import Client, Net, Peer, Supervisor, Worker

from jobserver import protocol as wire
from jobserver.jobs import Limits


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.quiet()


def test_a_link_that_was_replaced_speaks_for_nobody(net: Net) -> None:
    client = Client(net)
    old = client.id
    client.reconnect()
    assert client.take(wire.Welcome).resumed
    net.deliver(old, wire.GetStatus(1, 1))
    assert client.take(wire.Error).code == "hello_first"


def test_a_replaced_link_that_breaks_takes_nobody_with_it(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    old = client.id
    client.reconnect()
    client.take(wire.Welcome)
    net.spread(net.state.on_gone(old, net.now))
    net.tick(11)
    worker.say(wire.Heartbeat())
    handle = client.submitted()
    worker.grab()
    worker.complete(handle)
    client.result()


def test_a_supervisor_that_came_back_counts_its_silence_anew(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker = Worker(net, "f", child=1)
    handle = client.submitted()
    worker.grab()
    net.tick(19.5)
    supervisor.cut()
    net.tick(0.4)
    supervisor.reconnect()
    supervisor.take(wire.Welcome)
    net.tick(5)
    worker.complete(handle)
    client.result()


def test_a_lone_worker_lives_by_its_own_words(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()
    worker.grab()
    for _ in range(3):
        net.tick(15)
        worker.say(wire.Heartbeat())
    worker.complete(handle)
    client.result()


def test_a_child_does_not_speak_for_its_supervisor(net: Net) -> None:
    client = Client(net)
    Supervisor(net)
    worker, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    client.submitted()
    worker.grab()
    for _ in range(5):
        net.tick(5)
        worker.say(wire.Heartbeat())
        other.say(wire.Heartbeat())
    other.grab()
    while worker.inbox:
        assert worker.take(wire.Error).code == "hello_first"


def test_more_peers_than_there_is_room_for_are_refused() -> None:
    net = Net(limits=Limits(n_peers=2))
    clients = [Client(net, 1), Client(net, 2)]
    stranger = Peer(net, wire.Hello(1, 0, "client", b"s" * 16))
    assert stranger.take(wire.Error).code == "limit"
    clients[0].say(clients[0].hello)
    clients[0].take(wire.Welcome)
    net.quiet()


def test_a_client_that_comes_and_goes_leaves_nothing_behind(net: Net) -> None:
    client = Client(net)
    for _ in range(100):
        client.cut()
        net.tick(0.01)
        client.reconnect()
        assert client.take(wire.Welcome).resumed
    assert len(net.state.roster._expiring) < 5
