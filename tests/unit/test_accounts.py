"""Shares of a limited resource: lent while there is room, taken back from those above theirs when there is none."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from ovserve.accounts import FREE_BYTES, GRACE_S, MAX_WAITING, TURNOVER_S, WANTED_S, Account, Holding


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def giving_way(account: Account, client: str, amount: int, ended: list[Holding] | None = None) -> Holding:
    """Return a holding with this amount that gives everything back at once when it is ended."""
    holding = account.open(client)

    def end() -> None:
        if ended is not None:
            ended.append(holding)
        holding.give(holding.amount)

    holding.on_end(end)
    assert holding.take(amount)
    return holding


def test_one_client_may_hold_everything_and_no_more() -> None:
    account = Account(100)
    holding = giving_way(account, "a", 99)
    assert holding.take(1)
    assert not holding.take(1)
    assert not account.open("a").take(1)
    assert (account.used, holding.amount, account.held_by("a")) == (100, 100, 100)


def test_client_within_its_share_takes_from_the_newest_holdings_of_the_one_that_holds_most() -> None:
    account, ended = Account(100), list[Holding]()
    small = giving_way(account, "small", 30, ended)
    large = [giving_way(account, "large", 20, ended) for _ in range(3)]
    assert account.open("new").take(33)
    assert ended == [large[2], large[1]]
    assert (small.amount, account.held_by("large"), account.used) == (30, 20, 83)


def test_client_above_its_share_gets_nothing_when_there_is_no_room() -> None:
    account, ended = Account(100), list[Holding]()
    giving_way(account, "a", 60, ended)
    other = giving_way(account, "b", 40, ended)
    assert not other.take(11)  # the share is 50
    assert ended == []
    assert other.take(10)
    assert len(ended) == 1


def test_clients_within_their_shares_never_give_way() -> None:
    account, ended = Account(90), list[Holding]()
    for client in "abc":
        giving_way(account, client, 30, ended)
    assert not account.open("d").take(30)
    assert not account.open("a").take(1)
    assert ended == []


def test_lent_room_is_taken_without_ending_others_if_asked() -> None:
    account, ended = Account(10), list[Holding]()
    giving_way(account, "a", 10, ended)
    assert not account.open("b").take(5, may_end=False)
    assert ended == []


def test_holding_that_does_not_give_way_in_time_is_waited_for_and_asked_once() -> None:
    account, asked = Account(10), list[str]()
    holding = account.open("a", lambda: asked.append("a"))
    assert holding.take(10)
    assert not account.open("b").take(5, 0.01)
    assert holding.is_ending
    giving = threading.Timer(0.05, holding.give, (10,))
    giving.start()
    assert account.open("b").take(5, 10.0)
    giving.join()
    assert asked == ["a"]


def test_holding_that_gives_a_part_is_asked_again_if_that_is_not_enough() -> None:
    account, given = Account(100), list[int]()
    holding = account.open("a")

    def give_part() -> None:
        holding.keep()
        given.append(20)
        holding.give(20)

    holding.on_end(give_part)
    assert holding.take(100)
    assert account.open("b").take(50, 10.0)
    assert given == [20, 20, 20]
    assert holding.amount == 40


def test_closed_holding_and_one_without_an_end_are_not_ended() -> None:
    account, ended = Account(10), list[Holding]()
    giving_way(account, "a", 5, ended).close()
    assert account.open("a").take(5)
    assert not account.open("b").take(1)
    assert ended == []


def test_reclaim_makes_room_below_the_limit() -> None:
    account, ended = Account(1000), list[Holding]()
    giving_way(account, "a", 10, ended)
    own = account.open("b")
    assert own.reclaim(5, 0.0)
    assert len(ended) == 1
    assert not own.reclaim(5, 0.0)  # no other client holds anything


def test_moved_holding_counts_for_its_new_client() -> None:
    account = Account(10)
    holding = giving_way(account, "proxy", 4)
    holding.move("client")
    assert (account.held_by("proxy"), account.held_by("client"), account.used) == (0, 4, 4)
    assert account.share_of("client") == 10
    assert account.share_of("other") == 5


def test_rate_is_required_of_a_large_old_holding_while_another_client_waits() -> None:
    clock = Clock()
    account = Account(10 * FREE_BYTES, clock)
    large, small = account.open("a"), account.open("a")
    assert large.take(9 * FREE_BYTES)
    assert small.take(FREE_BYTES)
    clock.now += GRACE_S
    assert large.required_rate() == 0.0  # no client waits
    assert not account.open("b").take(FREE_BYTES)
    assert account.is_wanted_by_others("a")
    assert not account.is_wanted_by_others("b")
    assert large.required_rate() == 9 * FREE_BYTES / TURNOVER_S
    assert small.required_rate() == 0.0
    large.give(FREE_BYTES)
    assert large.required_rate() == 8 * FREE_BYTES / TURNOVER_S
    clock.now += WANTED_S
    assert large.required_rate() == 0.0


def test_no_rate_is_required_before_the_grace_or_of_the_client_that_waits() -> None:
    clock = Clock()
    account = Account(10 * FREE_BYTES, clock)
    holding = account.open("a")
    assert holding.take(6 * FREE_BYTES)
    own = account.open("b")
    assert own.take(4 * FREE_BYTES)
    clock.now += GRACE_S - 1
    assert not own.take(FREE_BYTES)
    assert holding.required_rate() == 0.0
    clock.now += 1
    assert holding.required_rate() > 0.0
    assert own.required_rate() == 0.0


def test_remembered_waiting_clients_are_bounded() -> None:
    account = Account(MAX_WAITING * 2, clock=lambda: 0.0)  # no client stops waiting, however long this takes
    holder = account.open("holder")
    assert holder.take(MAX_WAITING * 2)
    for number in range(MAX_WAITING + 10):
        account.open(str(number)).take(1)
    assert len(account._waiting) == MAX_WAITING


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["take", "give", "move"]), st.integers(1, 60)), max_size=60
    )
)
def test_totals_hold_and_no_client_is_pushed_below_its_share(steps: list[tuple[str, str, int]]) -> None:
    account = Account(100)
    holdings: list[Holding] = []
    for client, step, amount in steps:
        before = {each: account.held_by(each) for each in "abcd"}
        if step == "take":
            holding = account.open(client)
            holding.on_end(lambda holding=holding: holding.give(holding.amount))  # type: ignore[misc]
            holdings.append(holding)
            share = account.share_of(client)
            taken = holding.take(amount)
            if before[client] + amount <= share and not taken:
                # Only the part of a share that another client does not hold back in one large holding can be refused.
                assert all(before[each] <= share for each in "abcd" if each != client)
            for other in set("abcd") - {client}:
                assert account.held_by(other) == before[other] or before[other] > share
        elif step == "give" and holdings:
            holding = holdings[amount % len(holdings)]
            holding.give(min(amount, holding.amount))
        elif holdings:
            holdings[amount % len(holdings)].move(client)
        assert account.used == sum(each.amount for each in holdings) <= 100
        assert account.used == sum(account.held_by(each) for each in "abcd")
