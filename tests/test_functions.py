import functools
from typing import TypeAlias, cast

import pytest

from dmap import closures, functions
from dmap.errors import ClosureError

Bodies: TypeAlias = list[bytes | memoryview]


def blobs(n: int) -> list[Bodies]:
    return [
        [
            cast("bytes", blob.body)
            for blob in closures.Closure(functools.partial(int, str(i))).blobs
        ]
        for i in range(n)
    ]


def fill(cache: functions.FunctionCache, n: int) -> list[tuple[bytes, ...]]:
    ids = []
    for blob in blobs(n):
        ids.append((functions.blob_id(blob[0]),))
        cache.load(ids[-1], blob)
    return ids


def test_a_cached_function_is_the_one_that_was_loaded() -> None:
    cache = functions.FunctionCache()
    [blob] = blobs(1)
    func = cache.load((b"id",), blob)
    assert cache.get((b"id",)) is func
    assert func.call() == 0


def test_an_unknown_blob_is_not_in_the_cache() -> None:
    assert functions.FunctionCache().get((b"id",)) is None


def test_the_least_recently_used_function_makes_room() -> None:
    cache = functions.FunctionCache(max_functions=2)
    first, second = fill(cache, 2)
    cache.get(first)
    cache.load((b"third",), blobs(1)[0])
    assert (first in cache, second in cache, (b"third",) in cache) == (True, False, True)


def test_the_cache_is_bounded_by_the_bytes_of_its_blobs() -> None:
    nbytes = len(blobs(1)[0][0])
    cache = functions.FunctionCache(max_nbytes=2 * nbytes)
    ids = fill(cache, 4)
    assert [blob_id in cache for blob_id in ids] == [False, False, True, True]
    assert cache.nbytes == 2 * nbytes


def test_a_function_larger_than_the_cache_stays_alone() -> None:
    cache = functions.FunctionCache(max_nbytes=1)
    ids = fill(cache, 3)
    assert (len(cache), ids[-1] in cache) == (1, True)


def test_a_function_loaded_twice_counts_once() -> None:
    cache = functions.FunctionCache()
    [blob] = blobs(1)
    cache.load((b"id",), blob)
    cache.load((b"id",), blob)
    assert (len(cache), cache.nbytes) == (1, len(blob[0]))


def test_what_does_not_load_changes_nothing() -> None:
    cache = functions.FunctionCache()
    with pytest.raises(ClosureError):
        cache.load((b"id",), [b"no body"])
    assert (len(cache), cache.nbytes) == (0, 0)
