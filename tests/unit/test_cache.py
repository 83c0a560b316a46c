"""The array cache: bound, order of eviction, threads, and keys of images."""

from __future__ import annotations

import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.engines.stepwise.cache import ArrayCache, digest, entry_bytes


def floats(count: int, value: float = 0.0) -> np.ndarray:
    return np.full(count, value, np.float32)


def test_stored_arrays_are_found_and_read_only() -> None:
    cache = ArrayCache(10_000)
    cache.put("key", (floats(3, 1.0), floats(2, 2.0)))
    first, second = cache.find("key") or ()
    assert first.tolist() == [1.0, 1.0, 1.0]
    assert second.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 5.0
    assert cache.find("other") is None


@pytest.mark.parametrize("key_bytes", [10, 1000, 100_000])
def test_limit_holds_for_keys_and_overhead_too(key_bytes: int) -> None:
    limit = 2_000_000
    tracemalloc.start()
    cache = ArrayCache(limit)
    for number in range(2 * limit // (key_bytes + 300)):  # more than fit
        cache.put((0, f"{number:09} ".ljust(key_bytes, "x")), (floats(4), floats(4)))
    used, _peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 1.02 * limit
    assert 0.8 * used < cache.held_bytes <= limit


def test_stored_bytes_are_those_of_arrays_and_key_and_the_overhead() -> None:
    cache = ArrayCache(10_000)
    cache.put((1, "a" * 2000), (floats(100), floats(10)))
    assert 440 + 2000 < cache.held_bytes < 440 + 2000 + 1000
    cache.put((1, "a" * 2000), (floats(1),))
    assert 4 + 2000 < cache.held_bytes < 4 + 2000 + 1000


def test_least_recently_used_entry_is_evicted_first() -> None:
    cache = ArrayCache(3 * entry_bytes("a", (floats(10),)))
    for key in "abc":
        cache.put(key, (floats(10),))
    cache.find("a")
    cache.put("d", (floats(10),))
    assert [key for key in "abcd" if cache.find(key) is not None] == ["a", "c", "d"]


def test_arrays_larger_than_the_limit_are_not_stored() -> None:
    cache = ArrayCache(100)
    cache.put("large", (floats(26),))
    assert cache.find("large") is None
    assert cache.held_bytes == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=60))
def test_stored_bytes_never_exceed_the_limit(puts: list[tuple[int, int]]) -> None:
    limit = 200 + 2 * entry_bytes(0, ())
    cache = ArrayCache(limit)
    last: dict[int, int] = {}
    for key, count in puts:
        cache.put(key, (floats(count),))
        last[key] = count
        assert cache.held_bytes <= limit
        held = {known: found for known in last if (found := cache.find(known)) is not None}
        assert cache.held_bytes == sum(entry_bytes(known, found) for known, found in held.items())
        assert all(len(found[0]) == last[known] for known, found in held.items())


def test_cache_is_thread_safe() -> None:
    cache = ArrayCache(10_000)
    failures: list[BaseException] = []

    def use(seed: int) -> None:
        generator = np.random.default_rng(seed)
        try:
            for _ in range(300):
                key = int(generator.integers(0, 30))
                found = cache.find(key)
                assert found is None or found[0][0] == key
                cache.put(key, (floats(50, key),))
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert cache.held_bytes <= 10_000


def test_digest_depends_on_content_and_shape() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert digest(image) == digest(image.copy())
    assert digest(image) == digest(np.asfortranarray(image))
    assert digest(image) != digest(image.reshape(2, 8, 3))
    changed = image.copy()
    changed[3, 3, 2] ^= 1
    assert digest(image) != digest(changed)
