"""The residency policy by a clock: what is loaded, what is unloaded, and what waits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.fleet.residency import GROW_S, SHRINK_S, Decision, Limits, ModelView, Residency
from ovserve.settings.options import ModelSettings

GIB = 1 << 30
FOREVER = 1e9


def model(name: str, **options: Any) -> ModelSettings:
    return ModelSettings(name=name, **{"load": "lazy", **options})


class World:
    """Models whose workers are ready `load_s` after they were asked for, and gone at once after they are not wanted."""

    def __init__(self, *models: ModelSettings, budget: int = 0, min_resident_s: float = 5.0, load_s: float = 1.0):
        self.now = 100.0
        self.limits = Limits(budget * GIB, 0, min_resident_s)
        self.load_s = load_s
        self.policy = Residency()
        self.policy.configure(models)
        self.models = {each.name: each for each in models}
        self.queued = dict.fromkeys(self.models, 0)
        self.running = dict.fromkeys(self.models, 0)
        self.used_at = dict.fromkeys(self.models, 0.0)
        self.keep_alive_s: dict[str, float | None] = dict.fromkeys(self.models)
        self.begun: dict[str, float] = {}
        self.used: dict[str, int] = {}  # measured bytes of a model, where they are not what was expected
        self.expected = dict.fromkeys(self.models, GIB)
        self.placed: dict[str, dict[str, int]] = {}  # bytes of a model on devices
        self.failed: set[str] = set()  # models whose workers do not start
        self.loads: list[str] = []
        self.decision = Decision({})

    def views(self) -> list[ModelView]:
        return [
            ModelView(
                options=options,
                queued=self.queued[name],
                running=self.running[name],
                last_used_at=self.used_at[name],
                processes=int(name in self.begun and name not in self.failed),
                is_failed=name in self.failed,
                ready=self.decision.workers.get(name, 0) * self.is_ready(name),
                capacity=2 * self.decision.workers.get(name, 0) * self.is_ready(name),
                used_bytes=self.used.get(name, self.expected[name] * max(1, self.decision.workers.get(name, 0)))
                if name in self.begun and name not in self.failed
                else 0,
                worker_bytes=self.expected[name],
                keep_alive_s=self.keep_alive_s[name],
                device_bytes=self.placed.get(name, {}),
            )
            for name, options in self.models.items()
        ]

    def is_ready(self, name: str) -> bool:
        return name in self.begun and name not in self.failed and self.now - self.begun[name] >= self.load_s

    def step(self, seconds: float = 0.0) -> Decision:
        self.now += seconds
        self.decision = self.policy.decide(self.now, self.views(), self.limits)
        for name, count in self.decision.workers.items():
            if count and name not in self.begun:
                self.begun[name] = self.now
                self.loads.append(name)
            elif not count:
                self.begun.pop(name, None)
        return self.decision

    def run(self, seconds: float, tick_s: float = 0.25) -> None:
        for _ in range(int(seconds / tick_s)):
            self.step(tick_s)

    def ask(self, name: str, jobs: int = 1) -> None:
        self.queued[name] += jobs
        self.used_at[name] = self.now

    def finish(self, name: str) -> None:
        self.queued[name] = self.running[name] = 0
        self.used_at[name] = self.now

    @property
    def resident(self) -> set[str]:
        return {name for name, count in self.decision.workers.items() if count}


# --- without a budget ---------------------------------------------------------------------------------------------


def test_eager_models_are_loaded_at_once_and_lazy_ones_with_a_request() -> None:
    world = World(model("a", load="eager"), model("b"))
    world.step()
    assert world.resident == {"a"}
    world.ask("b")
    world.step()
    assert world.resident == {"a", "b"}


@pytest.mark.parametrize(("keep_alive_s", "stays_s"), [(0.0, 0.0), (30.0, 29.0), (None, 299.0), (-1.0, FOREVER)])
def test_lazy_model_is_unloaded_after_its_keep_alive_time(keep_alive_s: float | None, stays_s: float) -> None:
    world = World(model("a", keep_alive_s=keep_alive_s))
    world.ask("a")
    world.run(2)
    world.finish("a")
    if stays_s:
        world.step(stays_s)
        assert world.resident == {"a"}
    if stays_s < FOREVER:
        world.step(1.5)
        assert world.resident == set()


def test_eager_model_stays_for_ever_unless_it_has_a_keep_alive_time() -> None:
    world = World(model("a", load="eager"), model("b", load="eager", keep_alive_s=10.0))
    world.run(2)
    world.step(FOREVER)
    assert world.resident == {"a"}


def test_unloaded_model_whose_last_job_still_runs_is_not_loaded_again() -> None:
    world = World(model("a", keep_alive_s=-1.0))
    world.ask("a")
    world.run(2)
    world.queued["a"], world.running["a"] = 0, 1
    world.policy.unload("a")
    world.run(2)
    assert world.resident == set()
    world.ask("a")
    world.step()
    assert world.resident == {"a"}


def test_model_with_jobs_is_never_idle() -> None:
    world = World(model("a", keep_alive_s=0.0))
    world.ask("a")
    world.run(2)
    world.queued["a"], world.running["a"] = 0, 1
    world.step(FOREVER)
    assert world.resident == {"a"}


def test_load_whose_clients_have_gone_is_finished() -> None:
    world = World(model("a", keep_alive_s=0.0), load_s=5.0)
    world.ask("a")
    world.run(1)
    world.finish("a")
    world.run(3)
    assert world.resident == {"a"}
    world.run(3)
    assert world.resident == set()


def test_keep_alive_of_a_request_holds_until_the_model_is_unloaded() -> None:
    world = World(model("a", keep_alive_s=100.0))
    world.ask("a")
    world.run(2)
    world.finish("a")
    world.keep_alive_s["a"] = 5.0
    world.step(6.0)
    assert world.resident == set()
    world.keep_alive_s["a"] = None  # the next request does not say
    world.ask("a")
    world.run(2)
    world.finish("a")
    world.step(50.0)
    assert world.resident == {"a"}


def test_keep_alive_of_a_request_does_not_unload_a_pinned_model() -> None:
    world = World(model("a", load="eager"))
    world.run(2)
    world.keep_alive_s["a"] = 0.0
    world.step(FOREVER)
    assert world.resident == {"a"}


def test_operator_chooses_how_long_a_model_stays() -> None:
    world = World(model("a", keep_alive_s=1.0))
    world.policy.load("a", float("inf"))
    world.run(2)
    world.step(FOREVER)
    assert world.resident == {"a"}


def test_reload_loads_a_model_that_becomes_eager_and_touches_no_other() -> None:
    world = World(model("a"), model("b"))
    world.ask("b")
    world.run(2)
    world.finish("b")
    world.policy.configure([model("a", load="eager"), model("b"), model("c")])
    world.models["a"] = model("a", load="eager")
    world.step()
    assert world.resident == {"a", "b"}
    assert world.loads == ["b", "a"]


def test_automatic_replicas_follow_the_queue() -> None:
    world = World(model("a", replicas=0, max_replicas=3))
    world.ask("a", 10)
    world.run(2)
    assert world.decision.workers["a"] == 1
    world.run(GROW_S + 1)
    assert world.decision.workers["a"] == 2
    world.run(10 * GROW_S)
    assert world.decision.workers["a"] == 3
    world.finish("a")
    world.running["a"] = 3  # two workers are enough
    world.run(SHRINK_S + 1)
    assert world.decision.workers["a"] == 2
    world.run(2 * SHRINK_S)
    assert world.decision.workers["a"] == 2
    world.running["a"] = 0
    world.run(SHRINK_S + 1)
    assert world.decision.workers["a"] == 1


def test_fixed_replicas_do_not_follow_the_queue() -> None:
    world = World(model("a", replicas=2))
    world.ask("a", 10)
    world.run(10 * GROW_S)
    assert world.decision.workers["a"] == 2


def test_automatic_replicas_stay_within_the_budget_and_evict_no_model() -> None:
    world = World(model("a", replicas=0, max_replicas=8), model("b", keep_alive_s=-1.0), budget=4)
    world.ask("b")
    world.run(2)
    world.finish("b")
    world.ask("a", 100)
    world.run(20 * GROW_S)
    assert world.decision.workers == {"a": 3, "b": 1}


# --- with a budget ------------------------------------------------------------------------------------------------


def test_least_recently_used_idle_model_makes_room() -> None:
    world = World(*map(model, "abc"), budget=2)
    for name in "abc":
        world.ask(name)
        world.run(7)
        world.finish(name)
    assert world.resident == {"b", "c"}
    world.ask("a")
    world.run(7)
    assert world.resident == {"a", "c"}


def test_pinned_model_is_never_evicted() -> None:
    world = World(model("a", pinned=True), model("b"), model("c"), budget=2)
    for name in "abcbc":
        world.ask(name)
        world.run(8)
        world.finish(name)
        assert "a" in world.resident


def test_idle_model_stays_for_its_minimum_time() -> None:
    world = World(model("a"), model("b"), budget=1, min_resident_s=20.0)
    world.ask("a")
    world.run(2)
    world.finish("a")
    world.ask("b")
    world.run(15)
    assert world.resident == {"a"}
    assert "waits for memory" in world.decision.waiting["b"]
    world.run(6)
    assert world.resident == {"b"}


def test_models_with_unending_requests_take_turns() -> None:
    world = World(*map(model, "abc"), budget=1)
    for name in "abc":
        world.ask(name, 1000)
    world.run(120)
    turns = [world.loads.count(name) for name in "abc"]
    assert min(turns) >= 5
    assert max(turns) - min(turns) <= 1
    assert sum(turns) <= 120 / (5.0 + 1.0) + 1  # each stays for its minimum time: no thrashing


def test_priority_loads_first_and_does_not_starve_the_others() -> None:
    world = World(model("slow"), model("urgent", priority=2), model("resident"), budget=1)
    world.ask("resident")
    world.run(3)
    world.ask("slow", 1000)
    world.run(1)
    world.ask("urgent", 1000)
    world.run(3)
    assert world.resident == {"urgent"}
    world.run(60)
    assert "slow" in world.loads


def test_one_model_loads_at_a_time() -> None:
    world = World(*map(model, "abc"), budget=3, load_s=4.0)
    for name in "abc":
        world.ask(name)
    world.run(1)
    assert len(world.resident) == 1
    world.run(10)
    assert world.resident == {"a", "b", "c"}


def test_model_that_can_never_fit_is_refused_with_the_arithmetic() -> None:
    world = World(model("a", load="eager"), model("b"), budget=2)
    world.run(2)
    world.expected["b"] = 2 * GIB
    world.ask("b")
    world.step()
    assert world.decision.refused["b"] == (
        "it is expected to take 2048 MiB; memory_budget_bytes is 2048 MiB, the server itself takes 0 MiB, "
        "pinned models (a) 1024 MiB"
    )
    assert world.resident == {"a"}


def test_load_that_exceeds_the_budget_is_stopped_and_gets_more_room() -> None:
    world = World(model("a"), model("b"), budget=2, load_s=3.0)
    world.ask("a")
    world.run(6)
    world.running["a"], world.queued["a"] = 1, 0
    world.ask("b")
    world.run(1)
    assert world.resident == {"a", "b"}
    world.used["b"] = int(1.3 * GIB)  # it takes more than its files suggested
    world.step(0.25)
    assert world.resident == {"a"}
    world.finish("a")
    world.run(10)
    assert world.resident == {"b"}


def test_idle_models_are_unloaded_when_a_busy_one_grows_beyond_the_budget() -> None:
    world = World(model("a"), model("b"), budget=2, min_resident_s=FOREVER)
    for name in "ab":
        world.ask(name)
        world.run(2)
    world.finish("a")
    world.used["b"] = int(1.5 * GIB)
    world.step(0.25)
    assert world.resident == {"b"}


def test_eager_models_beyond_the_budget_wait_for_a_request() -> None:
    world = World(*(model(name, load="eager", pinned=False) for name in "abc"), budget=2)
    world.run(10)
    assert world.resident == {"a", "b"}
    world.ask("c")
    world.run(10)
    assert world.resident == {"b", "c"}


def test_operator_loads_and_unloads_a_model() -> None:
    world = World(model("a"), model("b"), budget=1)
    world.policy.load("a")
    world.run(7)
    world.policy.load("b")
    world.run(7)
    assert world.resident == {"b"}
    world.policy.unload("b")
    world.step()
    assert world.resident == set()


@given(
    st.lists(st.integers(1, 3), min_size=2, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.floats(0, 8)), max_size=40),
    st.integers(3, 6),
)
def test_charged_memory_never_exceeds_the_budget_and_every_request_is_served(
    sizes: list[int], events: list[tuple[int, bool, float]], budget: int
) -> None:
    models = [model(f"m{number}", priority=number % 3) for number in range(len(sizes))]
    world = World(*models, budget=budget)
    world.expected = {each.name: size * GIB for each, size in zip(models, sizes, strict=True)}
    for number, is_asked, seconds in events:
        name = f"m{number % len(sizes)}"
        world.ask(name) if is_asked else world.finish(name)
        world.run(seconds)
        assert sum(world.expected[each] for each in world.begun) <= budget * GIB
    served = set()
    for _ in range(400):  # all waiting models become ready in turn
        world.step(0.5)
        assert sum(world.expected[each] for each in world.begun) <= budget * GIB
        served |= {name for name in world.begun if world.is_ready(name)}
    assert served >= {name for name, queued in world.queued.items() if queued}


# --- the memory of devices ---


def on_devices(memory: dict[str, int], *models: ModelSettings, budget: int = 0, **placed: dict[str, int]) -> World:
    """Return a world with devices; memory and what the models take there in GiB."""
    world = World(*models, budget=budget)
    world.limits = Limits(budget * GIB, 0, 5.0, {device: size * GIB for device, size in memory.items()})
    world.placed = {name: {device: size * GIB for device, size in found.items()} for name, found in placed.items()}
    return world


def test_model_is_evicted_from_its_device_for_another_and_only_there() -> None:
    models = [model(name) for name in ("a", "b", "c", "other")]
    world = on_devices(
        {"GPU.0": 8, "GPU.1": 8}, *models, a={"GPU.0": 5}, b={"GPU.0": 2}, c={"GPU.0": 4}, other={"GPU.1": 5}
    )
    for name in ("other", "a", "b"):
        world.ask(name)
        world.run(3)
        world.finish(name)
    world.run(6)
    assert world.resident == {"other", "a", "b"}
    world.ask("c")
    world.run(3)
    assert world.resident == {"other", "b", "c"}  # a is the least recently used that makes room


def test_busy_model_stays_on_its_device_until_its_turn_is_over_and_models_on_the_cpu_do_not_wait() -> None:
    world = on_devices({"GPU.0": 8}, model("a"), model("b"), model("cpu"), a={"GPU.0": 5}, b={"GPU.0": 5})
    world.ask("a")
    world.run(2)
    world.ask("b")
    world.ask("cpu")
    world.step()
    assert world.decision.waiting == {"b": "waits for memory"}
    world.run(2)
    assert world.resident == {"a", "cpu"}
    world.run(10)
    assert world.loads[:3] == ["a", "cpu", "b"]


def test_model_that_does_not_fit_beside_pinned_ones_on_its_device_is_refused_with_the_arithmetic() -> None:
    world = on_devices(
        {"GPU.0": 8}, model("pinned", load="eager", pinned=True), model("b"), pinned={"GPU.0": 5}, b={"GPU.0": 4}
    )
    world.run(3)
    world.ask("b")
    world.step()
    assert world.decision.refused == {
        "b": "its weights take 4096 MiB on GPU.0, which has 8192 MiB, pinned models (pinned) 5120 MiB"
    }


def test_workers_that_never_fit_on_their_device_are_refused() -> None:
    world = on_devices({"GPU.0": 8}, model("a", replicas=2), a={"GPU.0": 5})
    world.ask("a")
    world.step()
    assert world.decision.refused == {"a": "its weights with 2 workers take 10240 MiB on GPU.0, which has 8192 MiB"}


def test_budget_and_device_must_both_have_room() -> None:
    world = on_devices({"GPU.0": 8}, model("a"), model("b"), budget=1, a={"GPU.0": 1}, b={"GPU.0": 1})
    world.ask("a")
    world.run(3)
    world.finish("a")
    world.run(6)
    world.ask("b")
    world.run(3)
    assert world.resident == {"b"}
    assert world.decision.spare_devices == {"GPU.0": 7 * GIB}


@pytest.mark.parametrize("budget", [0, 1])
def test_model_that_has_failed_holds_no_memory(budget: int) -> None:
    world = on_devices(
        {"GPU.0": 8}, model("good"), model("broken"), budget=budget, good={"GPU.0": 5}, broken={"GPU.0": 5}
    )
    world.ask("good")
    world.run(3)
    world.finish("good")
    world.run(6)
    world.ask("broken")
    world.run(0.5)
    world.failed = {"broken"}  # while it loads
    world.run(3)
    assert world.resident == {"broken"}
    world.finish("broken")  # its requests are answered with the failure
    world.ask("good")
    world.run(3)
    assert world.is_ready("good")


def test_models_of_different_devices_do_not_wait_for_each_other() -> None:
    world = on_devices({"GPU.0": 8, "GPU.1": 8}, *map(model, "abc"), a={"GPU.0": 5}, b={"GPU.0": 5}, c={"GPU.1": 5})
    world.ask("a")
    world.run(2)
    world.ask("b")
    world.ask("c")
    world.step()
    assert world.decision.waiting == {"b": "waits for memory"}
    assert world.resident == {"a", "c"}
