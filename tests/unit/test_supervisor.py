from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from ovserve.deadline import Deadline
from ovserve.dispatch.jobs import State
from ovserve.errors import ModelFailed, NotReady, WorkerCrashed
from tests.live import children_of, is_alive
from tests.toysystem import PATIENCE_S, ToyHouse, finish, toy_model

pytestmark = pytest.mark.usefixtures("tracker", "leak_guard")

SLACK_S = 2.0  # for a machine with other work


@pytest.fixture(scope="session")
def tracker() -> None:
    """multiprocessing's own helper process, which every spawn needs once: no leak of ours."""
    resource_tracker.ensure_running()


def test_workers_start_and_serve(tmp_path: Path) -> None:
    with ToyHouse(tmp_path, toy_model(replicas=2)) as house:
        answer = house.ask("echo hello", n=2, seed=5)
        assert answer.state is State.DONE
        assert answer.pictures == [b"echo hello|5", b"echo hello|6"]
        assert len(house.pids()) == 2
        assert sorted(house.supervisor.worker_pids()) == ["toy/0#0", "toy/1#0"]
        assert set(house.pids()) <= set(children_of(os.getpid()))


def test_every_incarnation_gets_what_the_first_one_chose(tmp_path: Path) -> None:
    with ToyHouse(tmp_path, toy_model(replicas=3)) as house:
        chosen = house.dispatcher.status("toy").engine_reason
        for pid in house.pids():
            os.kill(pid, signal.SIGKILL)
        house.until(lambda: len({*house.supervisor.worker_pids()} & {"toy/0#1", "toy/1#1", "toy/2#1"}) == 3)
        house.until(lambda: house.ready() == 3)
        assert house.dispatcher.status("toy").engine_reason == chosen


def test_nothing_is_ready_before_the_warm_up(tmp_path: Path) -> None:
    with ToyHouse(tmp_path, toy_model(load_s=0.5), wait=False) as house:
        assert not house.supervisor.wait_ready(Deadline.after(0.05))
        with pytest.raises(NotReady):
            house.ask("echo")
        assert house.supervisor.wait_ready(Deadline.after(PATIENCE_S))
        assert house.ask("echo").state is State.DONE


def test_dead_worker_is_replaced_by_its_next_incarnation(tmp_path: Path) -> None:
    with ToyHouse(tmp_path) as house:
        [pid] = house.pids()
        os.kill(pid, signal.SIGKILL)
        house.until(lambda: house.supervisor.worker_pids().keys() == {"toy/0#1"} and house.ready() == 1)
        assert house.ask("echo").state is State.DONE
        assert not is_alive(pid)


def test_model_that_cannot_load_is_failed_at_once_with_the_workers_own_reason(tmp_path: Path) -> None:
    with ToyHouse(tmp_path, toy_model(load="fail no such device: XPU"), wait=False) as house:
        assert not house.supervisor.wait_ready(Deadline.after(PATIENCE_S))
        status = house.supervisor.status()["toy"]
        assert status.failed
        assert status.reason == "failed: no such device: XPU"
        with pytest.raises(ModelFailed, match="XPU"):
            house.ask("echo")


def test_crash_loop_is_a_failed_model_and_the_others_go_on(tmp_path: Path) -> None:
    models = (toy_model("good"), toy_model("bad", load="segv"))
    with ToyHouse(tmp_path, *models, wait=False, crash_loop_limit=3) as house:
        house.until(lambda: house.supervisor.status()["bad"].failed)
        reason = house.supervisor.status()["bad"].reason
        assert reason.startswith("failed: 3 workers in a row died")
        assert "SIGSEGV" in reason
        house.until(lambda: house.ready("good") == 1)
        assert house.ask("echo", model="good").state is State.DONE


def test_failed_model_is_tried_again_slowly_and_comes_back(tmp_path: Path) -> None:
    marker = tmp_path / "mended"
    models = (toy_model(load=f"until {marker} exit 7", replicas=2),)
    with ToyHouse(tmp_path, *models, wait=False, crash_loop_limit=2, failed_retry_s=1.0) as house:
        house.until(lambda: house.supervisor.status()["toy"].failed)
        marker.touch()
        house.until(lambda: house.ready() == 2)
        status = house.supervisor.status()["toy"]
        assert (status.ready, status.failed) == (True, False)
        assert house.ask("echo").state is State.DONE


def test_silent_worker_is_killed_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ToyHouse(tmp_path, hang_limit_s=1.0, idle_hang_limit_s=1.0) as house:
        [pid] = house.pids()
        started = time.monotonic()
        answer = house.ask(f"once {tmp_path / 'hung'} hang")
        assert (answer.state, answer.attempts) == (State.DONE, 2)
        assert time.monotonic() - started < 1.0 + 2.0 + SLACK_S
        assert house.pids() != [pid]
        assert "hung: no heartbeat" in str([getattr(record, "fields", {}) for record in caplog.records])


def test_worker_that_sigkill_does_not_end_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpawnProcess, "kill", lambda _: None)  # what it comes to while a driver holds the process
    with ToyHouse(tmp_path / "spool", hang_limit_s=1.0, idle_hang_limit_s=1.0, terminate_timeout_s=1.0) as house:
        [pid] = house.pids()
        begun = tmp_path / "begun"
        job = house.job(f"once {begun} sleep 60")
        house.until(begun.exists)
        os.kill(pid, signal.SIGSTOP)
        house.until(lambda: house.ready() == 0)
        assert house.pids() == [pid]  # killed, and not yet given up: it counts as ready no longer
        answer = finish(job, PATIENCE_S)
        assert (answer.state, answer.attempts) == (State.DONE, 2)
        assert list(house.supervisor.worker_pids()) == ["toy/0#1"]
        assert is_alive(pid)
        os.kill(pid, signal.SIGKILL)
        house.until(lambda: pid not in children_of(os.getpid()))  # it is no zombie


def test_model_whose_every_process_defies_sigkill_gets_one_successor_and_is_failed_until_one_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpawnProcess, "kill", lambda _: None)
    limits = {"terminate_timeout_s": 0.2, "hang_limit_s": 0.5, "idle_hang_limit_s": 0.5, "failed_retry_s": 1.0}
    with ToyHouse(tmp_path, **limits) as house:
        wedged = []
        for incarnation in range(2):
            house.until(
                lambda name=f"toy/0#{incarnation}": name in house.supervisor.worker_pids() and house.ready() == 1
            )
            wedged += house.pids()
            os.kill(wedged[-1], signal.SIGSTOP)
            house.until(lambda: house.ready() == 0)
        house.until(lambda: house.supervisor.status()["toy"].failed)
        assert "2 of its processes do not end" in house.supervisor.status()["toy"].reason
        threading.Event().wait(2.0)  # when it would have been tried again
        assert house.pids() == []
        os.kill(wedged[0], signal.SIGKILL)
        house.until(lambda: house.ready() == 1)
        assert house.ask("echo").state is State.DONE
        os.kill(wedged[1], signal.SIGKILL)
        house.until(lambda: not {*wedged} & {*children_of(os.getpid())})


def test_reload_does_not_wait_for_a_worker_that_sigkill_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpawnProcess, "kill", lambda _: None)
    with ToyHouse(tmp_path / "spool", terminate_timeout_s=0.3, idle_hang_limit_s=1.0) as house:
        [pid] = house.pids()
        os.kill(pid, signal.SIGSTOP)  # it does not hear that it is to end
        house.reload(toy_model(), terminate_timeout_s=0.3)
        assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert is_alive(pid)
        assert house.ask("echo").state is State.DONE
        os.kill(pid, signal.SIGKILL)
        house.until(lambda: pid not in children_of(os.getpid()))


def test_worker_is_not_taken_for_silent_while_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ToyHouse(tmp_path, toy_model(replicas=2), hang_limit_s=1.0, idle_hang_limit_s=1.0) as house:
        go_on, wake = threading.Event(), house.dispatcher.on_change
        house.dispatcher.on_change = lambda: assert_called(go_on.wait(PATIENCE_S))
        doomed, other = house.pids()
        os.kill(doomed, signal.SIGKILL)
        threading.Event().wait(3.0)  # the dispatcher stands still and hears no beat
        house.dispatcher.on_change = wake
        go_on.set()
        house.until(lambda: house.ready() == 2)
        assert other in house.pids()
        assert "worker killed" not in caplog.text


def test_worker_over_its_memory_limit_is_killed_and_the_job_with_it(tmp_path: Path) -> None:
    with ToyHouse(tmp_path, toy_model(memory=200 << 20, replicas=2)) as house:
        started = time.monotonic()
        answer = house.ask("leak")
        assert isinstance(answer.error, WorkerCrashed)
        assert time.monotonic() - started < 10
        house.until(lambda: house.ready() == 2)
        assert house.ask("echo").state is State.DONE


def test_worker_that_breaks_the_protocol_is_killed(tmp_path: Path) -> None:
    with ToyHouse(tmp_path) as house:
        [pid] = house.pids()
        answer = house.ask(f"once {tmp_path / 'said'} garbage")
        assert answer.state is State.DONE
        assert not is_alive(pid)


def test_stop_lets_jobs_finish_then_ends_every_process(tmp_path: Path) -> None:
    with ToyHouse(tmp_path, toy_model(replicas=2)) as house:
        pids = house.pids()
        jobs = [house.job("sleep 0.3") for _ in range(4)]
        house.until(lambda: house.dispatcher.status("toy").running == 4)
        house.stop()
        assert [finish(job).state for job in jobs] == [State.DONE] * 4
        assert not any(is_alive(pid) for pid in pids)


def test_stop_kills_what_runs_at_the_deadline(tmp_path: Path) -> None:
    with ToyHouse(tmp_path) as house:
        job = house.job("sleep 60")
        house.until(lambda: house.dispatcher.status("toy").running == 1)
        started = time.monotonic()
        house.stop(grace_s=0.3)
        assert time.monotonic() - started < 30
        assert finish(job).state is State.FAILED


def test_stop_while_loading_does_not_wait_for_the_model(tmp_path: Path) -> None:
    with ToyHouse(tmp_path, toy_model(load="hang"), wait=False, terminate_timeout_s=0.5) as house:
        house.until(lambda: len(house.pids()) == 1)
        started = time.monotonic()
        house.stop()
        assert time.monotonic() - started < 20


def test_stop_kills_a_stopped_worker(tmp_path: Path) -> None:
    with ToyHouse(tmp_path) as house:
        os.kill(house.pids()[0], signal.SIGSTOP)
        started = time.monotonic()
        house.stop(grace_s=0.5)
        assert time.monotonic() - started < 20


def test_workers_do_not_hear_the_front_ends_signals(tmp_path: Path) -> None:
    with ToyHouse(tmp_path) as house:
        [pid] = house.pids()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
        assert house.ask("echo").state is State.DONE
        assert house.pids() == [pid]


def test_reload_replaces_every_worker_without_losing_a_job(tmp_path: Path) -> None:
    with ToyHouse(tmp_path, toy_model(replicas=2)) as house:
        old = set(house.pids())
        running = [house.job("sleep 0.5") for _ in range(4)]
        waiting = [house.job("sleep 0.01") for _ in range(20)]
        house.reload(toy_model(replicas=2, capacity=5))
        assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert not old & set(house.pids())
        assert house.dispatcher.status("toy").capacity == 10
        answers = [finish(job) for job in running + waiting]
        assert [(answer.state, answer.attempts) for answer in answers] == [(State.DONE, 1)] * 24


def test_reload_to_a_shorter_deadline_lets_jobs_of_a_longer_one_finish(tmp_path: Path) -> None:
    with ToyHouse(tmp_path) as house:
        job = house.job("sleep 2")
        house.until(lambda: house.dispatcher.status("toy").running == 1)
        house.reload(toy_model(), max_timeout_s=0.1, terminate_timeout_s=0.1)
        answer = finish(job)
        assert (answer.state, answer.attempts) == (State.DONE, 1)
        assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))


def test_reload_that_fails_leaves_the_old_workers_serving(tmp_path: Path) -> None:
    with ToyHouse(tmp_path) as house:
        old = house.pids()
        house.reload(toy_model(load="fail broken weights"))
        assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert house.pids() == old
        assert house.ask("echo").state is State.DONE


def test_reload_brings_models_and_takes_models_away(tmp_path: Path) -> None:
    with ToyHouse(tmp_path, toy_model("a"), toy_model("b")) as house:
        going = [house.job("sleep 0.2", model="b") for _ in range(5)]
        house.reload(toy_model("a"), toy_model("c", replicas=2))
        assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        house.until(lambda: house.dispatcher.models() == ["a", "c"] and house.ready("c") == 2)
        assert [finish(job).state for job in going] == [State.DONE] * 5
        assert house.ask("echo", model="c").state is State.DONE


def test_removed_model_that_no_longer_loads_answers_its_queue(tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    loads.touch()
    models = (toy_model("a"), toy_model("b", load=f"until {loads} exit 7"))
    with ToyHouse(tmp_path, *models, crash_loop_limit=2) as house:
        jobs = [house.job("sleep 60", model="b") for _ in range(4)]
        house.until(lambda: house.dispatcher.status("b").running == 2)
        loads.unlink()
        house.reload(toy_model("a"))
        house.until(lambda: house.dispatcher.status("b").reason == "unloading")
        os.kill(house.pids("b")[0], signal.SIGKILL)
        assert [type(finish(job, PATIENCE_S).error) for job in jobs] == [ModelFailed] * 4
        house.until(lambda: house.dispatcher.models() == ["a"])
        assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))


def test_removed_models_running_job_goes_to_a_successor_when_its_worker_dies(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with ToyHouse(tmp_path / "spool", toy_model("a"), toy_model("b")) as house:
        job = house.job(f"once {begun} sleep 60", model="b")
        house.until(begun.exists)
        house.reload(toy_model("a"))
        house.until(lambda: house.dispatcher.status("b").reason == "unloading")
        os.kill(house.pids("b")[0], signal.SIGKILL)
        answer = finish(job, PATIENCE_S)
        assert (answer.state, answer.attempts) == (State.DONE, 2)
        house.until(lambda: house.dispatcher.models() == ["a"])
        assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))


def test_removed_model_is_forgotten_though_its_last_job_is_cancelled_while_no_worker_lives(tmp_path: Path) -> None:
    slow = {"restart_delay_s": 60.0, "max_restart_delay_s": 60.0}
    with ToyHouse(tmp_path, toy_model("a"), toy_model("b"), **slow) as house:
        os.kill(house.pids("b")[0], signal.SIGKILL)
        house.until(lambda: house.dispatcher.status("b").reason == "restarting")
        job = house.job("echo", model="b")
        house.reload(toy_model("a"))
        house.until(lambda: house.dispatcher.status("b").reason == "unloading")
        house.dispatcher.cancel(job)
        job.close()
        house.until(lambda: house.dispatcher.models() == ["a"])


def test_model_removed_and_named_again_gets_its_new_workers_only(tmp_path: Path) -> None:
    died = tmp_path / "died"
    with ToyHouse(tmp_path / "spool", toy_model("a"), toy_model("b")) as house:
        [old] = house.pids("b")
        running = house.job("sleep 60", model="b")
        house.until(lambda: house.dispatcher.status("b").running == 1)
        house.reload(toy_model("a"))
        house.reload(toy_model("a"), toy_model("b", load_s=0.5))
        assert house.dispatcher.status("b").workers == 0
        later = house.job(f"once {died} exit 7", model="b")  # for the new: the old one has room
        house.until(lambda: house.ready("b") == 1)
        assert (finish(later).attempts, died.exists(), is_alive(old)) == (2, True, True)
        house.dispatcher.cancel(running)
        running.close()
        assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert not is_alive(old)


def test_second_reload_overtakes_the_first(tmp_path: Path) -> None:
    with ToyHouse(tmp_path) as house:
        house.reload(toy_model(load="hang"))
        house.until(lambda: len(house.pids()) == 2)
        house.reload(toy_model(capacity=7))
        house.until(lambda: house.dispatcher.status("toy").capacity == 7)
        assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert len(house.pids()) == 1


def test_reloads_in_a_row_do_not_pile_up_loading_workers(tmp_path: Path) -> None:
    with ToyHouse(tmp_path, terminate_timeout_s=0.5) as house:
        living: list[int] = []

        def has_taken_over() -> bool:
            living.append(len(house.pids()))
            return house.dispatcher.status("toy").capacity == 7

        for _ in range(4):
            house.reload(toy_model(load="hang"), terminate_timeout_s=0.5)
            house.until(lambda: len(house.pids()) >= 2)
        house.reload(toy_model(capacity=7), terminate_timeout_s=0.5)
        house.until(has_taken_over)
        assert max(living) == 2
        assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))


def test_worker_that_is_ready_too_late_does_not_make_a_failed_model_work(tmp_path: Path) -> None:
    with ToyHouse(tmp_path, toy_model(load="fail no such device"), wait=False) as house:
        house.until(lambda: house.supervisor.status()["toy"].failed)
        house.reload(toy_model(load_s=1.0))
        house.until(lambda: len(house.pids()) == 1)
        [late] = house.pids()
        house.reload(toy_model(load="hang"))  # the one before is turned away, and ready within its grace
        house.until(lambda: not is_alive(late))
        assert house.dispatcher.status("toy").reason == "failed: no such device"


def test_old_workers_are_meant_until_the_new_take_over_and_none_gets_a_job_after(tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    with ToyHouse(tmp_path / "spool", toy_model(queue_limit=8)) as house:
        house.reload(toy_model(load=f"until {loads} hang", queue_limit=1))
        house.until(lambda: len(house.pids()) == 2)
        held = [house.job("sleep 0.3") for _ in range(2)]
        waiting = [house.job("sleep 0.01") for _ in range(6)]  # beyond the new limit, within the one that holds
        assert house.serving == []
        for job in held + waiting:
            assert finish(job).state is State.DONE
        house.reload(toy_model(load="fail broken weights", queue_limit=1))
        assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert house.serving == []
        house.reload(toy_model(queue_limit=7, capacity=3))
        house.until(lambda: bool(house.serving))
        assert [model.queue_limit for model in house.serving] == [7]
        assert house.dispatcher.status("toy").capacity == 3  # the old one's are not among them


def test_old_workers_make_way_for_as_many_as_are_ready_and_not_for_more(tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    loads.touch()
    with ToyHouse(tmp_path / "spool", toy_model(replicas=3)) as house:
        house.reload(toy_model(replicas=3, load_s=0.5, load=f"until {loads} hang"))
        house.until(lambda: house.supervisor.worker_pids().keys() > {"toy/1#1"})
        loads.unlink()  # the first has come, the others have not
        house.until(lambda: "toy/0#0" not in house.supervisor.worker_pids())
        pids = house.pids()
        house.ask_all(["sleep 0.1"] * 6)
        assert house.pids() == pids
        assert house.ready() == 3
        assert house.serving == []


def test_old_worker_that_works_stays_rather_than_a_dead_one(tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    loads.touch()
    slow = {"restart_delay_s": 60.0, "max_restart_delay_s": 60.0}
    with ToyHouse(tmp_path / "spool", toy_model(replicas=2), **slow) as house:
        os.kill(house.supervisor.worker_pids()["toy/1#0"], signal.SIGKILL)
        house.until(lambda: house.ready() == 1)
        house.reload(toy_model(replicas=2, load_s=0.5, load=f"until {loads} hang"))
        house.until(lambda: house.supervisor.worker_pids().keys() >= {"toy/0#1", "toy/1#1"})
        loads.unlink()  # the first has come, the other has not
        house.ask_all(["sleep 0.1"] * 6)
        assert house.supervisor.worker_pids().keys() == {"toy/0#0", "toy/0#1", "toy/1#1"}
        assert house.ready() == 2
        assert house.serving == []


def test_reload_half_of_which_fails_after_an_old_worker_has_gone_brings_another(tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    loads.touch()
    with ToyHouse(tmp_path / "spool", toy_model(replicas=2)) as house:
        house.reload(toy_model(replicas=2, load_s=0.5, load=f"until {loads} exit 7", capacity=9))
        house.until(lambda: house.supervisor.worker_pids().keys() > {"toy/1#1"})
        loads.unlink()  # the first has come, the other dies at each try
        house.until(lambda: "toy/0#0" not in house.supervisor.worker_pids())
        assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        house.until(lambda: house.dispatcher.status("toy").capacity == 4)
        assert house.ask("echo").state is State.DONE
        assert house.serving == []


def test_reload_half_of_which_fails_serves_where_of_the_old_workers_none_works(tmp_path: Path) -> None:
    worked, loads = tmp_path / "worked", tmp_path / "loads"
    worked.touch()
    loads.touch()
    slow = {"restart_delay_s": 60.0, "max_restart_delay_s": 60.0}
    with ToyHouse(tmp_path / "spool", toy_model(replicas=2, load=f"until {worked} exit 7"), **slow) as house:
        worked.unlink()
        for pid in house.pids():
            os.kill(pid, signal.SIGKILL)
        house.until(lambda: house.ready() == 0)
        half = toy_model(replicas=2, load_s=0.5, load=f"until {loads} exit 7", queue_limit=7)
        house.reload(half, crash_loop_limit=2)
        house.until(lambda: "toy/1#1" in house.supervisor.worker_pids())
        loads.unlink()  # the first has come, the other dies at each try
        house.until(lambda: "toy/1#3" in house.supervisor.worker_pids())  # and is tried beyond the limit
        assert house.ask("echo").state is State.DONE
        loads.touch()
        assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert house.ready() == 2
        assert [model.queue_limit for model in house.serving] == [7]


def test_reload_to_fewer_and_to_more_replicas(tmp_path: Path) -> None:
    with ToyHouse(tmp_path, toy_model(replicas=3)) as house:
        for replicas in (1, 3):
            house.reload(toy_model(replicas=replicas))
            assert house.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
            house.until(lambda: len(house.pids()) == replicas)  # noqa: B023 - awaited here


def test_watchdog_is_fed_while_everything_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "600000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        with ToyHouse(tmp_path / "spool"):
            assert [manager.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3


def test_two_houses_share_a_spool_directory(tmp_path: Path) -> None:
    with ToyHouse(tmp_path) as one, ToyHouse(tmp_path) as two:
        assert one.ask("echo").state is State.DONE
        assert two.ask("echo").state is State.DONE


def test_watchdog_goes_hungry_when_the_dispatcher_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        go_on = threading.Event()
        with ToyHouse(tmp_path / "spool") as house:
            wake = house.dispatcher.on_change
            house.dispatcher.on_change = lambda: assert_called(go_on.wait(PATIENCE_S))
            os.kill(house.pids()[0], signal.SIGKILL)
            manager.settimeout(2.0)
            fed_s, started = 0.0, time.monotonic()
            with contextlib.suppress(TimeoutError):
                while fed_s < PATIENCE_S:
                    manager.recv(100)
                    fed_s = time.monotonic() - started
            assert 3.0 < fed_s < PATIENCE_S  # a dispatcher may be late; then nothing comes for six intervals and more
            house.dispatcher.on_change = wake
            go_on.set()
            manager.settimeout(PATIENCE_S)
            assert manager.recv(100) == b"WATCHDOG=1"


def assert_called(value: bool) -> None:
    assert value
