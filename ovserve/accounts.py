"""Accounts: how much of one limited resource each client holds, and which client gives way to another.

    Account   one resource with a limit: bytes of the spool, connections
    client    an address, an IPv6 /64 or a verified API key
    Holding   what one exchange or one connection of a client holds

Rules:
- While there is room, a client may take any amount: what the others do not use is lent.
- A client's share is the limit divided by the number of clients that hold something or wait for it.
- Without room, a client that stays within its share makes those above theirs give way: of the client that holds most,
  the newest holding is ended, until there is room. A client within its share is never made to give way.
- Without room, a client that would exceed its share gets nothing.
- While another client waits, a holding of more than `FREE_BYTES` that is older than `GRACE_S` has to make progress in
  proportion to what it holds (`Holding.required_rate`).

An account only counts. Whatever allocates the resource takes from a holding before, and gives back after it has freed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Account", "Holding"]

WANTED_S = 10.0  # for so long a client that found no room counts as waiting: it will try again
MAX_WAITING = 4096  # clients remembered as waiting; then the one that has waited longest is forgotten
GRACE_S = 30.0  # without a required rate: most exchanges end within this time
FREE_BYTES = 1 << 20  # without a required rate: what an ordinary edit holds
TURNOVER_S = 120.0  # in which a slow client has to transfer as much as it holds, while another one waits


class Holding:
    """What one exchange or connection holds. Thread-safe: yes, by the account's lock.

    Attributes:
        client: whose share it counts for; changed by `move`.
        amount: what it holds now.
        is_ending: it was made to give way.
    """

    __slots__ = ("_account", "_end", "_opened_at", "amount", "client", "is_ending")

    def __init__(self, account: Account, client: str, end: Callable[[], None] | None) -> None:
        self._account = account
        self._end = end
        self._opened_at = account.now()
        self.client = client
        self.amount = 0
        self.is_ending = False

    @property
    def can_end(self) -> bool:
        """Whether it can be made to give way."""
        return self._end is not None and not self.is_ending

    def end(self) -> None:
        """Make the holder give way. It gives back what it holds, soon and in its own thread."""
        end = self._end
        if end is not None:
            end()

    def on_end(self, end: Callable[[], None]) -> None:
        """Set what makes the holder give way, if it is known only after `open`."""
        self._end = end

    def take(self, amount: int, wait_s: float = 0.0, *, may_end: bool = True) -> bool:
        """Take more; return False if there is no room.

        Args:
            amount: how much more.
            wait_s: how long to wait for clients above their shares that were made to give way.
            may_end: whether to make them give way.
        """
        return self._account.take(self, amount, wait_s, may_end=may_end)

    def reclaim(self, amount: int, wait_s: float) -> bool:
        """Make clients above their shares give way although the limit is not reached; return whether they did in time.

        For a resource that has run out below its limit: a file system that other programs use too.
        """
        return self._account.reclaim(self, amount, wait_s)

    def give(self, amount: int) -> None:
        """Give back a part."""
        self._account.give(self, amount)

    def keep(self) -> None:
        """Note that the holder gives back a part and goes on: it can be made to give way again."""
        self.is_ending = False

    def move(self, client: str) -> None:
        """Make it count for the share of another client."""
        if client != self.client:
            self._account.move(self, client)

    def close(self) -> None:
        """End the exchange: it can no longer be made to give way. What it still holds counts until it is given back."""
        self._end = None

    def required_rate(self) -> float:
        """Return the bytes a second that its client has to transfer now; 0 for none."""
        if self.amount <= FREE_BYTES or self._account.now() - self._opened_at < GRACE_S:
            return 0.0
        if not self._account.is_wanted_by_others(self.client):
            return 0.0
        return self.amount / TURNOVER_S


class Account:
    """The holdings of all clients in one resource. Thread-safe: yes, one lock.

    Holders are made to give way outside the lock, in the thread of the client that needs the room.

    Args:
        limit: how much there is of the resource.
        clock: a monotonic clock, in seconds.

    Attributes:
        used: what all clients hold together.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.now = clock
        self.used = 0
        self._changed = threading.Condition()
        self._holdings: dict[str, dict[Holding, None]] = {}  # by client: those that hold something, the newest last
        self._totals: dict[str, int] = {}  # what each of these clients holds
        self._waiting: dict[str, float] = {}  # clients that found no room, with the time at which they no longer count

    def open(self, client: str, end: Callable[[], None] | None = None) -> Holding:
        """Return a holding with nothing in it.

        Args:
            client: whose share it counts for.
            end: makes the holder give way; called in any thread, once, or once more after `keep`. None: it never does.
        """
        return Holding(self, client, end)

    def held_by(self, client: str) -> int:
        """Return what one client holds."""
        with self._changed:
            return self._totals.get(client, 0)

    def share_of(self, client: str) -> int:
        """Return a client's share now."""
        with self._changed:
            return self._share(client, self.limit)

    def is_wanted_by_others(self, client: str) -> bool:
        """Return whether another client has found no room lately."""
        if not self._waiting:
            return False
        with self._changed:
            now = self.now()
            return any(each != client and until > now for each, until in self._waiting.items())

    def take(self, holding: Holding, amount: int, wait_s: float, *, may_end: bool) -> bool:
        """Do what `Holding.take` describes."""
        deadline = self.now() + wait_s
        while True:
            with self._changed:
                if self.used + amount <= self.limit:
                    self._add(holding, amount)
                    return True
                victims = self._choose(holding, amount, self.limit) if may_end else None
            if victims is None:
                return False
            for victim in victims:
                victim.end()
            # When all of them have given back, and it is not enough, others are chosen.
            if not self._wait_for(lambda: self.used + amount <= self.limit or not self._ending(), deadline):
                return False

    def reclaim(self, holding: Holding, amount: int, wait_s: float) -> bool:
        """Do what `Holding.reclaim` describes."""
        with self._changed:
            used = self.used
            victims = self._choose(holding, amount, used)
        if victims is None:
            return False
        for victim in victims:
            victim.end()
        return self._wait_for(lambda: self.used + amount <= used, self.now() + wait_s)

    def give(self, holding: Holding, amount: int) -> None:
        """Do what `Holding.give` describes."""
        with self._changed:
            self._add(holding, -amount)
            self._changed.notify_all()

    def move(self, holding: Holding, client: str) -> None:
        """Do what `Holding.move` describes."""
        with self._changed:
            amount = holding.amount
            self._add(holding, -amount)
            holding.client = client
            self._add(holding, amount)

    def _wait_for(self, is_so: Callable[[], bool], deadline: float) -> bool:
        with self._changed:
            return self._changed.wait_for(is_so, max(0.0, deadline - self.now()))

    def _add(self, holding: Holding, amount: int) -> None:
        holding.amount += amount
        self.used += amount
        client = holding.client
        own = self._holdings.setdefault(client, {})
        self._totals[client] = self._totals.get(client, 0) + amount
        if amount > 0:
            self._waiting.pop(client, None)
        if holding.amount:
            own.setdefault(holding)
        else:
            own.pop(holding, None)
        if not own:
            del self._holdings[client], self._totals[client]

    def _share(self, client: str, limit: int) -> int:
        now = self.now()
        clients = self._holdings.keys() | {each for each, until in self._waiting.items() if until > now} | {client}
        return limit // len(clients)

    def _ending(self) -> int:
        """Return what the holdings hold that were made to give way."""
        return sum(each.amount for own in self._holdings.values() for each in own if each.is_ending)

    def _choose(self, holding: Holding, amount: int, limit: int) -> list[Holding] | None:
        """Return the holdings to end so that there is room, and none if enough are ending.

        None if the client would exceed its share, or no other client can give way.
        """
        share = self._share(holding.client, limit)
        if self._totals.get(holding.client, 0) + amount > share:
            return None
        self._note_waiting(holding.client)
        ending = self._ending()
        missing = self.used + amount - limit - ending
        chosen: list[Holding] = []
        left = {
            client: sum(each.amount for each in own if not each.is_ending) for client, own in self._holdings.items()
        }
        left.pop(holding.client, None)
        while missing > 0 and left:
            client = max(left, key=lambda each: left[each])
            victim = next((each for each in reversed(self._holdings[client]) if each.can_end), None)
            if left[client] <= share or victim is None:
                del left[client]
                continue
            victim.is_ending = True
            chosen.append(victim)
            left[client] -= victim.amount
            missing -= victim.amount
        return chosen if chosen or ending else None

    def _note_waiting(self, client: str) -> None:
        now = self.now()
        if len(self._waiting) >= MAX_WAITING:
            self._waiting = {each: until for each, until in self._waiting.items() if until > now}
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.pop(next(iter(self._waiting)))
        self._waiting[client] = now + WANTED_S
