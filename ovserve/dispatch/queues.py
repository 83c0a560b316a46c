"""The bounded, fair queue of one model's waiting jobs.

Order: first in, first out for each client; clients take turns. `pop` takes one job from each address in rotation, and
within an address from each of its keys in rotation, so that a client with a hundred jobs delays only its own. Addresses
come first because a key need not be verified: a client that sends a new key with each job would otherwise get a turn
for each job. Keys still count, because behind a reverse proxy every client has the proxy's address.

Admission: the last places of the queue are kept for clients that have few jobs in it, so that one client cannot fill
it. An address may add a job while it has fewer than `_SHARE` times the places still free (the dynamic threshold of
Choudhury and Hahne, 1998), and a key while it has fewer than `_SHARE` times the jobs that its address may still add.
One address can thus fill eight ninths of a long queue, one key eight ninths of that, and either can fill a queue of up
to eight places.

Jobs requeued after a worker died (`requeue`) precede all others and do not count against the limit: they were admitted
before.

Thread-safe: no; the dispatcher's lock guards it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ovserve.dispatch.jobs import Client, Job
from ovserve.wire.blobs import Segment

__all__ = ["FairQueue", "Ticket"]

_SHARE = 8  # an address may have this many times the free places; a higher value keeps fewer places for others


@dataclass(slots=True, eq=False)
class Ticket:
    """An admitted job with the dispatcher's bookkeeping.

    Attributes:
        job: the job.
        request: id of the blob storage with the ImageRequest.
        failed_attempts: how many workers died after they had read the job.
        run_position: position of its Run command in the commands of its current worker.
        granted: segments granted to its current worker, by (picture, partial); None: announced, or refused.
        allocating: Needs of its current worker whose segments are still being created.
        posted: the (picture, partial) pairs already posted to the handler, over all workers: each is posted once.
        cancelled_at: monotonic instant at which its worker was sent the cancellation; 0 if it was not.
    """

    job: Job
    request: str
    failed_attempts: int = 0
    run_position: int = 0
    granted: dict[tuple[int, int], Segment | None] = field(default_factory=dict)
    allocating: int = 0
    posted: set[tuple[int, int]] = field(default_factory=set)
    cancelled_at: float = 0.0

    @property
    def must_run_alone(self) -> bool:
        """Whether no other job may run beside it: a worker has died with it."""
        return self.failed_attempts > 0

    @property
    def unfinished(self) -> int:
        """Pictures that its worker has still to produce; 1 when only the end of the job is outstanding."""
        return 1 if self.job.is_settled else max(1, self.job.request.n - len(self.job.results))


def _any_address(_: str) -> bool:
    return True


class _Address:
    """Waiting tickets of one address: keys take turns, each key is first in, first out."""

    __slots__ = ("_keys", "_size")

    def __init__(self) -> None:
        self._keys: OrderedDict[str, OrderedDict[Job, Ticket]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Ticket]:
        for waiting in self._keys.values():
            yield from waiting.values()

    def in_turn(self) -> Iterator[Ticket]:
        """Yield the tickets in the order in which `pop` would return them."""
        keys = deque(iter(waiting.values()) for waiting in self._keys.values())
        while keys:
            waiting = keys.popleft()
            ticket = next(waiting, None)
            if ticket is not None:
                yield ticket
                keys.append(waiting)

    def count_of(self, key: str) -> int:
        return len(self._keys.get(key, ()))

    def push(self, ticket: Ticket) -> None:
        self._keys.setdefault(ticket.job.client.key, OrderedDict())[ticket.job] = ticket
        self._size += 1

    def pop(self) -> Ticket:
        key, waiting = next(iter(self._keys.items()))
        _, ticket = waiting.popitem(last=False)
        self._size -= 1
        if waiting:
            self._keys.move_to_end(key)
        else:
            del self._keys[key]
        return ticket

    def remove(self, job: Job) -> Ticket | None:
        waiting = self._keys.get(job.client.key)
        if waiting is None or (ticket := waiting.pop(job, None)) is None:
            return None
        self._size -= 1
        if not waiting:
            del self._keys[job.client.key]
        return ticket


class FairQueue:
    """Waiting tickets of one model.

    Operations take constant time, except iteration and skipping of requeued jobs and addresses that are not eligible.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._front: deque[Ticket] = deque()
        self._addresses: OrderedDict[str, _Address] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size + len(self._front)

    def __iter__(self) -> Iterator[Ticket]:
        """Iterate over all tickets, in no guaranteed order."""
        yield from self._front
        for waiting in self._addresses.values():
            yield from waiting

    def has_space_for(self, client: Client, free_capacity: int = 0) -> bool:
        """Return whether this client may add one more job.

        Args:
            client: the job's client.
            free_capacity: jobs that the workers can take at once; so many queued jobs do not count against the limit.
        """
        free = self.limit + free_capacity - len(self)
        waiting = self._addresses.get(client.address)
        by_address, by_key = (len(waiting), waiting.count_of(client.key)) if waiting else (0, 0)
        # Each job that an address adds takes one from `free` and adds one to `by_address`: it may add this many
        # (rounded up).
        addable = -((by_address - _SHARE * free) // (_SHARE + 1))
        return by_key < _SHARE * addable

    def push(self, ticket: Ticket) -> None:
        """Add a job after its client's other jobs. The caller has checked `has_space_for`."""
        self._addresses.setdefault(ticket.job.client.address, _Address()).push(ticket)
        self._size += 1

    def requeue(self, ticket: Ticket) -> None:
        """Put a dispatched job back before all others except those requeued earlier."""
        self._front.append(ticket)

    def first_requeued(self) -> Ticket | None:
        """Return the oldest requeued ticket, or None. Requeued jobs precede all others."""
        return self._front[0] if self._front else None

    def pop_requeued(self) -> Ticket:
        """Remove and return the oldest requeued ticket. Raises IndexError when there is none."""
        return self._front.popleft()

    def pop_shared(self, is_eligible: Callable[[str], bool] = _any_address) -> Ticket | None:
        """Remove and return the next ticket that may run beside others: a requeued one first, then `pop`."""
        for ticket in self._front:  # at most the jobs of a few dead workers
            if not ticket.must_run_alone:
                self._front.remove(ticket)
                return ticket
        return self.pop(is_eligible)

    def pop(self, is_eligible: Callable[[str], bool] = _any_address) -> Ticket | None:
        """Remove and return the next ticket that was not requeued: the oldest of the next key of the next address.

        An address that is not eligible is passed over and keeps its turn.

        Args:
            is_eligible: whether a job of this address may be taken now.
        """
        address = next(filter(is_eligible, self._addresses), None)
        if address is None:
            return None
        waiting = self._addresses[address]
        ticket = waiting.pop()
        if waiting:
            self._addresses.move_to_end(address)
        else:
            del self._addresses[address]
        self._size -= 1
        return ticket

    def ahead_of(self, job: Job) -> int | None:
        """Return how many of the queued jobs precede this one if every address is eligible; None if it is not queued.

        Takes time in proportion to the length of the queue.
        """
        for number, requeued in enumerate(self._front):
            if requeued.job is job:
                return number
        addresses = deque(waiting.in_turn() for waiting in self._addresses.values())
        number = len(self._front)
        while addresses:
            waiting = addresses.popleft()
            ticket = next(waiting, None)
            if ticket is None:
                continue
            if ticket.job is job:
                return number
            number += 1
            addresses.append(waiting)
        return None

    def remove(self, job: Job) -> Ticket | None:
        """Remove a job wherever it is in the queue and return its ticket; None when it is not queued."""
        waiting = self._addresses.get(job.client.address)
        if waiting is not None and (ticket := waiting.remove(job)) is not None:
            if not waiting:
                del self._addresses[job.client.address]
            self._size -= 1
            return ticket
        for ticket in self._front:  # at most the jobs of a few dead workers
            if ticket.job is job:
                self._front.remove(ticket)
                return ticket
        return None
