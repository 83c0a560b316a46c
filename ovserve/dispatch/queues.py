"""The bounded, fair queue of one model's waiting jobs.

Order: first in, first out for each client; clients take turns. `take` takes one job from each address in rotation, and
within an address from each of its keys in rotation, so that a client with a hundred jobs delays only its own. Addresses
come first because a key need not be verified: a client that sends a new key with each job would otherwise get a turn
for each job. Keys still count, because behind a reverse proxy every client has the proxy's address.

Admission: the last places of the queue are kept for clients that have few jobs in it, so that one client cannot fill
it. An address may add a job while it has fewer than `_SHARE` times the places still free (the dynamic threshold of
Choudhury and Hahne, 1998), and a key while it has fewer than `_SHARE` times the jobs that its address may still add.
One address can thus fill eight ninths of a long queue, one key eight ninths of that, and either can fill a queue of up
to eight places.

Jobs that come back from a dead worker (`requeue`) precede the other jobs of their address, and do not count against the
limit: they were admitted before. If the worker had read the job, which may be what killed it, its address goes to the
end of the rotation: behind the jobs of other clients that wait now. Otherwise the address keeps the turn that it had.

Thread-safe: no; the dispatcher's lock guards it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
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
        is_prepared: its current worker has reported Prepared.
        granted: segments granted to its current worker, by (picture, partial); None: announced, or refused.
        allocating: Needs of its current worker whose segments are still being created.
        posted: the (picture, partial) pairs already posted to the handler, over all workers: each is posted once.
        cancelled_at: monotonic instant at which its worker was sent the cancellation; 0 if it was not.
    """

    job: Job
    request: str
    failed_attempts: int = 0
    run_position: int = 0
    is_prepared: bool = False
    granted: dict[tuple[int, int], Segment | None] = field(default_factory=dict)
    allocating: int = 0
    posted: set[tuple[int, int]] = field(default_factory=set)
    cancelled_at: float = 0.0

    @property
    def address(self) -> str:
        """The address of its client."""
        return self.job.client.address

    @property
    def is_heavy(self) -> bool:
        """Whether preparing it takes long."""
        return self.job.request.is_heavy

    @property
    def must_run_alone(self) -> bool:
        """Whether no other job may run beside it: a worker has died with it."""
        return self.failed_attempts > 0

    @property
    def unfinished(self) -> int:
        """Pictures that its worker has still to produce; 1 when only the end of the job is outstanding."""
        return 1 if self.job.is_settled else max(1, self.job.request.n - len(self.job.results))


class _Address:
    """Waiting tickets of one address: requeued ones first, then keys take turns, each key first in, first out."""

    __slots__ = ("_keys", "_requeued", "size")

    def __init__(self) -> None:
        self._requeued: OrderedDict[Job, Ticket] = OrderedDict()
        self._keys: OrderedDict[str, OrderedDict[Job, Ticket]] = OrderedDict()
        self.size = 0  # without the requeued ones

    def __bool__(self) -> bool:
        return bool(self.size or self._requeued)

    def __iter__(self) -> Iterator[Ticket]:
        yield from self._requeued.values()
        for waiting in self._keys.values():
            yield from waiting.values()

    def in_turn(self) -> Iterator[Ticket]:
        """Yield the tickets in the order in which they would be taken."""
        keys = OrderedDict((key, iter(waiting.values())) for key, waiting in self._keys.items())
        for ticket in self._requeued.values():
            yield ticket
            if ticket.job.client.key in keys:
                keys.move_to_end(ticket.job.client.key)
        while keys:
            key, waiting = next(iter(keys.items()))
            if (head := next(waiting, None)) is None:
                del keys[key]
            else:
                yield head
                keys.move_to_end(key)

    def count_of(self, key: str) -> int:
        return len(self._keys.get(key, ()))

    def push(self, ticket: Ticket) -> None:
        self._keys.setdefault(ticket.job.client.key, OrderedDict())[ticket.job] = ticket
        self.size += 1

    def requeue(self, ticket: Ticket) -> None:
        self._requeued[ticket.job] = ticket
        self._requeued.move_to_end(ticket.job, last=ticket.must_run_alone)

    def remove(self, job: Job) -> Ticket | None:
        """Remove a job and return its ticket, or None if it does not wait here."""
        if (ticket := self._requeued.pop(job, None)) is not None:
            return ticket
        waiting = self._keys.get(job.client.key)
        if waiting is None or (ticket := waiting.pop(job, None)) is None:
            return None
        self.size -= 1
        if not waiting:
            del self._keys[job.client.key]
        return ticket

    def end_turn(self, key: str) -> None:
        if key in self._keys:
            self._keys.move_to_end(key)


class FairQueue:
    """Waiting tickets of one model. Operations take constant time, except iteration."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._addresses: OrderedDict[str, _Address] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Ticket]:
        """Iterate over all tickets, in no guaranteed order."""
        for waiting in self._addresses.values():
            yield from waiting

    def heads(self) -> Iterator[Ticket]:
        """Iterate over the next ticket of each address, in the order of their turns."""
        for waiting in self._addresses.values():
            yield next(iter(waiting))

    def has_space_for(self, client: Client, free_capacity: int = 0) -> bool:
        """Return whether this client may add one more job.

        Args:
            client: the job's client.
            free_capacity: jobs that the workers can take at once; so many queued jobs do not count against the limit.
        """
        free = self.limit + free_capacity - len(self)
        waiting = self._addresses.get(client.address)
        by_address, by_key = (waiting.size, waiting.count_of(client.key)) if waiting else (0, 0)
        # Each job that an address adds takes one from `free` and adds one to `by_address`: it may add this many
        # (rounded up).
        addable = -((by_address - _SHARE * free) // (_SHARE + 1))
        return by_key < _SHARE * addable

    def push(self, ticket: Ticket) -> None:
        """Add a job after its client's other jobs. The caller has checked `has_space_for`."""
        self._addresses.setdefault(ticket.address, _Address()).push(ticket)
        self._size += 1

    def requeue(self, ticket: Ticket) -> None:
        """Put a dispatched job back before the other jobs of its address.

        Of the jobs that one worker had not read, the last one comes first.
        """
        self._addresses.setdefault(ticket.address, _Address()).requeue(ticket)
        self._addresses.move_to_end(ticket.address, last=ticket.must_run_alone)
        self._size += 1

    def take(self, ticket: Ticket) -> None:
        """Remove one of `heads`, to dispatch it: its address and its key go to the end of their rotations."""
        self.remove(ticket.job)
        if waiting := self._addresses.get(ticket.address):
            waiting.end_turn(ticket.job.client.key)
            self._addresses.move_to_end(ticket.address)

    def ahead_of(self, job: Job) -> int | None:
        """Return how many of the queued jobs precede this one if every address is eligible; None if it is not queued.

        Takes time in proportion to the length of the queue.
        """
        addresses = deque(waiting.in_turn() for waiting in self._addresses.values())
        number = 0
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
        if waiting is None or (ticket := waiting.remove(job)) is None:
            return None
        if not waiting:
            del self._addresses[job.client.address]
        self._size -= 1
        return ticket
