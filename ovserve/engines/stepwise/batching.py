"""The rules by which ready pictures share calls to the device.

Fairness: ready pictures form a queue. A call takes the head, and others of the same size in order, so every picture in
flight gets the same share of steps and none starves. A picture with far fewer steps than the head overtakes it, but at
most MAX_OVERTAKES times between two steps of the head. That delays a long picture by little, and a short one does not
wait for it at each of its steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from ovserve.engines.stepwise.picture import Picture
from ovserve.engines.stepwise.tuning import Tuning
from ovserve.settings.options import Resolution

__all__ = ["Batcher", "Call", "Row"]

OVERTAKE_RATIO = 4  # a picture with this many times fewer steps overtakes; it delays the other by a quarter at most
MAX_OVERTAKES = 2  # steps of overtaking pictures between two steps of a long picture


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a call: a picture's row of conditions (0 or 1) at step `index`."""

    picture: Picture
    condition: int
    index: int


@dataclass(frozen=True, slots=True)
class Call:
    """One call to the device: kind encode, denoise or decode, and its rows (one for each picture unless denoise)."""

    kind: str
    rows: tuple[Row, ...]

    @property
    def pictures(self) -> list[Picture]:
        """The pictures in the call, each once."""
        return list(dict.fromkeys(row.picture for row in self.rows))


class Batcher:
    """Takes the rows of the next calls from the queue of ready pictures. Runs in: the device thread.

    Args:
        ready: the queue; the engine appends to it.
        tuning: how the device is divided.
        native: the size at which the rows of a call were measured.
        slots: how many calls run side by side.
        sharing_key: returns the key of a picture; pictures with equal keys may share a call.
    """

    def __init__(
        self,
        ready: deque[Picture],
        tuning: Tuning,
        native: Resolution,
        slots: int,
        sharing_key: Callable[[Picture], Hashable],
    ) -> None:
        self._ready = ready
        self._tuning = tuning
        self._native = native
        self._slots = slots
        self._sharing_key = sharing_key

    def take(self, in_flight: Sequence[Call], free: int, *, counts_encodes: bool) -> list[list[Row]]:
        """Return the rows of the next call, or of one call for each row of a picture. Requires a ready picture.

        Args:
            in_flight: the calls that run now.
            free: slots without a call.
            counts_encodes: whether a picture that is being encoded will be ready within about a step.

        Returns:
            The rows of each call; no call if a picture is to have all slots and some are busy.
        """
        head = self._choose_head()
        takes_all_slots = self._takes_all_slots(head, in_flight, counts_encodes=counts_encodes)
        if takes_all_slots and free < self._slots:
            return []
        self._ready.remove(head)
        rows = self._count_rows(in_flight)
        has_slot_for_each_row = takes_all_slots or rows + head.rows <= self._slots
        if self._tuning.splits and has_slot_for_each_row and 1 < head.rows <= free:
            started = [head]
            calls = [[Row(head, condition, head.index)] for condition in head.conditions]
        else:
            started = self._group(head, rows)
            calls = [
                [Row(picture, condition, picture.index) for picture in started for condition in picture.conditions]
            ]
        for waiting in self._ready:
            waiting.overtakes += sum(_is_far_shorter(picture, waiting) for picture in started)
        return calls

    def _choose_head(self) -> Picture:
        """Return the head of the queue, or the first picture that may overtake it."""
        head = self._ready[0]
        if head.overtakes < MAX_OVERTAKES:
            return next((picture for picture in self._ready if _is_far_shorter(picture, head)), head)
        return head

    def _takes_all_slots(self, head: Picture, in_flight: Sequence[Call], *, counts_encodes: bool) -> bool:
        """Return whether a long picture and a far shorter one take turns with all slots, instead of one slot each.

        Each is then as fast as alone. Only where one picture fills the slots and there are no others: with rows of many
        pictures, shared calls are faster.
        """
        if not self._tuning.splits or head.rows < self._slots or self._count_rows(in_flight) > 2 * self._slots:
            return False
        kinds = {"encode", "denoise"} if counts_encodes else {"denoise"}
        running = [picture for call in in_flight if call.kind in kinds for picture in call.pictures]
        present = [*self._ready, *running]
        return any(_is_far_shorter(one, other) for one in present for other in present)

    def _count_rows(self, in_flight: Sequence[Call]) -> int:
        """Return the rows of all pictures that are ready or in a denoising call."""
        in_calls = sum(len(call.rows) for call in in_flight if call.kind == "denoise")
        return in_calls + sum(picture.rows for picture in self._ready)

    def _group(self, head: Picture, other_rows: int) -> list[Picture]:
        """Take the pictures that share a call with `head`, in order, and return them with it.

        Args:
            head: the first picture of the call.
            other_rows: rows of all other pictures; every slot gets an equal share of all rows.
        """
        group, rows, key = [head], head.rows, self._sharing_key(head)
        most = self._max_rows(head)
        share = min(most, math.ceil((other_rows + head.rows) / self._slots))
        for picture in list(self._ready):
            if rows >= share or not self._may_share(head):
                break
            is_like_head = self._may_share(picture) and self._sharing_key(picture) == key
            if is_like_head and rows + picture.rows <= most:
                self._ready.remove(picture)
                group.append(picture)
                rows += picture.rows
        return group

    def _may_share(self, picture: Picture) -> bool:
        """Return whether a picture may share a call: not where a single row has other bits beside another row."""
        return not picture.is_solo and (self._tuning.splits or picture.rows > 1)

    def _max_rows(self, picture: Picture) -> int:
        """Return the most rows of a call for this picture's size: fewer than measured if it is larger than native."""
        share = self._native.width * self._native.height / (picture.work.width * picture.work.height)
        return max(2, int(self._tuning.rows * min(1.0, share)))


def _is_far_shorter(one: Picture, other: Picture) -> bool:
    return one.steps * OVERTAKE_RATIO <= other.steps
