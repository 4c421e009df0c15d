"""The random numbers of seeded maps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from cluster import Cluster

from dmap import Client, current_job, seeds


def draw(item: object) -> tuple[float, float, float]:
    return random.random(), float(numpy.random.random()), float(seeds.generator().random())


def drawn(seed: int, first: int, n: int, function: Callable[[object], Any] = draw) -> list[Any]:
    with seeds.seeded(function, seed, first) as call:
        return [call(None) for _ in range(n)]


def test_an_items_numbers_depend_on_the_seed_and_its_index_only() -> None:
    whole = drawn(42, 0, 6)
    assert drawn(42, 0, 2) + drawn(42, 2, 4) == whole
    assert len({*whole}) == 6


def test_another_seed_gives_other_numbers() -> None:
    assert not {*drawn(1, 0, 5)} & {*drawn(2, 0, 5)}


def test_the_generator_is_spawned_as_numpy_describes() -> None:
    sequence = numpy.random.SeedSequence(42, spawn_key=(3,))
    expected = numpy.random.Generator(numpy.random.PCG64(sequence)).random()
    assert drawn(42, 3, 1)[0][2] == expected


def test_an_items_generator_goes_on_within_the_item() -> None:
    def twice(item: object) -> bool:
        return bool(seeds.generator().random() == seeds.generator().random())

    assert drawn(42, 0, 1, twice) == [False]


def test_the_next_job_is_not_seeded_by_the_last_one() -> None:
    random.seed(7)
    numpy.random.seed(7)
    expected = random.random(), numpy.random.random()
    random.seed(7)
    numpy.random.seed(7)
    drawn(42, 0, 3)
    assert (random.random(), numpy.random.random()) == expected


def test_a_chunk_inside_an_item_does_not_disturb_its_numbers() -> None:
    def around(item: object) -> tuple[Any, ...]:
        before = draw(None)
        drawn(1, 0, 2)
        return before, draw(None)

    def alone(item: object) -> tuple[Any, ...]:
        return draw(None), draw(None)

    assert drawn(42, 5, 1, around) == drawn(42, 5, 1, alone)


def test_without_a_seed_there_is_a_generator_of_the_process() -> None:
    assert seeds.generator() is seeds.generator()
    assert 0 <= seeds.generator().random() < 1


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(1) as made:
        made.start_worker(2, path=str(Path(__file__).parent))
        yield made


@pytest.mark.slow
def test_a_seeded_map_gives_the_same_however_it_is_cut(cluster: Cluster) -> None:
    def sample(item: int) -> tuple[float, float]:
        return random.random(), float(current_job().rng.random())

    with Client(cluster.endpoints) as client:
        first = client.dmap(sample, range(50), seed=42)
        assert client.dmap(sample, range(50), seed=42, chunksize=7) == first
        assert client.dmap(sample, range(50), seed=42, merge=True) == first
        assert client.dmap(sample, range(50), seed=43) != first
        unseeded = client.dmap(sample, range(50))
        assert not {*unseeded} & {*client.dmap(sample, range(50))}
        with pytest.raises(ValueError, match="seed"):
            client.dmap(sample, range(50), seed=-1)
