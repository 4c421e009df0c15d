"""Chunk sizes: what a sizer says, and what its sizes are worth on simulated workers."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import pytest
from chunk_simulation import Outcome, Worker, longest_first, run_map
from hypothesis import given
from hypothesis import strategies as st

from dmap.chunks import (
    CHUNKS_AHEAD,
    FLOOR,
    MOST_CHUNKS_AHEAD,
    MOST_ITEMS,
    RECENT,
    TARGET,
    ChunkSizer,
)

TWO = [Worker(), Worker()]
MILLISECONDS = [0.001] * 4_000
NOOPS = [70e-9] * 1_000_000


def run_auto(costs: list[float], workers: list[Worker]) -> Outcome:
    return run_map(costs, workers, ChunkSizer(total=len(costs)))


def heavy_tailed(seed: int) -> list[float]:
    """Return 4,000 items of 0.5 ms and more, few of them hundreds of times as much."""
    rng = random.Random(seed)
    return [0.0005 * rng.paretovariate(1.5) for _ in range(4_000)]


def with_ends(*, front: float | None, back: float | None) -> ChunkSizer:
    """Return a sizer that has seen one item of each end: so many seconds long, or still out."""
    sizer = ChunkSizer(total=100)
    for from_end, cost in enumerate([front, back]):
        sizer.cut(1, from_end=bool(from_end))
        if cost is not None:
            sizer.done(1, cost, from_end=bool(from_end))
    return sizer


def learned(sizer: ChunkSizer, n_items: int, cost: float) -> ChunkSizer:
    """Let the sizer see chunks of `n_items` come home until it has forgotten all else."""
    for _ in range(1_000):
        sizer.cut(n_items)
        sizer.done(n_items, n_items * cost)
    return sizer


# What a sizer says


def test_the_first_chunks_are_single_items_two_a_worker() -> None:
    sizer = ChunkSizer(total=1_000, n_workers=3)
    sizes: list[int] = []
    while size := sizer.next_size(len(sizes), len(sizes)):
        sizer.cut(size)
        sizes.append(size)
    assert sizes == [1] * 6


def test_with_no_worker_known_a_chunk_may_go_out() -> None:
    assert ChunkSizer(n_workers=0).next_size(0, 0) == 1


def test_a_worker_that_joins_opens_the_window() -> None:
    sizer = ChunkSizer(n_workers=1)
    assert sizer.next_size(2, 2) == 0
    sizer.n_workers = 2
    assert sizer.next_size(2, 2) == 1


def test_a_chunk_takes_the_target_where_all_items_cost_the_same() -> None:
    sizer = learned(ChunkSizer(), 80, 0.001)
    assert sizer.next_size(0, 0) == pytest.approx(TARGET / 0.001, abs=1)


def test_a_chunk_has_at_most_twice_the_items_of_the_last() -> None:
    sizer = learned(ChunkSizer(), 20, 0.001)
    assert sizer.next_size(0, 0) == 40


def test_a_tiny_chunk_is_followed_by_one_sixteen_times_as_large() -> None:
    sizer = learned(ChunkSizer(), 20, 0.00001)
    assert sizer.next_size(0, 0) == 320


def test_a_short_chunk_is_followed_by_one_of_the_floor() -> None:
    sizer = learned(ChunkSizer(), 20, FLOOR / 100)
    assert sizer.next_size(0, 0) == 100


def test_one_measured_item_does_not_prove_a_large_chunk() -> None:
    sizer = ChunkSizer(n_workers=100)
    sizer.cut(1)
    sizer.done(1, 1e-6)
    sizer.cut(16)
    assert sizer.next_size(16, 1) == 16


def test_items_that_cost_no_measurable_time_come_in_the_largest_chunks() -> None:
    sizer = learned(ChunkSizer(), MOST_ITEMS, 0.0)
    assert sizer.next_size(0, 0) == MOST_ITEMS


def test_one_dear_chunk_is_enough_to_shrink_the_next() -> None:
    sizer = learned(ChunkSizer(), 3_000, 1e-5)
    sizer.done(1, 10.0)
    assert sizer.next_size(0, 0) == 1


def test_a_rare_dear_item_is_remembered_when_recent_chunks_were_cheap() -> None:
    sizer = ChunkSizer()
    sizer.done(1, 10.0)
    for _ in range(3 * RECENT):
        sizer.cut(1)
        sizer.done(1, 1e-5)
    assert sizer.next_size(0, 0) == 1


def test_a_slow_first_call_on_each_of_many_workers_is_forgotten() -> None:
    sizer = ChunkSizer()
    for _ in range(500):
        sizer.done(1, 0.5)
    assert learned(sizer, 1, 1e-6).next_size(0, 0) > 1


def test_no_chunk_takes_more_than_half_an_even_share_of_the_rest() -> None:
    sizer = learned(ChunkSizer(total=1_000 * 100 + 160, n_workers=4), 100, 0.001)
    assert sizer.next_size(0, 0) == 20


def test_the_last_chunks_of_tiny_items_are_even_shares() -> None:
    sizer = learned(ChunkSizer(total=1_000 * 5_000 + 8_000, n_workers=4), 5_000, 1e-6)
    assert sizer.next_size(0, 0) == 2_000


def test_what_is_left_of_tiny_items_is_one_chunk() -> None:
    sizer = learned(ChunkSizer(total=1_000 * 500 + 80, n_workers=4), 500, 1e-6)
    assert sizer.next_size(0, 0) >= 80


def test_items_that_came_back_count_as_rest() -> None:
    sizer = learned(ChunkSizer(total=1_000 * 30, n_workers=2), 30, 0.001)
    sizer.returned(40)
    assert sizer.next_size(0, 0) == 10


def test_endless_input_does_not_shrink() -> None:
    outcome = run_map(MILLISECONDS, TWO, ChunkSizer(total=None))
    assert min(outcome.sizes[20:-1]) >= TARGET / 0.001 - 1


def test_input_beyond_the_total_goes_on_in_single_items() -> None:
    sizer = learned(ChunkSizer(total=10), 30, 0.001)
    assert sizer.next_size(0, 0) == 1


def test_sizes_start_again_from_what_comes_home_where_chunks_come_home_in_part() -> None:
    sizer = learned(ChunkSizer(), MOST_ITEMS, 1e-7)
    for _ in range(8):
        sizer.cut(MOST_ITEMS)
        sizer.done(10, 1e-6)
        sizer.returned(MOST_ITEMS - 10)
    assert sizer.next_size(0, 0) == 160


def test_a_lost_chunk_does_not_shrink_the_next() -> None:
    sizer = learned(ChunkSizer(), 100, 0.001)
    size = sizer.next_size(0, 0)
    sizer.cut(size)
    sizer.returned(size)
    assert sizer.next_size(0, 0) == size


def test_a_part_without_items_tells_nothing() -> None:
    sizer = ChunkSizer()
    sizer.done(0, 3.0)
    assert sizer.next_size(0, 0) == 1


def test_a_fixed_chunksize_is_kept_to_the_end() -> None:
    outcome = run_map(MILLISECONDS, TWO, ChunkSizer(chunksize=7, total=4_000))
    assert set(outcome.sizes[:-1]) == {7}


def test_fixed_chunks_of_known_length_go_out_two_a_worker() -> None:
    outcome = run_map([0.01] * 100, TWO, ChunkSizer(chunksize=1))
    assert outcome.most_out == CHUNKS_AHEAD * len(TWO)


def test_fixed_chunks_shorter_than_a_messages_way_go_out_in_numbers() -> None:
    outcome = run_map(NOOPS[:1_000], TWO, ChunkSizer(chunksize=1))
    assert outcome.most_out == MOST_CHUNKS_AHEAD * len(TWO)


@pytest.mark.parametrize("chunksize", [0, -1])
def test_a_chunksize_below_one_is_refused(chunksize: int) -> None:
    with pytest.raises(ValueError, match=f"chunksize is {chunksize}"):
        ChunkSizer(chunksize=chunksize)


def test_the_first_chunks_come_from_the_two_ends_in_turn() -> None:
    sizer = ChunkSizer(total=100, n_workers=2)
    sides = []
    for _ in range(4):
        sides.append(sizer.from_end())
        sizer.cut(1, from_end=sides[-1])
    assert sides == [False, True, False, True]


def test_where_both_ends_cost_the_same_the_front_goes_first() -> None:
    assert not with_ends(front=0.001, back=0.001).from_end()


def test_the_end_goes_first_where_it_is_dearer() -> None:
    assert with_ends(front=0.001, back=0.003).from_end()


def test_a_difference_that_may_be_chance_does_not_count() -> None:
    assert not with_ends(front=0.001, back=0.0015).from_end()


def test_an_end_of_which_nothing_has_come_home_is_taken_for_the_dearer_one() -> None:
    assert with_ends(front=0.001, back=None).from_end()
    assert not with_ends(front=None, back=0.001).from_end()


def test_chunks_of_each_end_have_the_size_that_its_items_want() -> None:
    sizer = with_ends(front=0.001, back=0.4)
    assert sizer.next_size(0, 0) == 4
    assert sizer.next_size(0, 0, from_end=True) == 1


# What must hold whatever the items cost and whoever comes and goes. `run_map` itself asserts that
# the sizer never gets stuck and never exceeds MOST_ITEMS.

costs_of_any_kind = st.lists(
    st.tuples(st.sampled_from([0.0, 70e-9, 1e-5, 0.001, 0.1, 10.0]), st.integers(1, 300)),
    max_size=8,
).map(lambda runs: [cost for cost, n in runs for _ in range(n)])
passing_workers = st.lists(
    st.builds(
        Worker,
        speed=st.sampled_from([0.1, 1.0, 3.0]),
        joins_at=st.sampled_from([0.0, 0.01, 5.0]),
        leaves_after=st.integers(0, 300),
    ),
    max_size=5,
)


@given(
    costs=costs_of_any_kind,
    workers=passing_workers,
    chunksize=st.one_of(st.just("auto"), st.integers(1, 100)),
    total=st.one_of(st.none(), st.integers(0, 3_000)),
    overrun=st.sampled_from([1e-6, 0.05, 1e9]),
)
def test_every_item_is_run_once(
    costs: list[float],
    workers: list[Worker],
    chunksize: int | Literal["auto"],
    total: int | None,
    overrun: float,
) -> None:
    sizer = ChunkSizer(chunksize=chunksize, total=total)
    outcome = run_map(costs, [*workers, Worker()], sizer, overrun=overrun)
    assert outcome.runs == [1] * len(costs)


@given(costs=costs_of_any_kind, workers=passing_workers, overrun=st.sampled_from([1e-6, 1e9]))
def test_sizes_grow_at_most_sixteenfold(
    costs: list[float], workers: list[Worker], overrun: float
) -> None:
    sizer = ChunkSizer(total=len(costs))
    sizes = run_map(costs, [*workers, Worker()], sizer, overrun=overrun, both_ends=False).sizes
    assert all(after <= 16 * before for before, after in pairwise(sizes))


# What the sizes are worth. A chunk costs as much as on two cores that workers, client and server
# share, where its way there and back is no idle time but work.


def bounded_pareto(seed: int, n: int = 200) -> list[float]:
    """Return items from 1 ms to 1 s, most of them short, the few long ones most of the work."""
    rng = random.Random(seed)
    return [0.001 / (1 - rng.random() * (1 - 0.001**0.5)) ** 2 for _ in range(n)]


@pytest.mark.parametrize("n_workers", [2, 8])
def test_millisecond_items_reach_97_percent_of_ideal(n_workers: int) -> None:
    outcome = run_auto(MILLISECONDS, [Worker()] * n_workers)
    assert outcome.makespan <= sum(MILLISECONDS) / n_workers / 0.97


def test_few_millisecond_items_reach_96_percent_of_ideal() -> None:
    assert run_auto(MILLISECONDS[:800], TWO).makespan <= 0.4 / 0.96


@pytest.mark.parametrize("make", [heavy_tailed, bounded_pareto])
def test_heavy_tailed_items_in_random_order_reach_97_percent_of_taking_each_as_it_comes(
    make: Callable[[int], list[float]],
) -> None:
    # Nobody who does not know the durations can know that a long item is among the last. So these
    # are the mean of many orders, and beside single items that cost no message.
    worth = []
    for seed in range(10):
        costs = make(seed)
        single = run_map(costs, TWO, ChunkSizer(chunksize=1), latency=0, overhead=0)
        worth.append(single.makespan / run_auto(costs, TWO).makespan)
    assert sum(worth) / len(worth) >= 0.97


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("make", [heavy_tailed, bounded_pareto])
@pytest.mark.parametrize("n_workers", [2, 8])
def test_heavy_tailed_items_in_order_reach_97_percent_of_who_knows_the_durations(
    make: Callable[[int], list[float]], reverse: bool, n_workers: int
) -> None:
    for seed in range(5):
        costs = sorted(make(seed), reverse=reverse)
        known = longest_first(costs, n_workers)
        assert run_auto(costs, [Worker()] * n_workers).makespan <= known / 0.97


def test_ascending_items_that_can_only_be_had_from_the_front_reach_85_percent() -> None:
    for seed in range(5):
        costs = sorted(heavy_tailed(seed))
        outcome = run_map(costs, TWO, ChunkSizer(total=len(costs)), both_ends=False)
        assert outcome.makespan <= longest_first(costs, 2) / 0.85


def test_items_from_microseconds_to_minutes_reach_97_percent_of_who_knows_the_durations() -> None:
    rng = random.Random(1)
    costs = sorted(rng.lognormvariate(-9, 3) for _ in range(5_000))
    assert run_auto(costs, TWO).makespan <= longest_first(costs, 2) / 0.97


def test_dear_items_at_the_very_end_are_not_caught_in_one_chunk() -> None:
    costs = [1e-5] * 10_000 + [10.0] * 10
    outcome = run_map(costs, TWO, ChunkSizer(total=len(costs)), both_ends=False)
    assert outcome.makespan <= 51


def test_ten_second_items_amid_ten_microsecond_items_do_not_hold_others_up() -> None:
    rng = random.Random(1)
    costs = [10.0 if rng.random() < 0.01 else 1e-5 for _ in range(20_000)]
    assert run_auto(costs, [Worker()] * 8).makespan <= longest_first(costs, 8) / 0.97


def test_dear_items_after_cheap_ones_hold_others_up_for_one_item_at_most() -> None:
    costs = [1e-5] * 100_000 + [10.0] * 40 + [1e-5] * 100_000
    outcome = run_map(costs, TWO, ChunkSizer(total=None), both_ends=False)
    assert outcome.makespan <= sum(costs) / 2 + 10.0


def test_a_million_noops_take_at_most_forty_chunks() -> None:
    assert len(run_auto(NOOPS, TWO).sizes) <= 40


def test_a_worker_of_half_the_speed_does_not_hold_the_other_up() -> None:
    outcome = run_auto(MILLISECONDS, [Worker(), Worker(speed=0.5)])
    assert outcome.makespan <= sum(MILLISECONDS) / 1.5 / 0.97


def test_a_worker_that_joins_in_the_middle_takes_its_share() -> None:
    outcome = run_auto(MILLISECONDS, [Worker(), Worker(joins_at=1.0)])
    assert outcome.makespan <= (sum(MILLISECONDS) + 1.0) / 2 / 0.97


def test_a_worker_that_leaves_in_the_middle_costs_nobody_else_time() -> None:
    outcome = run_auto(MILLISECONDS, [Worker(), Worker(leaves_after=500)])
    assert outcome.makespan <= (sum(MILLISECONDS) - 0.5) / 0.97
