"""A whole cluster in one process: three servers, clients, hosts, and a network that breaks.

Each run is fixed by its seed. ``Cluster.finish`` asserts what must hold in the end, whatever
happened before: every item ended exactly once and rightly, and nothing is left in any table.
"""

from __future__ import annotations

import pytest
from simulated_network import Simulation, chosen
from simulated_roles import Call, Child, Client, Host

from dmap.tickets import Terms
from jobserver.jobs import Limits

pytestmark = pytest.mark.slow


class Cluster:
    """Three servers, hosts with children, and clients."""

    def __init__(
        self,
        seed: int,
        *,
        hosts: int,
        children: int,
        clients: int,
        check_every: int = 20,
        limits: Limits | None = None,
    ) -> None:
        self.sim = Simulation(seed, check_every=check_every, limits=limits)
        self.n_children = children
        self.n_hosts = 0
        self.n_clients = 0
        self.hosts: list[Host] = []
        for _ in range(hosts):
            self.add_host()
        self.clients = [self.add_client() for _ in range(clients)]
        self.sim.run(1.0)

    @property
    def calls(self) -> list[Call]:
        return [call for client in self.clients for call in client.calls]

    def children(self) -> list[Child]:
        return [child for host in self.hosts if host.alive for child in host.children.values()]

    def add_host(self) -> None:
        self.n_hosts += 1
        self.hosts.append(Host(self.sim, self.n_hosts, self.n_children))

    def add_client(self) -> Client:
        self.n_clients += 1
        return Client(self.sim, self.n_clients)

    # --- work ---------------------------------------------------------------------------------

    def submit_some(self) -> None:
        """Let a client submit something of some kind."""
        sim = self.sim
        chance = sim.random
        client = chosen(sim, self.clients)
        kind = chance.randrange(6)
        function = chosen(sim, ("f", "f", "f", "g", "g", "h"))
        if kind == 0:  # a burst of single jobs
            call = client.call(Terms(function, priority=chance.randrange(3)))
            for _ in range(chance.randrange(1, 60)):
                call.add(1)
        elif kind == 1:  # a map in chunks
            call = client.call(Terms(function, lane=client.open_lane(), attempts=1))
            for _ in range(chance.randrange(1, 20)):
                call.add(chance.randrange(1, 10))
        elif kind == 2:  # what several clients ask for at the same time
            number = chance.randrange(8)
            uniq = b"u%d" % number
            for other in self.clients[: chance.randrange(1, 6)]:
                call = other.call(Terms("merged", merge=True, by_uniq=True), f"u{number}", uniq)
                call.add(1)
        elif kind == 3:  # some of it raises
            name = f"x{client.number}-{len(client.calls)}"
            client.call(Terms(function), name).add(chance.randrange(1, 8))
        elif kind == 4:
            client.call(Terms(function, not_before=chance.random(), background=True)).add(1)
        else:
            call = client.call(Terms(function))
            for _ in range(5):
                call.add(1)
            sim.soon(0.1, call.cancel_one)

    # --- faults -------------------------------------------------------------------------------

    def fail_some(self) -> None:
        """Let something break."""
        sim = self.sim
        kind = sim.random.random()
        peer = chosen(sim, [*self.clients, *self.children(), *self.hosts])
        index = sim.random.randrange(3)
        link = peer.wires[index]
        if kind < 0.02:
            client = chosen(sim, self.clients)
            sim.counts["client killed"] += 1
            client.vanish()
            self.clients.remove(client)
            self.clients.append(self.add_client())
        elif kind < 0.45:
            if link is not None:
                link.cut()
        elif kind < 0.6:
            peer.replace(index)
        elif kind < 0.8:
            if children := self.children():
                child = chosen(sim, children)
                child.host.kill_child(child)
        elif kind < 0.9:
            host = chosen(sim, self.hosts)
            if host.alive and not host.is_leaving:
                chosen(sim, (host.kill, host.leave))()
                self.hosts.remove(host)
                sim.soon(1.0, self.add_host)
        elif kind < 0.96:
            notices = chosen(sim, (0.02, None))  # the process, or its machine
            sim.servers[index].kill(0.05 + sim.random.random(), notices)
        else:
            sim.servers[index].drain()

    def live(self, seconds: float, *, n_faults: int) -> None:
        """Let clients submit for so many seconds while now and then something breaks."""
        end = self.sim.now + seconds
        for _ in range(n_faults):
            self.sim.soon(seconds, self.fail_some)
        while self.sim.now < end:
            self.submit_some()
            self.sim.run(0.2 * self.sim.random.random())

    # --- the end ------------------------------------------------------------------------------

    def wait_done(self, seconds: float) -> None:
        """Let everything that is under way come to its end, without further faults."""
        sim = self.sim
        sim.run(seconds, lambda: all(client.is_done for client in self.clients))
        left = [(client.number, client.state.tickets) for client in self.clients]
        assert all(client.is_done for client in self.clients), f"these never ended: {left}"

    def finish(self, seconds: float = 60.0) -> None:
        sim = self.sim
        self.wait_done(seconds)
        sim.run(40.0)  # the last fault is noticed, and a supervisor's silence too
        for server in sim.servers:
            assert server.up
            state = server.state
            state.check()
            assert not state.draining
            there = {(w.supervisor.id, w.child) for w in state.crew.workers if w.abilities}
            assert there == {(child.host.session, child.number) for child in self.children()}, (
                "every worker is known, and no other"
            )
        for client in self.clients:
            client.check_end()
            client.leave()
        sim.run(30.0)  # a link that is gone is noticed, and its session ends
        for child in self.children():
            worker = child.state
            worker.check()
            assert not worker.held
            assert not worker.running
            assert worker.all_accepted, "every end is acknowledged"
        for server in sim.servers:
            book = server.state.book
            assert not book.jobs
            functions = server.state.crew.functions.values()
            assert not any(function.merged for function in functions)
            assert not book.sessions
            assert not book.nbytes
        for host in self.hosts:
            host.leave()
        sim.run(100.0)
        for server in sim.servers:
            state = server.state
            state.check()
            assert not state.roster.peers
            assert not state.roster.supervisors
            assert not state.crew.workers
            assert not len(state.book.endings)
            assert not state._adoptable
            assert state.next_deadline() is None, "an idle server does not wake up"


TIGHT = Limits(session_jobs=30, max_jobs=150, session_nbytes=300)
"""So little that servers are busy and clients wait for credit."""


@pytest.mark.parametrize("limits", [Limits(), TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("seed", range(1, 8))
def test_whatever_breaks_every_item_ends_once_and_rightly(seed: int, limits: Limits) -> None:
    cluster = Cluster(seed, hosts=10, children=10, clients=8, limits=limits)
    cluster.live(20.0, n_faults=100)
    cluster.finish()


def test_no_job_waits_while_a_worker_sleeps() -> None:
    """Without faults nothing is left to a time limit: each job takes its messages' way."""
    cluster = Cluster(7, hosts=10, children=4, clients=10)
    sim = cluster.sim
    calls = [client.call(Terms("f")) for client in cluster.clients]
    for _ in range(1000):
        chosen(sim, calls).add(1)
        sim.run(0.003 * sim.random.random())
    cluster.wait_done(1.0)
    assert max(max(call.waited) for call in calls) < 0.05
    cluster.finish()


def test_equal_requests_run_once() -> None:
    cluster = Cluster(3, hosts=5, children=4, clients=20)
    calls = ask_all(cluster, "report")
    cluster.sim.run(0.1)
    calls += ask_all(cluster, "report")
    cluster.finish()
    assert sum(len(call.waited) for call in calls) == 40
    assert cluster.sim.runs["report:0:1"] == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("restart_after", "n_runs"),
    [
        (5.0, 2),
        # Within the clients' grace it is back for some of them only, and some of these come to
        # it ahead of the supervisor that could tell that the job still runs.
        (0.05, 3),
        (0.3, 3),
    ],
)
def test_the_loss_of_a_merged_jobs_server_costs_one_more_run(
    seed: int, restart_after: float, n_runs: int
) -> None:
    cluster = Cluster(seed, hosts=5, children=4, clients=20)
    calls = ask_all(cluster, "report")
    cluster.sim.run(0.1)
    (server,) = (server for server in cluster.sim.servers if server.state.book.jobs)
    server.kill(restart_after)
    cluster.sim.run(0.02)
    calls += ask_all(cluster, "report")
    cluster.finish()
    assert sum(len(call.waited) for call in calls) == 40
    assert cluster.sim.runs["report:0:1"] <= n_runs


def ask_all(cluster: Cluster, name: str) -> list[Call]:
    """Let every client ask for the same."""
    calls = []
    for client in cluster.clients:
        terms = Terms("merged", merge=True, by_uniq=True)
        calls.append(client.call(terms, name, name.encode()))
        calls[-1].add(1)
    return calls


def test_ten_thousand_workers_do_thirty_thousand_jobs_through_losses() -> None:
    cluster = Cluster(1, hosts=100, children=100, clients=20, check_every=100_000)
    sim = cluster.sim
    for server in sim.servers:
        assert len(server.state.crew.workers) == 10_000
        server.state.check()
    calls = [client.call(Terms("h", lane=client.open_lane())) for client in cluster.clients]
    for call in calls:
        for _ in range(1500):
            call.add(1)
    sim.run(0.5)
    assert sum(child.is_busy for child in cluster.children()) > 9000
    for _ in range(100):
        child = chosen(sim, cluster.children())
        child.host.kill_child(child)
        link = chosen(sim, cluster.children()).wires[sim.random.randrange(3)]
        if link is not None:
            link.cut()
    for host in cluster.hosts[:3]:
        host.kill()
        sim.soon(1.0, cluster.add_host)
    sim.servers[1].kill(0.1)
    sim.run(0.5)
    for server in sim.servers:
        server.state.check()
    cluster.finish()
    assert sum(sim.runs.values()) < 42_000
