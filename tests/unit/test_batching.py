"""Batching: which ready pictures share the next call, which overtake, and which get all slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

import numpy as np
import pytest

from ovserve.engines.families.guidance import RowGuidance
from ovserve.engines.families.protocol import Conditions
from ovserve.engines.protocol import Work
from ovserve.engines.schedulers.schedulers import Scheduler
from ovserve.engines.stepwise.batching import MAX_OVERTAKES, OVERTAKE_RATIO, Batcher, Call, Row
from ovserve.engines.stepwise.compiled import Layout
from ovserve.engines.stepwise.picture import Picture, Start
from ovserve.engines.stepwise.tuning import Tuning
from ovserve.settings.options import Resolution

NATIVE = Resolution(64, 64)
SCHEDULER = Scheduler("ddim", {"num_train_timesteps": 1000})


def picture(steps: int = 10, *, rows: int = 2, size: int = 64, index: int = 0, is_solo: bool = False) -> Picture:
    """Return an encoded picture at step `index` of `steps`."""
    work = Work("job", 0, "text2image", "", "", size, size, steps, 3.0, 1.0, 0)
    latents = np.zeros((1, 4, size // 8, size // 8), np.float32)
    start = Start(Conditions({}, rows), latents, lambda shape: np.zeros(shape, np.float32))
    return Picture(work, SCHEDULER.plan(steps, 1.0), RowGuidance(), start, index, latents, is_solo=is_solo)


def by_size(picture: Picture) -> Hashable:
    return picture.latents.shape


def batcher(
    *pictures: Picture,
    rows: int = 8,
    slots: int = 1,
    splits: bool = True,
    sharing_key: Callable[[Picture], Hashable] = by_size,
) -> Batcher:
    tuning = Tuning(Layout(slots, 1), rows, splits)
    return Batcher(deque(pictures), tuning, NATIVE, slots, sharing_key)


def take(batch: Batcher, *, in_flight: tuple[Call, ...] = (), free: int = 1) -> list[list[Row]]:
    return batch.take(in_flight, free, counts_encodes=True)


def pictures_of(rows: list[Row]) -> list[Picture]:
    return list(dict.fromkeys(row.picture for row in rows))


def test_pictures_at_different_steps_share_a_call_up_to_its_rows() -> None:
    pictures = [picture(index=k) for k in range(5)]
    [rows] = take(batcher(*pictures))
    assert pictures_of(rows) == pictures[:4]
    assert [(row.condition, row.index) for row in rows] == [(c, k) for k in range(4) for c in (0, 1)]


def test_only_pictures_of_one_size_share_a_call() -> None:
    first, wide, third = picture(), picture(size=128), picture()
    batch = batcher(first, wide, third)
    assert pictures_of(take(batch)[0]) == [first, third]
    assert pictures_of(take(batch)[0]) == [wide]


def test_solo_picture_shares_no_call() -> None:
    first, solo, third = picture(), picture(is_solo=True), picture()
    batch = batcher(first, solo, third)
    assert [pictures_of(take(batch)[0]) for _ in range(2)] == [[first, third], [solo]]


def test_single_row_stays_alone_where_it_has_other_bits_beside_another_row() -> None:
    # Large transformers in bfloat16: a call of one row and a call of two take other kernels.
    first, alone, third = picture(), picture(rows=1), picture()
    batch = batcher(first, alone, third, splits=False)
    assert [pictures_of(take(batch)[0]) for _ in range(2)] == [[first, third], [alone]]
    ones = [picture(rows=1), picture(rows=1)]
    assert pictures_of(take(batcher(*ones, splits=False))[0]) == ones[:1]
    assert pictures_of(take(batcher(*ones, splits=True))[0]) == ones


def test_only_pictures_with_equal_keys_share_a_call() -> None:
    first, other, third = picture(), picture(index=1), picture()
    batch = batcher(first, other, third, sharing_key=lambda picture: picture.timestep)
    assert pictures_of(take(batch)[0]) == [first, third]


def test_calls_above_the_native_size_have_fewer_rows() -> None:
    pictures = [picture(size=128, rows=1) for _ in range(4)]
    assert len(take(batcher(*pictures, rows=12))[0]) == 3


def test_rows_are_shared_out_between_the_slots() -> None:
    pictures = [picture() for _ in range(4)]
    batch = batcher(*pictures, slots=2)
    [first] = take(batch, free=2)
    [second] = take(batch, in_flight=(Call("denoise", tuple(first)),))
    assert [pictures_of(first), pictures_of(second)] == [pictures[:2], pictures[2:]]


@pytest.mark.parametrize(("splits", "calls"), [(True, 2), (False, 1)])
def test_single_picture_has_a_call_for_each_row_where_rows_may_be_split(splits: bool, calls: int) -> None:
    assert len(take(batcher(picture(), slots=2, splits=splits), free=2)) == calls


def test_far_shorter_pictures_overtake_a_limited_number_of_times() -> None:
    long, short = picture(10 * OVERTAKE_RATIO), picture(10)
    ready = deque([long])
    batch = Batcher(ready, Tuning(Layout(1, 1), 2, splits=False), NATIVE, 1, by_size)
    order = []
    for _ in range(2 * MAX_OVERTAKES + 2):
        if short not in ready:
            ready.append(short)
        [head] = pictures_of(take(batch)[0])
        order.append(head)
        if head is long:
            long.overtakes = 0  # as after a step of it
            ready.append(long)
    assert order == 2 * [*MAX_OVERTAKES * [short], long]


def test_nearly_as_long_pictures_do_not_overtake() -> None:
    first, second = picture(OVERTAKE_RATIO * 10 - 1), picture(10)
    assert pictures_of(take(batcher(first, second, rows=2))[0]) == [first]


def test_long_and_short_picture_take_turns_with_all_slots() -> None:
    long, short = picture(10 * OVERTAKE_RATIO), picture(10)
    batch = batcher(short, long, slots=2)
    assert take(batch, free=1) == []
    assert [pictures_of(rows) for rows in take(batch, free=2)] == [[short], [short]]
