"""The jobs that wait for one model: bounded, first in first out for each client, clients in turn.

A client with a hundred jobs waits behind its own, not in front of others: `pop` takes one job from each address in rotation,
and of an address from each of its keys in rotation. Addresses come first because a key need not be verified: a new one
for each job would else be a turn for each job. Keys still count, for behind a reverse proxy every client has the proxy's address.

The last places of a queue are kept for those that hold few of them, so that nobody can lock the others out either: an address
may add a job while it holds fewer than `_SHARE` times the places still free (the dynamic threshold of Choudhury and Hahne,
1998), and a key while it holds fewer than `_SHARE` times what its address may still add. An address can so fill eight ninths
of a long queue, one key eight ninths of that, and either all of a queue of up to eight.

Jobs given back by a dead worker stand before everybody (`requeue`) and beyond the limit: they were admitted once already.

Thread-safe: no; the dispatcher's lock guards it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ovserve.dispatch.jobs import Client, Job
from ovserve.wire.local.spool import Segment

__all__ = ["FairQueue", "Ticket"]

_SHARE = 8  # an address may hold this many times the free places; higher keeps fewer of them for others


@dataclass(slots=True, eq=False)
class Ticket:
    """A job with what the dispatcher notes about it.

    Attributes:
        request: path of the segment with the ImageRequest.
        deaths: workers that died with it, having read it.
        given_at: where its Run begins among the bytes given to the worker that has it now.
        announced: the segments made for the worker that has it now, by (picture, partial).
        posted: which (picture, partial) the handler has been told of, over all workers: each is told once.
        cancelled_at: when its worker was told to stop it, a monotonic instant; 0: it was not.
    """

    job: Job
    request: str
    deaths: int = 0
    given_at: int = 0
    announced: dict[tuple[int, int], Segment] = field(default_factory=dict)
    posted: set[tuple[int, int]] = field(default_factory=set)
    cancelled_at: float = 0.0

    @property
    def is_alone(self) -> bool:
        """Whether it runs with no neighbours: a worker has died with it."""
        return self.deaths > 0

    @property
    def unfinished(self) -> int:
        """Pictures that its worker has still to make; 1 where only the end is still to come."""
        return 1 if self.job.is_settled else max(1, self.job.request.n - len(self.job.results))


def _anybody(_: str) -> bool:
    return True


class _Address:
    """Waiting tickets of one address: its keys in turn, each key's first in first out."""

    __slots__ = ("_keys", "_size")

    def __init__(self) -> None:
        self._keys: OrderedDict[str, OrderedDict[Job, Ticket]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Ticket]:
        for waiting in self._keys.values():
            yield from waiting.values()

    def held_by(self, key: str) -> int:
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

    Every operation but iteration takes constant time, and that of the jobs given back and of the addresses that are passed over.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._front: deque[Ticket] = deque()
        self._addresses: OrderedDict[str, _Address] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size + len(self._front)

    def __iter__(self) -> Iterator[Ticket]:
        """Every ticket, in no promised order."""
        yield from self._front
        for waiting in self._addresses.values():
            yield from waiting

    def has_space_for(self, client: Client, free_workers: int = 0) -> bool:
        """Whether this client may add one more job. `free_workers`: how many of those here do not wait, but are on their way."""
        free = self.limit + free_workers - len(self)
        waiting = self._addresses.get(client.address)
        held, held_by_key = (len(waiting), waiting.held_by(client.key)) if waiting else (0, 0)
        # Each job that an address adds takes one from `free` and adds one to what it holds: this many it may add, rounded up.
        addable = -((held - _SHARE * free) // (_SHARE + 1))
        return held_by_key < _SHARE * addable

    def push(self, ticket: Ticket) -> None:
        """Add a job behind its client's others. The caller has asked `has_space_for`."""
        self._addresses.setdefault(ticket.job.client.address, _Address()).push(ticket)
        self._size += 1

    def requeue(self, ticket: Ticket) -> None:
        """Give a job back: it is the next but for those given back before it."""
        self._front.append(ticket)

    def first_requeued(self) -> Ticket | None:
        """The next of those given back; they come before all others."""
        return self._front[0] if self._front else None

    def pop_requeued(self) -> Ticket:
        """Take the next of those given back. Raises IndexError when there is none."""
        return self._front.popleft()

    def pop_shared(self, may_have: Callable[[str], bool] = _anybody) -> Ticket | None:
        """Take the next job that may run beside others: of those given back, then of the addresses that `may_have` one taken."""
        for ticket in self._front:  # at most the jobs of a few dead workers
            if not ticket.is_alone:
                self._front.remove(ticket)
                return ticket
        return self.pop(may_have)

    def pop(self, may_have: Callable[[str], bool] = _anybody) -> Ticket | None:
        """Take the next ordinary job: the oldest of the key whose turn it is, of the address whose turn it is.

        An address that may have no place now is passed over, and keeps its turn.
        """
        address = next(filter(may_have, self._addresses), None)
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

    def remove(self, job: Job) -> Ticket | None:
        """Take this job out wherever it stands; None when it does not wait here."""
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
