"""The job server's state, one fact at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_net import Client, Net, Supervisor, Worker

from jobserver import protocol as wire
from jobserver.jobs import Limits


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.quiet()


# --- one job --------------------------------------------------------------------------------


def test_a_job_goes_to_a_worker_and_its_result_comes_back(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted(argument=b"7")
    worker.say(wire.GrabJobs())
    assign, (argument,) = worker.take_with_bodies(wire.JobAssign)
    assert [job.handle for job in assign.jobs] == [handle]
    assert argument == b"7"
    worker.complete(handle, b"49")
    assert client.result() == (1, b"49")


def test_a_batch_is_accepted_in_ranges_and_split_by_length(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    specs = [wire.JobSpec(ticket, ticket) for ticket in (1, 2, 3)]
    client.say(wire.SubmitJobs("f", specs), b"abbccc")
    assert client.take(wire.JobsAccepted).jobs == [wire.Accepted(1, 3, 1)]
    for argument in (b"a", b"bb", b"ccc"):
        worker.say(wire.GrabJobs())
        _, bodies = worker.take_with_bodies(wire.JobAssign)
        assert bodies == (argument,)


def test_lengths_that_do_not_add_up_change_nothing(net: Net) -> None:
    client = Client(net)
    client.say(wire.SubmitJobs("f", [wire.JobSpec(1, 5)]), b"four")
    assert client.take(wire.Error).code == "bad_frame"
    assert not net.state.book.jobs


def test_a_submit_said_twice_is_one_job(net: Net) -> None:
    client = Client(net)
    first = client.submitted()
    assert client.submitted(ticket=1) == first
    assert len(net.state.book.jobs) == 1


def test_an_untaken_result_is_sent_again_to_a_repeated_submit(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    worker_job = client.submitted()
    worker.grab()
    worker.complete(worker_job, b"r")
    client.take(wire.JobComplete)
    client.submit(ticket=1)
    assert client.result() == (1, b"r")
    worker.grab_nothing()


def test_short_jobs_are_assigned_together_but_no_more_than_a_fair_share(net: Net) -> None:
    client, worker, other = Client(net), Worker(net, "f"), Worker(net, "f", number=2)
    handle = client.submitted()
    worker.grab()
    worker.complete(handle, seconds=0.0001)
    client.result()
    specs = [wire.JobSpec(ticket, 1) for ticket in range(10, 20)]
    client.say(wire.SubmitJobs("f", specs), b"0123456789")
    client.take(wire.JobsAccepted)
    worker.say(wire.GrabJobs(n=100))
    assign, (body,) = worker.take_with_bodies(wire.JobAssign)
    assert (len(assign.jobs), body) == (5, b"01234")
    other.say(wire.GrabJobs(n=2))
    assert len(other.take(wire.JobAssign).jobs) == 2


def test_nothing_is_assigned_behind_a_job_that_may_run_only_once(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()
    worker.grab()
    worker.complete(handle, seconds=0.0001)
    client.result()
    for attempts in (3, 1, 1, 3):
        client.submitted(attempts=attempts)
    batches = []
    for _ in range(3):
        worker.say(wire.GrabJobs(n=100))
        batches.append(len(worker.take(wire.JobAssign).jobs))
    assert batches == [2, 1, 1]


def test_long_jobs_are_assigned_one_by_one(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()
    worker.grab()
    worker.complete(handle, seconds=1.0)
    client.result()
    client.submitted()
    client.submitted()
    worker.grab(n=100)


def test_results_that_come_together_go_to_a_client_together(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handles = [client.submitted(), client.submitted()]
    worker.grab()
    worker.grab()
    done = [wire.WorkDone(handle, 1) for handle in handles]
    worker.say(wire.WorkComplete(1, done), b"ab")
    assert worker.take(wire.WorkAccepted).seqs == [wire.Range(1, 1)]
    message, bodies = client.take_with_bodies(wire.JobComplete)
    assert [job.ticket for job in message.jobs] == [1, 2]
    assert bodies == (b"ab",)


def test_a_chunk_may_come_home_in_part(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted(n_items=10)
    assert worker.grab().n_items == 10
    worker.complete(handle, b"abc", n_items=3)
    assert client.take(wire.JobComplete).jobs == [wire.Completed(1, 3, 3)]
    assert not net.state.book.jobs


def test_an_exception_reaches_the_client_with_both_bodies(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f", host="papag", pid=12)
    handle = client.submitted(n_items=5)
    worker.grab()
    worker.say(wire.WorkException(1, handle, "ValueError", "bad", "tb", 2), b"pickle", b"results")
    worker.take(wire.WorkAccepted)
    message, bodies = client.take_with_bodies(wire.JobException)
    assert (message.ticket, message.type_name, message.n_items) == (1, "ValueError", 2)
    assert (message.host, message.pid, message.attempt) == ("papag", 12, 1)
    assert bodies == (b"pickle", b"results")


def test_a_result_from_a_worker_that_does_not_hold_the_job_is_late(net: Net) -> None:
    client, worker, other = Client(net), Worker(net, "f"), Worker(net, "f", number=2)
    handle = client.submitted()
    worker.grab()
    other.complete(handle, b"forged")
    assert net.state.counters["late"] == 1
    worker.complete(handle, b"true")
    assert client.result() == (1, b"true")


def test_a_second_result_of_the_same_job_is_late(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()
    worker.grab()
    worker.complete(handle, b"one")
    worker.complete(handle, b"two")
    assert client.result() == (1, b"one")
    assert net.state.counters["late"] == 1


# --- order, priorities, lanes, functions ----------------------------------------------------


def test_priorities_hold_across_functions(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f", "g")
    low = client.submitted("f", priority=wire.LOW)
    normal = client.submitted("g")
    high = client.submitted("f", priority=wire.HIGH)
    assert [worker.grab().handle for _ in range(3)] == [high, normal, low]


def test_loaded_functions_take_turns(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f", "g")
    for function in "fffggg":
        client.submitted(function)
    assert "".join(worker.grab().function for _ in range(6)) in ("fgfgfg", "gfgfgf")


def test_lanes_take_turns_so_a_large_map_does_not_make_its_neighbour_wait(net: Net) -> None:
    client, neighbour, worker = Client(net), Client(net, 2), Worker(net, "f")
    for _ in range(50):
        client.submitted(lane=1)
    handle = neighbour.submitted()
    assert handle in [worker.grab().handle for _ in range(2)]


def test_jobs_of_one_lane_keep_their_order(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handles = [client.submitted() for _ in range(5)]
    assert [worker.grab().handle for _ in range(5)] == handles


def test_a_worker_of_another_python_is_not_handed_the_job(net: Net) -> None:
    client = Client(net)
    old, new = Worker(net, "f", python="3.11"), Worker(net, "f", number=2, python="3.12")
    client.submitted(python="3.12")
    old.grab_nothing()
    new.grab()


def test_a_worker_without_the_labels_is_not_handed_the_job(net: Net) -> None:
    client = Client(net)
    plain, gpu = Worker(net, "f"), Worker(net, "f", number=2, labels=("gpu", "big"))
    client.submitted(labels=("gpu",))
    plain.grab_nothing()
    gpu.grab()


def test_count_workers_tells_who_fits_and_what_there_is(net: Net) -> None:
    client = Client(net)
    Worker(net, "f", python="3.11", labels=("gpu",))
    client.say(wire.CountWorkers(5, "f", "3.12"))
    assert client.take(wire.WorkersAre) == wire.WorkersAre(5, 0, 1, ("3.11",), ("gpu",))


def test_a_delayed_job_wakes_a_sleeper_when_its_time_comes(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    worker.sleep()
    client.submitted(not_before=2.0)
    net.tick(1.9)
    worker.nothing()
    net.tick(0.2)
    worker.take(wire.Noop)
    worker.grab()


# --- sleep ----------------------------------------------------------------------------------


def test_pre_sleep_with_work_there_is_answered_by_a_noop(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    client.submitted()
    worker.say(wire.PreSleep())
    worker.take(wire.Noop)


def test_one_job_wakes_one_sleeper_the_longest_asleep(net: Net) -> None:
    client = Client(net)
    workers = [Worker(net, "f", number=n) for n in range(1, 4)]
    for worker in workers:
        worker.sleep()
    client.submitted()
    workers[0].take(wire.Noop)
    workers[1].nothing()


def test_a_woken_worker_that_dies_before_it_grabs_has_another_woken(net: Net) -> None:
    client = Client(net)
    dying, living = Worker(net, "f"), Worker(net, "f", number=2)
    dying.sleep()
    living.sleep()
    client.submitted()
    dying.take(wire.Noop)
    dying.cut()
    living.take(wire.Noop)


def test_the_grab_of_a_woken_worker_wakes_nobody_else(net: Net) -> None:
    client = Client(net)
    first, second = Worker(net, "f"), Worker(net, "f", number=2)
    first.sleep()
    second.sleep()
    client.submitted()
    first.take(wire.Noop)
    first.grab()
    second.nothing()


def test_a_woken_child_that_is_lost_has_another_woken(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    child, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    child.sleep()
    other.sleep()
    client.submitted()
    child.take(wire.Noop)
    supervisor.say(wire.ChildLost(1, [], 0, 0, "SIGKILL"))
    other.take(wire.Noop)


def test_a_woken_worker_that_grabs_another_job_has_another_woken(net: Net) -> None:
    client = Client(net)
    both, one = Worker(net, "f", "g"), Worker(net, "f", number=2)
    both.sleep()
    one.sleep()
    client.submitted("f")
    both.take(wire.Noop)
    high = client.submitted("g", priority=wire.HIGH)
    assert both.grab().handle == high
    one.take(wire.Noop)


def test_a_new_ability_of_a_sleeper_wakes_it(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    worker.sleep()
    client.submitted("g")
    worker.nothing()
    worker.can_do("g")
    worker.take(wire.Noop)


def test_a_woken_worker_that_found_work_elsewhere_has_another_woken(net: Net) -> None:
    client = Client(net)
    first, second = Worker(net, "f"), Worker(net, "f", number=2)
    first.sleep()
    second.sleep()
    client.submitted()
    first.take(wire.Noop)
    first.say(wire.Awake())
    second.take(wire.Noop)


def test_a_woken_worker_that_says_nothing_for_a_while_has_another_woken(net: Net) -> None:
    client = Client(net)
    first, second = Worker(net, "f"), Worker(net, "f", number=2)
    first.sleep()
    second.sleep()
    client.submitted()
    first.take(wire.Noop)
    net.tick(0.3)
    second.take(wire.Noop)


def test_a_waiting_grab_is_answered_when_work_comes(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    worker.say(wire.GrabJobs(wait=True))
    worker.nothing()
    handle = client.submitted()
    assert worker.take(wire.JobAssign).jobs[0].handle == handle


def test_a_lost_job_wakes_a_sleeper(net: Net) -> None:
    client = Client(net)
    dying, sleeper = Worker(net, "f"), Worker(net, "f", number=2)
    client.submitted()
    dying.grab()
    sleeper.sleep()
    dying.cut()
    net.tick(1.1)
    sleeper.take(wire.Noop)


# --- merging --------------------------------------------------------------------------------


def test_equal_requests_merge_while_ready_and_while_running(net: Net) -> None:
    one, two, three = Client(net), Client(net, 2), Client(net, 3)
    worker = Worker(net, "report", merge=True)
    handle = one.submitted("report", uniq=b"u")
    assert two.submitted("report", uniq=b"u") == handle
    worker.grab()
    assert three.submitted("report", uniq=b"u") == handle
    worker.complete(handle, b"r")
    assert [client.result()[1] for client in (one, two, three)] == [b"r"] * 3
    worker.grab_nothing()


def test_nothing_merges_unless_the_function_or_the_submit_allows_it(net: Net) -> None:
    client = Client(net)
    Worker(net, "f")
    assert client.submitted(uniq=b"u") != client.submitted(uniq=b"u")
    assert client.submitted(uniq=b"v", merge=True) == client.submitted(uniq=b"v", merge=True)


def test_what_came_before_its_function_was_known_merges_when_a_worker_allows_it(net: Net) -> None:
    one, two = Client(net), Client(net, 2)
    handle = one.submitted("report", uniq=b"u")
    two.submitted("report", uniq=b"u")
    background = two.submitted("report", uniq=b"u", background=True)
    worker = Worker(net, "report", merge=True)
    (accepted,) = two.take(wire.JobsAccepted).jobs
    assert (accepted.ticket, accepted.handle) == (1, handle)
    assert worker.grab().handle == handle
    assert worker.grab().handle == background
    worker.grab_nothing()
    worker.complete(handle, b"r")
    assert [client.result() for client in (one, two)] == [(1, b"r")] * 2


def test_an_empty_uniq_never_merges(net: Net) -> None:
    client = Client(net)
    assert client.submitted(merge=True) != client.submitted(merge=True)


def test_the_same_uniq_of_another_function_does_not_merge(net: Net) -> None:
    client = Client(net)
    assert client.submitted("f", uniq=b"u", merge=True) != client.submitted(
        "g", uniq=b"u", merge=True
    )


def test_a_merged_jobs_first_argument_wins(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    client.submitted("f", b"first", uniq=b"u", merge=True)
    client.submitted("f", b"second", uniq=b"u", merge=True)
    worker.say(wire.GrabJobs())
    assert worker.take_with_bodies(wire.JobAssign)[1] == (b"first",)


def test_a_late_joiner_is_told_the_last_status(net: Net) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = one.submitted(uniq=b"u", merge=True)
    worker.grab()
    worker.say(wire.WorkStatus(handle, 3, 10))
    assert one.take(wire.JobStatus) == wire.JobStatus(1, 3, 10)
    two.submitted(uniq=b"u", merge=True)
    assert two.take(wire.JobStatus) == wire.JobStatus(1, 3, 10)


def test_a_listener_that_leaves_does_not_hurt_the_others(net: Net) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = one.submitted(uniq=b"u", merge=True)
    two.submitted(uniq=b"u", merge=True)
    one.say(wire.Goodbye())
    worker.grab()
    worker.complete(handle)
    assert two.result() == (1, b"r")


def test_a_background_job_that_a_foreground_client_joined_and_left_still_runs(net: Net) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = one.submitted(uniq=b"u", merge=True, background=True)
    two.submitted(uniq=b"u", merge=True)
    two.say(wire.Goodbye())
    assert worker.grab().handle == handle


def test_a_foreground_job_that_a_background_submit_joined_outlives_its_client(net: Net) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = one.submitted(uniq=b"u", merge=True)
    two.submitted(uniq=b"u", merge=True, background=True)
    one.say(wire.Goodbye())
    assert worker.grab().handle == handle


def test_a_submit_after_all_listeners_left_a_ready_job_gets_its_result(net: Net) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    one.submitted(uniq=b"u", merge=True)
    one.say(wire.Goodbye())
    handle = two.submitted(uniq=b"u", merge=True)
    assert worker.grab().handle == handle
    worker.complete(handle)
    two.result()


def test_a_submit_after_all_listeners_left_a_running_job_gets_its_result(net: Net) -> None:
    one, two = Client(net), Client(net, 2)
    worker, other = Worker(net, "f"), Worker(net, "f", number=2)
    first = one.submitted(uniq=b"u", merge=True)
    worker.grab()
    one.say(wire.Goodbye())
    assert worker.take(wire.CancelJob).handle == first
    second = two.submitted(uniq=b"u", merge=True)
    assert other.grab().handle == second
    other.complete(second)
    two.result()


def test_one_client_that_asks_twice_is_told_twice(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted(uniq=b"u", merge=True)
    client.submitted(uniq=b"u", merge=True)
    worker.grab()
    worker.complete(handle, b"r")
    message, bodies = client.take_with_bodies(wire.JobComplete)
    assert [job.ticket for job in message.jobs] == [1, 2]
    assert bodies == (b"rr",)


def test_a_merged_ready_job_stands_in_every_joiners_lane(net: Net) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    for _ in range(20):
        one.submitted()
    shared = one.submitted(uniq=b"u", merge=True)
    assert two.submitted(uniq=b"u", merge=True) == shared
    assert shared in [worker.grab().handle for _ in range(2)]


def test_a_joiner_of_higher_priority_lifts_the_job(net: Net) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    one.submitted()
    shared = one.submitted(uniq=b"u", merge=True)
    two.submitted(uniq=b"u", merge=True, priority=wire.HIGH)
    assert worker.grab().handle == shared
    worker.grab()
    worker.grab_nothing()


def test_a_submit_from_inside_a_job_does_not_join_that_job(net: Net) -> None:
    outer, inner, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = outer.submitted(uniq=b"u", merge=True)
    origin = worker.grab().origin
    assert inner.submitted(uniq=b"u", merge=True, ancestors=(origin,)) != handle


def test_who_waits_for_a_joined_job_is_forgotten_when_it_ends(net: Net) -> None:
    first, inner, worker = Client(net), Client(net, 2), Worker(net, "f")
    outer = wire.Origin(inner.session, 77)
    handle = first.submitted(uniq=b"u", merge=True)
    joined = inner.submitted(uniq=b"u", merge=True, ancestors=(outer,))
    assert joined == handle
    worker.grab()
    worker.complete(handle, b"r")
    assert first.result()[1] == inner.result()[1] == b"r"
    net.state.check()


def test_who_waited_for_a_joined_job_and_left_is_forgotten_when_it_ends(net: Net) -> None:
    first, inner, worker = Client(net), Client(net, 2), Worker(net, "f")
    outer = wire.Origin(inner.session, 77)
    handle = first.submitted(uniq=b"u", merge=True)
    inner.submitted(uniq=b"u", merge=True, ancestors=(outer,))
    inner.say(wire.CancelJobs([wire.Range(1, 1)]))
    inner.take(wire.JobFail)
    worker.grab()
    worker.complete(handle, b"r")
    first.result()
    net.state.check()


def test_a_resubmit_joins_a_merged_job_that_has_just_ended(net: Net) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = one.submitted(uniq=b"u", merge=True)
    worker.grab()
    worker.complete(handle, b"r")
    one.result()
    two.submit(uniq=b"u", merge=True, resubmit=True)
    assert two.result() == (1, b"r")
    worker.grab_nothing()


def test_an_ordinary_submit_after_the_end_is_a_new_job(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted(uniq=b"u", merge=True)
    worker.grab()
    worker.complete(handle)
    client.result()
    assert client.submitted(uniq=b"u", merge=True) != handle


# --- status, data, background, cancel -------------------------------------------------------


def test_data_and_warnings_go_to_every_listener(net: Net) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = one.submitted(uniq=b"u", merge=True)
    two.submitted(uniq=b"u", merge=True)
    worker.grab()
    worker.say(wire.WorkData(handle), b"part")
    worker.say(wire.WorkWarning(handle), b"careful")
    for client in (one, two):
        assert client.take_with_bodies(wire.JobData)[1] == (b"part",)
        assert client.take_with_bodies(wire.JobWarning)[1] == (b"careful",)


def test_status_tells_ready_from_running_from_ended_from_never(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()

    def status() -> tuple[bool, bool, str]:
        client.say(wire.GetStatus(1, handle))
        answer = client.take(wire.StatusIs)
        return answer.known, answer.running, answer.ended

    assert status() == (True, False, "")
    worker.grab()
    assert status() == (True, True, "")
    worker.complete(handle)
    client.result()
    assert status() == (True, False, "complete")
    net.tick(120)
    assert status() == (False, False, "")
    net.peers.pop(worker.id)


def test_status_by_uniq_finds_the_job(net: Net) -> None:
    client = Client(net)
    handle = client.submitted(uniq=b"u", merge=True)
    client.say(wire.GetStatus(1, 0, "f", b"u"))
    assert client.take(wire.StatusIs).handle == handle


def test_a_background_job_outlives_its_client(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted(background=True)
    client.say(wire.Goodbye())
    assert worker.grab().handle == handle
    worker.complete(handle)


def test_a_background_submit_said_twice_is_one_job(net: Net) -> None:
    client = Client(net)
    assert client.submitted(background=True) == client.submitted(background=True, ticket=1)


def test_attach_hears_the_rest_and_the_result_of_a_background_job(net: Net) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = one.submitted(background=True)
    two.say(wire.Attach(9, handle))
    two.take(wire.JobsAccepted)
    worker.grab()
    worker.complete(handle, b"r")
    assert two.result() == (9, b"r")


def test_attach_after_the_end_gets_the_kept_result(net: Net) -> None:
    one, two, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = one.submitted(background=True)
    worker.grab()
    worker.complete(handle, b"r")
    two.say(wire.Attach(9, handle))
    assert two.result() == (9, b"r")


def test_attach_to_an_unknown_handle_fails(net: Net) -> None:
    client = Client(net)
    client.say(wire.Attach(9, 77))
    assert client.take(wire.JobFail).code == "unknown"


def test_a_cancelled_ready_job_is_dropped_and_the_client_hears_one_end(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    client.submitted()
    client.say(wire.CancelJobs([wire.Range(1, 1)]))
    assert client.take(wire.JobFail) == wire.JobFail(1, "cancelled")
    worker.grab_nothing()
    assert not net.state.book.jobs


def test_a_cancel_reaches_a_running_job_through_its_supervisor(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker = Worker(net, "f", child=3)
    handle = client.submitted()
    worker.grab()
    client.say(wire.CancelJobs([wire.Range(1, 1)]))
    assert client.take(wire.JobFail).code == "cancelled"
    assert supervisor.take(wire.CancelJob) == wire.CancelJob(3, handle)
    worker.say(wire.WorkFail(1, handle, "cancelled"))
    worker.take(wire.WorkAccepted)
    client.nothing()
    assert not net.state.book.jobs


def test_a_cancel_that_the_supervisor_missed_is_said_again(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker = Worker(net, "f", child=3)
    handle = client.submitted()
    worker.grab()
    supervisor.cut()
    client.say(wire.CancelJobs([wire.Range(1, 1)]))
    client.take(wire.JobFail)
    supervisor.reconnect()
    supervisor.take(wire.Welcome)
    assert supervisor.take(wire.CancelJob) == wire.CancelJob(3, handle)


def test_a_cancelled_job_whose_worker_dies_is_not_run_again(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker = Worker(net, "f", child=3)
    handle = client.submitted()
    worker.grab()
    client.say(wire.CancelJobs([wire.Range(1, 1)]))
    client.take(wire.JobFail)
    supervisor.take(wire.CancelJob)
    supervisor.say(wire.ChildLost(3, [handle], 0, 1, "SIGKILL"))
    assert not net.state.book.jobs


def test_cancel_by_handle_ends_the_job_for_all(net: Net) -> None:
    one, two, admin = Client(net), Client(net, 2), Client(net, 3)
    handle = one.submitted(uniq=b"u", merge=True)
    two.submitted(uniq=b"u", merge=True)
    admin.say(wire.CancelHandle(1, handle))
    assert admin.take(wire.StatusIs).ended == "cancelled"
    assert one.take(wire.JobFail).code == two.take(wire.JobFail).code == "cancelled"


# --- lost and given back --------------------------------------------------------------------


def test_a_lost_workers_job_goes_to_another_in_front(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    dying, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    first = client.submitted()
    client.submitted()
    dying.grab()
    supervisor.say(wire.ChildLost(1, [first], 0, 1, "SIGKILL"))
    again = other.grab()
    assert (again.handle, again.attempt) == (first, 2)


def test_a_job_that_kills_worker_after_worker_fails_by_name(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    handle = client.submitted(attempts=2)
    for child in (1, 2):
        worker = Worker(net, "f", child=child, host="papag")
        worker.grab()
        supervisor.say(wire.ChildLost(child, [handle], 0, 1, "SIGSEGV"))
    fail = client.take(wire.JobFail)
    assert (fail.code, fail.attempt, fail.exit, fail.host) == ("lost", 2, "SIGSEGV", "papag")
    assert not net.state.book.jobs


def test_what_a_dead_worker_had_not_started_is_no_attempt(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    dying, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    running, waiting = client.submitted(attempts=1), client.submitted(attempts=1)
    dying.grab()
    dying.grab()
    supervisor.say(wire.ChildLost(1, [running], 0, 1, "SIGKILL"))
    assert client.take(wire.JobFail).ticket == 1
    again = other.grab()
    assert (again.handle, again.attempt) == (waiting, 1)


def test_what_a_dead_worker_had_run_to_its_end_is_no_attempt(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    dying, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    handle = client.submitted(attempts=2)
    dying.grab()
    supervisor.say(wire.ChildLost(1, [], 0, 0, "SIGKILL", [handle]))
    assert other.grab().attempt == 1


def test_what_had_ended_and_may_run_once_only_fails_but_is_not_blamed(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker = Worker(net, "f", child=1)
    handle = client.submitted(attempts=1, n_items=5)
    worker.grab()
    supervisor.say(wire.ChildLost(1, [], 0, 0, "SIGKILL", [handle]))
    fail = client.take(wire.JobFail)
    assert (fail.code, fail.n_items) == ("lost", 0)


def test_a_lost_chunk_names_the_suspected_items(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker = Worker(net, "f", child=1)
    handle = client.submitted(n_items=100, attempts=1)
    worker.grab()
    supervisor.say(wire.ChildLost(1, [handle], 17, 2, "SIGKILL"))
    fail = client.take(wire.JobFail)
    assert (fail.item, fail.n_items) == (17, 2)


def test_jobs_given_back_return_to_the_front_in_order_and_are_no_attempt(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    busy, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    handles = [client.submitted() for _ in range(4)]
    for _ in range(3):
        busy.grab()
    supervisor.say(wire.GiveBack(handles[1:3]))
    jobs = [other.grab() for _ in range(3)]
    assert [job.handle for job in jobs] == handles[1:]
    assert {job.attempt for job in jobs} == {1}


def test_a_supervisor_may_not_give_back_jobs_of_another_host(net: Net) -> None:
    client, stranger = Client(net), Supervisor(net, 2)
    Supervisor(net)
    worker, other = Worker(net, "f", child=1), Worker(net, "f", number=3)
    handle = client.submitted()
    worker.grab()
    stranger.say(wire.GiveBack([handle]))
    other.grab_nothing()


def test_a_childs_broken_link_alone_loses_nothing(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker = Worker(net, "f", child=1)
    handle = client.submitted()
    worker.grab()
    worker.cut()
    for _ in range(30):
        net.tick(1)
        supervisor.say(wire.Heartbeat())
    assert net.state.book.jobs[handle].state == "assigned"
    worker.reconnect(boot="b1", holding=[handle])
    worker.take(wire.Welcome)
    worker.complete(handle)
    client.result()


def test_a_job_that_never_reached_its_worker_goes_back_when_it_says_hello(net: Net) -> None:
    client = Client(net)
    Supervisor(net)
    worker, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    handle = client.submitted()
    worker.grab()
    worker.cut()
    worker.reconnect(boot="b1", holding=[])
    worker.take(wire.Welcome)
    assert other.grab().handle == handle


def test_an_assignment_that_cannot_be_sent_goes_back_at_once(net: Net) -> None:
    client = Client(net)
    Supervisor(net)
    gone, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    gone.say(wire.GrabJobs(wait=True))
    gone.cut(noticed=False)
    handle = client.submitted()
    again = other.grab()
    assert (again.handle, again.attempt) == (handle, 1)


def test_a_silent_supervisor_is_lost_and_the_oldest_job_of_each_child_blamed(net: Net) -> None:
    client = Client(net)
    Supervisor(net)
    worker, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    client.submitted()
    client.submitted()
    worker.grab()
    worker.grab()
    for _ in range(25):
        net.tick(1)
        other.say(wire.Heartbeat())
    assert [other.grab().attempt for _ in range(2)] == [2, 1]
    worker.take(wire.Error)


def test_a_supervisor_whose_link_is_gone_is_lost_after_a_grace(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    client.submitted()
    worker.grab()
    supervisor.cut()
    net.tick(0.9)
    other.grab_nothing()
    net.tick(0.2)
    other.grab()
    worker.take(wire.Error)


def test_a_supervisor_that_comes_back_in_time_loses_nothing(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker = Worker(net, "f", child=1)
    handle = client.submitted()
    worker.grab()
    supervisor.cut()
    net.tick(0.9)
    supervisor.reconnect()
    supervisor.take(wire.Welcome)
    net.tick(5)
    worker.complete(handle)
    client.result()


def test_a_goodbye_gives_back_what_the_worker_had(net: Net) -> None:
    client, worker, other = Client(net), Worker(net, "f"), Worker(net, "f", number=2)
    handle = client.submitted()
    worker.grab()
    worker.say(wire.Goodbye())
    again = other.grab()
    assert (again.handle, again.attempt) == (handle, 1)


def test_a_time_limit_frees_the_caller(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker = Worker(net, "f", child=1)
    worker.can_do("f", timeout=30)
    handle = client.submitted(timeout=60, item_timeout=5)
    job = worker.grab()
    assert (job.timeout, job.item_timeout) == (30, 5)
    supervisor.say(wire.WorkFail(0, handle, "timeout", "ran for 30 s"))
    assert client.take(wire.JobFail).code == "timeout"
    supervisor.say(wire.ChildLost(1, [], 0, 0, "SIGKILL"))
    assert not net.state.book.jobs


def test_cant_do_keeps_the_running_job_and_gives_no_other(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()
    client.submitted()
    worker.grab()
    worker.say(wire.CantDo(["f"]))
    worker.grab_nothing()
    worker.complete(handle)
    client.result()


def test_reset_abilities_forgets_all(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f", "g")
    client.submitted("f")
    client.submitted("g")
    worker.say(wire.ResetAbilities())
    worker.grab_nothing()


# --- sessions and links ---------------------------------------------------------------------


def test_a_session_outlives_its_link_and_gets_its_results(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handle = client.submitted()
    worker.grab()
    client.cut()
    worker.complete(handle, b"r")
    net.tick(5)
    client.reconnect()
    assert client.take(wire.Welcome).resumed
    assert client.result() == (1, b"r")


def test_a_session_ends_when_its_link_stays_away(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    running = client.submitted()
    client.submitted()
    worker.grab()
    client.cut()
    net.tick(11)
    assert worker.take(wire.CancelJob).handle == running
    assert list(net.state.book.jobs) == [running]
    client.reconnect()
    assert not client.take(wire.Welcome).resumed


def test_the_end_of_a_session_leaves_other_peoples_bytes_alone(net: Net) -> None:
    client, other, worker = Client(net), Client(net, 2), Worker(net, "f")
    handle = client.submitted()
    other.submitted()
    worker.grab()
    worker.complete(handle, b"untaken")
    client.take(wire.JobComplete)
    client.say(wire.Goodbye())
    assert net.state.book.nbytes == 1


def test_the_first_message_must_be_hello(net: Net) -> None:
    client = Client(net)
    client.id = net.routing_id()
    net.peers[client.id] = client
    client.say(wire.GetStatus(1, 1))
    assert client.take(wire.Error).code == "hello_first"


def test_a_message_out_of_role_changes_nothing(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    client.say(wire.GrabJobs())
    assert client.take(wire.Error).code == "role"
    worker.say(wire.SubmitJobs("f", [wire.JobSpec(1, 0)]), b"")
    assert worker.take(wire.Error).code == "role"


def test_another_major_version_is_refused_by_name(net: Net) -> None:
    peer = Client(net)
    peer.id = net.routing_id()
    net.peers[peer.id] = peer
    peer.say(wire.Hello(2, 0, "client", b"s" * 16))
    error = peer.take(wire.Error)
    assert error.code == "version"
    assert "1.1" in error.text


def test_a_connection_cannot_become_another(net: Net) -> None:
    client = Client(net)
    client.say(wire.Hello(1, 0, "worker", b"s" * 16))
    assert client.take(wire.Error).code == "role"


# --- after a restart ------------------------------------------------------------------------


def test_a_running_job_is_matched_to_its_resubmit_after_a_restart() -> None:
    net = Net(boot="b2")
    client = Client(net)
    origin = wire.Origin(client.session, 5)
    running = [wire.Running(1, origin, "f")]
    Supervisor(net, boot="b1", running=running)
    other = Worker(net, "f", number=2)
    client.submitted(ticket=5, resubmit=True)
    other.grab_nothing()
    worker = Worker(net, "f", child=1, boot="b1", holding=[33])
    done = wire.WorkDone(33, 1)
    worker.say(wire.WorkComplete(9, [done], boot="b1", origins=[origin]), b"r")
    worker.take(wire.WorkAccepted)
    assert client.result() == (5, b"r")
    net.quiet()


def test_what_a_worker_turns_out_not_to_run_goes_to_another() -> None:
    net = Net(boot="b2")
    client = Client(net)
    running = [wire.Running(1, wire.Origin(client.session, 5), "f")]
    Supervisor(net, boot="b1", running=running)
    client.submitted(ticket=5, resubmit=True)
    worker = Worker(net, "g", child=1, boot="b1")
    worker.sleep()
    Worker(net, "f", number=2).grab()
    net.quiet()


# --- limits, blobs, drain -------------------------------------------------------------------


def test_a_client_beyond_its_limit_is_told_busy_and_keeps_what_it_has() -> None:
    net = Net(limits=Limits(session_jobs=2))
    client = Client(net)
    specs = [wire.JobSpec(ticket, 0) for ticket in (1, 2, 3)]
    client.say(wire.SubmitJobs("f", specs), b"")
    assert client.take(wire.JobsAccepted).jobs == [wire.Accepted(1, 2, 1)]
    refused = client.take(wire.JobsRefused)
    assert (refused.code, refused.tickets) == ("busy", [wire.Range(3, 1)])
    net.quiet()


def test_bytes_are_limited_but_one_large_job_may_go_alone() -> None:
    net = Net(limits=Limits(session_nbytes=10))
    client = Client(net)
    client.submitted(argument=b"x" * 50)
    client.submit(argument=b"y")
    assert client.take(wire.JobsRefused).code == "busy"
    net.quiet()


def test_jobs_that_name_an_unknown_blob_are_refused_with_its_name(net: Net) -> None:
    client = Client(net)
    client.submit(blobs=(b"b" * 32,))
    refused = client.take(wire.JobsRefused)
    assert (refused.code, refused.blobs) == ("blobs", (b"b" * 32,))


def test_a_worker_fetches_the_blob_that_its_job_names(net: Net) -> None:
    from jobserver.blobs import digest

    client, worker = Client(net), Worker(net, "f")
    blob = digest(b"closure")
    client.say(wire.PutBlob(blob), b"closure")
    assert client.take(wire.BlobTaken) == wire.BlobTaken(blob)
    client.submitted(blobs=(blob,))
    assert worker.grab().blobs == (blob,)
    worker.say(wire.FetchBlob(blob))
    assert worker.take_with_bodies(wire.Blob) == (wire.Blob(blob, True), (b"closure",))


def test_a_supervisor_fetches_blobs_for_its_children(net: Net) -> None:
    from jobserver.blobs import digest

    client, supervisor = Client(net), Supervisor(net)
    blob = digest(b"closure")
    client.say(wire.PutBlob(blob), b"closure")
    assert client.take(wire.BlobTaken) == wire.BlobTaken(blob)
    supervisor.say(wire.FetchBlob(blob))
    assert supervisor.take_with_bodies(wire.Blob) == (wire.Blob(blob, True), (b"closure",))
    supervisor.say(wire.FetchBlob(b"?" * 32))
    assert supervisor.take_with_bodies(wire.Blob) == (wire.Blob(b"?" * 32, False), ())


def test_the_memory_of_a_blob_is_named_to_who_can_open_it(net: Net) -> None:
    from jobserver.blobs import digest

    client, supervisor = Client(net), Supervisor(net)
    body = wire.SharedBody((memoryview(b"closure"),))
    body.memory = wire.Reference(7, 8, 7, bytes(16))
    blob, other = digest(body), digest(b"other")
    net.state.book.blobs.put(blob, body)
    client.say(wire.PutBlob(other), b"other")
    assert client.take(wire.BlobTaken) == wire.BlobTaken(other)
    supervisor.say(wire.FetchBlob(blob, named=True))
    named = wire.Blob(blob, known=True, memory=body.memory)
    assert supervisor.take_with_bodies(wire.Blob) == (named, ())
    supervisor.say(wire.FetchBlob(blob))
    assert supervisor.take_with_bodies(wire.Blob) == (wire.Blob(blob, True), (body,))
    supervisor.say(wire.FetchBlob(other, named=True))
    assert supervisor.take_with_bodies(wire.Blob) == (wire.Blob(other, True), (b"other",))


def test_a_blob_under_a_wrong_name_is_refused(net: Net) -> None:
    client = Client(net)
    client.say(wire.PutBlob(b"b" * 32), b"bytes")
    assert "sha256" in client.take(wire.BlobTaken).text


def test_a_draining_server_finishes_what_is_assigned_and_refuses_the_rest(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    running = client.submitted()
    client.submitted()
    worker.grab()
    net.spread(net.state.drain(net.now))
    client.take(wire.Draining)
    worker.take(wire.Draining)
    refused = client.take(wire.JobsRefused)
    assert (refused.code, refused.tickets) == ("draining", [wire.Range(2, 1)])
    client.submit()
    assert client.take(wire.JobsRefused).code == "draining"
    assert not net.state.drained
    worker.complete(running)
    client.result()
    assert net.state.drained


def test_a_nested_grab_takes_only_from_its_own_lanes(net: Net) -> None:
    other, inner, worker = Client(net), Client(net, 2), Worker(net, "f")
    other.submitted()
    worker.grab()
    other.submitted()
    lane = wire.LaneId(inner.session, 7)
    worker.say(wire.GrabJobs(lanes=[lane]))
    worker.take(wire.NoJob)
    handle = inner.submitted(lane=7)
    assert worker.grab(lanes=[lane]).handle == handle


def test_heartbeats_go_to_clients_and_supervisors_only(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    child = Worker(net, "f", child=1)
    net.tick(1.1)
    assert isinstance(client.inbox.pop()[0], wire.Heartbeat)
    assert isinstance(supervisor.inbox.pop()[0], wire.Heartbeat)
    assert not child.inbox


def test_an_idle_server_without_peers_has_no_deadline() -> None:
    assert Net().state.next_deadline() is None


def test_a_worker_that_was_lost_with_its_supervisor_is_told_to_come_back(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker = Worker(net, "f", child=1)
    worker.say(wire.GrabJobs(wait=True))
    supervisor.cut()
    net.tick(1.1)
    assert worker.take(wire.Error).code == "hello_first"
    worker.say(worker.hello)
    worker.take(wire.Welcome)
    worker.can_do("f")
    client.submitted()
    worker.grab()


def test_a_child_that_ended_is_not_taken_in_when_its_hello_comes_late(net: Net) -> None:
    client, supervisor = Client(net), Supervisor(net)
    worker, other = Worker(net, "f", child=1), Worker(net, "f", number=2)
    worker.cut()
    supervisor.say(wire.ChildLost(1, [], 0, 0, "SIGKILL"))
    worker.reconnect()
    assert worker.take(wire.Error).code == "role"
    worker.say(wire.GrabJobs(wait=True))
    assert worker.take(wire.Error).code == "hello_first"
    client.submitted()
    other.grab()


def test_jobs_that_a_worker_gives_back_keep_their_order(net: Net) -> None:
    client, worker = Client(net), Worker(net, "f")
    handles = [client.submitted() for _ in range(4)]
    for _ in range(3):
        worker.grab()
    worker.say(wire.GiveBack(handles[:3]))
    assert [worker.grab().handle for _ in range(4)] == handles


def test_what_a_child_ran_that_has_died_since_goes_to_another() -> None:
    net = Net(boot="b2")
    client = Client(net)
    running = [wire.Running(1, wire.Origin(client.session, 5), "f", b"u")]
    supervisor = Supervisor(net, boot="b1", running=running)
    supervisor.say(wire.ChildLost(1, [], 0, 0, "SIGKILL"))
    client.submitted(ticket=5, resubmit=True, uniq=b"u", merge=True)
    Worker(net, "f", number=2).grab()
    net.quiet()


def test_what_a_child_got_here_is_not_taken_for_an_earlier_boots() -> None:
    net = Net(boot="b2")
    client, worker = Client(net), Worker(net, "f", child=1)
    handle = client.submitted(uniq=b"u", merge=True)
    job = worker.grab()
    Supervisor(net, boot="b1", running=[wire.Running(1, job.origin, "f", b"u")])
    worker.complete(handle)
    client.result()
    client.submitted(uniq=b"u", merge=True)
    Worker(net, "f", number=2).grab()
    net.quiet()
