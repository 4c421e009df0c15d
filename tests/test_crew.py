"""Workers, what fits them, and their sleep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_net import Client, Net, Worker

from jobserver import crew as crew_module
from jobserver import protocol as wire
from jobserver.crew import Crew
from jobserver.queues import Needs


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.quiet()


def test_a_woken_worker_that_can_do_it_no_more_has_another_woken(net: Net) -> None:
    client, first, second = Client(net), Worker(net, "f", "g"), Worker(net, "f", number=2)
    first.sleep()
    second.sleep()
    client.submitted("f")
    first.take(wire.Noop)
    first.say(wire.CantDo(["f"]))
    second.take(wire.Noop)


def test_as_many_are_woken_as_jobs_are_ready(net: Net) -> None:
    client, workers = Client(net), [Worker(net, "f", number=n) for n in (1, 2, 3)]
    for worker in workers:
        worker.sleep()
    specs = [wire.JobSpec(ticket, 0) for ticket in (1, 2)]
    client.say(wire.SubmitJobs("f", specs))
    client.take(wire.JobsAccepted)
    workers[0].take(wire.Noop)
    workers[1].take(wire.Noop)
    workers[2].nothing()


def test_a_worker_that_does_not_fit_gets_nothing_when_it_comes_later(net: Net) -> None:
    client = Client(net)
    client.submitted(python="3.12")
    Worker(net, "f", python="3.11").grab_nothing()


def test_a_worker_that_fits_gets_what_was_there_before_it(net: Net) -> None:
    client = Client(net)
    client.submitted(python="3.12")
    Worker(net, "f", python="3.12").grab()


def test_the_time_of_a_job_is_a_running_average() -> None:
    crew = Crew()
    function = crew.require_function("f")
    crew.measured(function, 1.0)
    assert function.seconds == 1.0
    crew.measured(function, 2.0)
    assert function.seconds == pytest.approx(1.2)


def test_queues_without_jobs_do_not_pile_up() -> None:
    crew = Crew()
    for n in range(crew_module._IDLE_QUEUES + 10):
        crew.require_queue("f", Needs(str(n), frozenset()))
    queues = crew.functions["f"].queues
    assert len(queues) == crew_module._IDLE_QUEUES
    assert Needs("0", frozenset()) not in queues, "the oldest go first"
    crew.check()


def test_a_queue_with_a_job_is_kept(net: Net) -> None:
    client = Client(net)
    client.submitted(python="2.7")
    for n in range(crew_module._IDLE_QUEUES + 10):
        net.state.crew.require_queue("f", Needs(str(n), frozenset()))
    Worker(net, "f", python="2.7").grab()


def test_a_function_that_nobody_can_do_or_wants_is_forgotten(net: Net) -> None:
    worker = Worker(net, "f")
    worker.say(wire.CantDo(["f"]))
    assert not net.state.crew.functions
