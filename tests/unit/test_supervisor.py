"""Supervisor over real toy processes: start, restart, hang, stop, reload, watchdog."""

from __future__ import annotations

import contextlib
import dataclasses
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
from ovserve.wire.local.launcher import LocalProcess
from tests.live import children_of, is_alive
from tests.toysystem import PATIENCE_S, ToySystem, finish, toy_model

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("tracker", "leak_guard")]

SLACK_S = 2.0  # for a machine under other load


@pytest.fixture(scope="session")
def tracker() -> None:
    """Start multiprocessing's resource tracker, which the first spawn would start: it is not a leak."""
    resource_tracker.ensure_running()


def test_workers_start_and_serve(tmp_path: Path) -> None:
    with ToySystem(tmp_path, toy_model(replicas=2)) as system:
        answer = system.ask("echo hello", n=2, seed=5)
        assert answer.state is State.DONE
        assert answer.pictures == [b"echo hello|5", b"echo hello|6"]
        assert len(system.pids()) == 2
        assert sorted(system.supervisor.worker_pids()) == ["toy/0#0", "toy/1#0"]
        assert set(system.pids()) <= set(children_of(os.getpid()))


def test_every_incarnation_gets_the_options_that_the_first_one_chose(tmp_path: Path) -> None:
    with ToySystem(tmp_path, toy_model(replicas=3)) as system:
        chosen = system.dispatcher.status("toy").engine_reason
        for pid in system.pids():
            os.kill(pid, signal.SIGKILL)
        system.until(lambda: len({*system.supervisor.worker_pids()} & {"toy/0#1", "toy/1#1", "toy/2#1"}) == 3)
        system.until(lambda: system.ready() == 3)
        assert system.dispatcher.status("toy").engine_reason == chosen


def test_model_is_not_ready_before_the_warm_up(tmp_path: Path) -> None:
    with ToySystem(tmp_path, toy_model(load_s=0.5), wait=False) as system:
        assert not system.supervisor.wait_ready(Deadline.after(0.05))
        with pytest.raises(NotReady):
            system.ask("echo")
        assert system.supervisor.wait_ready(Deadline.after(PATIENCE_S))
        assert system.ask("echo").state is State.DONE


def test_dead_worker_is_restarted_as_the_next_incarnation(tmp_path: Path) -> None:
    with ToySystem(tmp_path) as system:
        [pid] = system.pids()
        os.kill(pid, signal.SIGKILL)
        system.until(lambda: system.supervisor.worker_pids().keys() == {"toy/0#1"} and system.ready() == 1)
        assert system.ask("echo").state is State.DONE
        assert not is_alive(pid)


def test_model_that_cannot_load_fails_at_once_with_the_workers_reason(tmp_path: Path) -> None:
    with ToySystem(tmp_path, toy_model(load="fail no such device: XPU"), wait=False) as system:
        assert not system.supervisor.wait_ready(Deadline.after(PATIENCE_S))
        status = system.supervisor.status()["toy"]
        assert status.failed
        assert status.reason == "failed: no such device: XPU"
        with pytest.raises(ModelFailed, match="XPU"):
            system.ask("echo")


def test_crash_loop_fails_the_model_and_not_the_others(tmp_path: Path) -> None:
    models = (toy_model("good"), toy_model("bad", load="segv"))
    with ToySystem(tmp_path, *models, wait=False, crash_loop_limit=3) as system:
        system.until(lambda: system.supervisor.status()["bad"].failed)
        reason = system.supervisor.status()["bad"].reason
        assert reason.startswith("failed: 3 workers in a row died")
        assert "SIGSEGV" in reason
        system.until(lambda: system.ready("good") == 1)
        assert system.ask("echo", model="good").state is State.DONE


def test_failed_model_is_retried_slowly_and_recovers(tmp_path: Path) -> None:
    marker = tmp_path / "repaired"
    models = (toy_model(load=f"until {marker} exit 7", replicas=2),)
    with ToySystem(tmp_path, *models, wait=False, crash_loop_limit=2, failed_retry_s=1.0) as system:
        system.until(lambda: system.supervisor.status()["toy"].failed)
        marker.touch()
        system.until(lambda: system.ready() == 2)
        status = system.supervisor.status()["toy"]
        assert (status.ready, status.failed) == (True, False)
        assert system.ask("echo").state is State.DONE


def test_hung_worker_is_killed_and_restarted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ToySystem(tmp_path, hang_limit_s=1.0, idle_hang_limit_s=1.0) as system:
        [pid] = system.pids()
        started = time.monotonic()
        answer = system.ask(f"once {tmp_path / 'hung'} hang")
        assert (answer.state, answer.attempts) == (State.DONE, 2)
        assert time.monotonic() - started < 1.0 + 2.0 + SLACK_S
        assert system.pids() != [pid]
        assert "hung: no heartbeat" in str([getattr(record, "fields", {}) for record in caplog.records])


def test_worker_that_survives_sigkill_is_written_off_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpawnProcess, "kill", lambda _: None)  # as if a driver blocked the process
    with ToySystem(tmp_path / "spool", hang_limit_s=1.0, idle_hang_limit_s=1.0, terminate_timeout_s=1.0) as system:
        [pid] = system.pids()
        begun = tmp_path / "begun"
        job = system.job(f"once {begun} sleep 60")
        system.until(begun.exists)
        os.kill(pid, signal.SIGSTOP)
        system.until(lambda: system.ready() == 0)
        assert system.pids() == [pid]  # killed but not written off yet: no longer counted as ready
        answer = finish(job, PATIENCE_S)
        assert (answer.state, answer.attempts) == (State.DONE, 2)
        assert list(system.supervisor.worker_pids()) == ["toy/0#1"]
        assert is_alive(pid)
        os.kill(pid, signal.SIGKILL)
        system.until(lambda: pid not in children_of(os.getpid()))  # it is reaped


def test_model_with_more_than_replicas_processes_that_survive_sigkill_fails_until_one_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpawnProcess, "kill", lambda _: None)
    limits = {"terminate_timeout_s": 0.2, "hang_limit_s": 2.0, "idle_hang_limit_s": 2.0, "failed_retry_s": 1.0}
    with ToySystem(tmp_path, **limits) as system:
        survivors = []
        for incarnation in range(2):
            system.until(
                lambda name=f"toy/0#{incarnation}": name in system.supervisor.worker_pids() and system.ready() == 1
            )
            survivors += system.pids()
            os.kill(survivors[-1], signal.SIGSTOP)
            system.until(lambda: system.ready() == 0)
        system.until(lambda: system.supervisor.status()["toy"].failed)
        assert "2 processes of this model have survived SIGKILL" in system.supervisor.status()["toy"].reason
        threading.Event().wait(2.0)  # longer than failed_retry_s
        assert system.pids() == []
        os.kill(survivors[0], signal.SIGKILL)
        system.until(lambda: system.supervisor.status()["toy"].ready)
        assert system.ask("echo").state is State.DONE
        os.kill(survivors[1], signal.SIGKILL)
        system.until(lambda: not {*survivors} & {*children_of(os.getpid())})


def test_reload_does_not_wait_for_a_worker_that_survives_sigkill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpawnProcess, "kill", lambda _: None)
    with ToySystem(tmp_path / "spool", terminate_timeout_s=0.3, idle_hang_limit_s=1.0) as system:
        [pid] = system.pids()
        os.kill(pid, signal.SIGSTOP)  # it does not read the Stop message
        system.reload(toy_model(capacity=3), terminate_timeout_s=0.3)
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert is_alive(pid)
        assert system.ask("echo").state is State.DONE
        os.kill(pid, signal.SIGKILL)
        system.until(lambda: pid not in children_of(os.getpid()))


def test_worker_is_not_hung_while_the_dispatcher_stalls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ToySystem(tmp_path, toy_model(replicas=2), hang_limit_s=1.0, idle_hang_limit_s=1.0) as system:
        go_on, wake = threading.Event(), system.dispatcher.on_change
        system.dispatcher.on_change = lambda: assert_called(go_on.wait(PATIENCE_S))
        doomed, other = system.pids()
        os.kill(doomed, signal.SIGKILL)
        threading.Event().wait(3.0)  # the dispatcher is blocked and reads no heartbeat
        system.dispatcher.on_change = wake
        go_on.set()
        system.until(lambda: system.ready() == 2)
        assert other in system.pids()
        assert "worker killed" not in caplog.text


def test_worker_over_its_memory_limit_is_killed_and_the_job_fails(tmp_path: Path) -> None:
    with ToySystem(tmp_path, toy_model(memory=200 << 20, replicas=2)) as system:
        started = time.monotonic()
        answer = system.ask("leak")
        assert isinstance(answer.error, WorkerCrashed)
        assert time.monotonic() - started < 10
        system.until(lambda: system.ready() == 2)
        assert system.ask("echo").state is State.DONE


def test_memory_limit_stays_the_reason_while_the_killed_process_takes_long_to_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed_at: dict[int, float] = {}
    kill, is_alive_now = LocalProcess.kill, LocalProcess.is_alive

    def note_kill(process: LocalProcess) -> None:
        killed_at[process.pid] = time.monotonic()
        kill(process)

    # The kernel closes the link of a killed process before it has freed gigabytes of its memory.
    def is_alive_longer(process: LocalProcess) -> bool:
        return time.monotonic() < killed_at.get(process.pid, 0.0) + 1.0 or is_alive_now(process)

    monkeypatch.setattr(LocalProcess, "kill", note_kill)
    monkeypatch.setattr(LocalProcess, "is_alive", is_alive_longer)
    with ToySystem(tmp_path, toy_model(memory=200 << 20)) as system:
        assert isinstance(system.ask("leak").error, WorkerCrashed)
        system.until(lambda: any(record.message == "worker died" for record in caplog.records))
        [why] = [record.fields["why"] for record in caplog.records if record.message == "worker died"]  # type: ignore[attr-defined]
        assert why.startswith("memory: ")


def test_worker_that_breaks_the_protocol_is_killed(tmp_path: Path) -> None:
    with ToySystem(tmp_path) as system:
        [pid] = system.pids()
        answer = system.ask(f"once {tmp_path / 'said'} garbage")
        assert answer.state is State.DONE
        assert not is_alive(pid)


def test_stop_lets_jobs_finish_then_ends_all_processes(tmp_path: Path) -> None:
    with ToySystem(tmp_path, toy_model(replicas=2)) as system:
        pids = system.pids()
        jobs = [system.job("sleep 0.3") for _ in range(4)]
        system.until(lambda: system.dispatcher.status("toy").running == 4)
        system.stop()
        assert [finish(job).state for job in jobs] == [State.DONE] * 4
        assert not any(is_alive(pid) for pid in pids)


def test_stop_kills_workers_at_the_deadline(tmp_path: Path) -> None:
    with ToySystem(tmp_path) as system:
        job = system.job("sleep 60")
        system.until(lambda: system.dispatcher.status("toy").running == 1)
        started = time.monotonic()
        system.stop(grace_s=0.3)
        assert time.monotonic() - started < 30
        assert finish(job).state is State.FAILED


def test_stop_while_loading_does_not_wait_for_the_model(tmp_path: Path) -> None:
    with ToySystem(tmp_path, toy_model(load="hang"), wait=False, terminate_timeout_s=0.5) as system:
        system.until(lambda: len(system.pids()) == 1)
        started = time.monotonic()
        system.stop()
        assert time.monotonic() - started < 20


def test_stop_kills_a_stopped_worker(tmp_path: Path) -> None:
    with ToySystem(tmp_path) as system:
        os.kill(system.pids()[0], signal.SIGSTOP)
        started = time.monotonic()
        system.stop(grace_s=0.5)
        assert time.monotonic() - started < 20


def test_workers_ignore_the_front_ends_signals(tmp_path: Path) -> None:
    with ToySystem(tmp_path) as system:
        [pid] = system.pids()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
        assert system.ask("echo").state is State.DONE
        assert system.pids() == [pid]


def test_reload_replaces_every_worker_without_losing_a_job(tmp_path: Path) -> None:
    with ToySystem(tmp_path, toy_model(replicas=2)) as system:
        old = set(system.pids())
        running = [system.job("sleep 0.5") for _ in range(4)]
        waiting = [system.job("sleep 0.01") for _ in range(20)]
        system.reload(toy_model(replicas=2, capacity=5))
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert not old & set(system.pids())
        assert system.dispatcher.status("toy").capacity == 10
        answers = [finish(job) for job in running + waiting]
        assert [(answer.state, answer.attempts) for answer in answers] == [(State.DONE, 1)] * 24


def test_fresh_workers_take_over_after_their_number_of_jobs_without_losing_one(tmp_path: Path) -> None:
    model = dataclasses.replace(toy_model(replicas=2), max_jobs_per_worker=4)
    with ToySystem(tmp_path, model) as system:
        first, deadline = set(system.pids()), Deadline.after(PATIENCE_S)
        while first & set(system.pids()):
            assert not deadline.is_expired(), "a worker of the start is never replaced"
            answers = system.ask_all(["sleep 0.05"] * 6)  # long enough that every worker gets one
            assert [(answer.state, answer.attempts) for answer in answers] == [(State.DONE, 1)] * 6
        assert system.supervisor.restarts() == {"toy": 0}


def test_reload_with_a_shorter_deadline_lets_jobs_with_a_longer_one_finish(tmp_path: Path) -> None:
    with ToySystem(tmp_path) as system:
        job = system.job("sleep 2")
        system.until(lambda: system.dispatcher.status("toy").running == 1)
        system.reload(toy_model(), max_timeout_s=0.1, terminate_timeout_s=0.1)
        answer = finish(job)
        assert (answer.state, answer.attempts) == (State.DONE, 1)
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))


def test_failed_reload_keeps_the_old_workers(tmp_path: Path) -> None:
    with ToySystem(tmp_path) as system:
        old = system.pids()
        system.reload(toy_model(load="fail broken weights"))
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert system.pids() == old
        assert system.ask("echo").state is State.DONE


def test_reload_adds_and_removes_models(tmp_path: Path) -> None:
    with ToySystem(tmp_path, toy_model("a"), toy_model("b")) as system:
        last = [system.job("sleep 0.2", model="b") for _ in range(5)]
        system.reload(toy_model("a"), toy_model("c", replicas=2))
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        system.until(lambda: system.dispatcher.models() == ["a", "c"] and system.ready("c") == 2)
        assert [finish(job).state for job in last] == [State.DONE] * 5
        assert system.ask("echo", model="c").state is State.DONE


def test_removed_model_that_no_longer_loads_fails_its_queued_jobs(tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    loads.touch()
    models = (toy_model("a"), toy_model("b", load=f"until {loads} exit 7"))
    with ToySystem(tmp_path, *models, crash_loop_limit=2) as system:
        jobs = [system.job("sleep 60", model="b") for _ in range(4)]
        system.until(lambda: system.dispatcher.status("b").running == 2)
        loads.unlink()
        system.reload(toy_model("a"))
        system.until(lambda: system.dispatcher.status("b").reason == "unloading")
        os.kill(system.pids("b")[0], signal.SIGKILL)
        assert [type(finish(job, PATIENCE_S).error) for job in jobs] == [ModelFailed] * 4
        system.until(lambda: system.dispatcher.models() == ["a"])
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))


def test_running_job_of_a_removed_model_is_requeued_when_its_worker_dies(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with ToySystem(tmp_path / "spool", toy_model("a"), toy_model("b")) as system:
        job = system.job(f"once {begun} sleep 60", model="b")
        system.until(begun.exists)
        system.reload(toy_model("a"))
        system.until(lambda: system.dispatcher.status("b").reason == "unloading")
        os.kill(system.pids("b")[0], signal.SIGKILL)
        answer = finish(job, PATIENCE_S)
        assert (answer.state, answer.attempts) == (State.DONE, 2)
        system.until(lambda: system.dispatcher.models() == ["a"])
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))


def test_removed_model_is_unloaded_when_its_last_job_is_cancelled_without_a_live_worker(tmp_path: Path) -> None:
    slow = {"restart_delay_s": 60.0, "max_restart_delay_s": 60.0}
    with ToySystem(tmp_path, toy_model("a"), toy_model("b"), **slow) as system:
        os.kill(system.pids("b")[0], signal.SIGKILL)
        system.until(lambda: system.dispatcher.status("b").reason == "restarting")
        job = system.job("echo", model="b")
        system.reload(toy_model("a"))
        system.until(lambda: system.dispatcher.status("b").reason == "unloading")
        system.dispatcher.cancel(job)
        job.close()
        system.until(lambda: system.dispatcher.models() == ["a"])


def test_model_removed_and_added_again_gives_jobs_only_to_its_new_workers(tmp_path: Path) -> None:
    died = tmp_path / "died"
    with ToySystem(tmp_path / "spool", toy_model("a"), toy_model("b")) as system:
        [old] = system.pids("b")
        running = system.job("sleep 60", model="b")
        system.until(lambda: system.dispatcher.status("b").running == 1)
        system.reload(toy_model("a"))
        system.reload(toy_model("a"), toy_model("b", load_s=0.5))
        assert system.dispatcher.status("b").workers == 0
        # For the new worker, although the old one has free capacity.
        later = system.job(f"once {died} exit 7", model="b")
        system.until(lambda: system.ready("b") == 1)
        assert (finish(later).attempts, died.exists(), is_alive(old)) == (2, True, True)
        system.dispatcher.cancel(running)
        running.close()
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert not is_alive(old)


def test_second_reload_replaces_the_first(tmp_path: Path) -> None:
    with ToySystem(tmp_path) as system:
        system.reload(toy_model(load="hang"))
        system.until(lambda: len(system.pids()) == 2)
        system.reload(toy_model(capacity=7))
        system.until(lambda: system.dispatcher.status("toy").capacity == 7)
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert len(system.pids()) == 1


def test_reloads_in_a_row_do_not_accumulate_loading_workers(tmp_path: Path) -> None:
    with ToySystem(tmp_path, terminate_timeout_s=0.5) as system:
        counts: list[int] = []

        def has_taken_over() -> bool:
            counts.append(len(system.pids()))
            return system.dispatcher.status("toy").capacity == 7

        for _ in range(4):
            system.reload(toy_model(load="hang"), terminate_timeout_s=0.5)
            system.until(lambda: len(system.pids()) >= 2)
        system.reload(toy_model(capacity=7), terminate_timeout_s=0.5)
        system.until(has_taken_over)
        assert max(counts) == 2
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))


def test_retired_worker_that_becomes_ready_does_not_clear_the_failure(tmp_path: Path) -> None:
    with ToySystem(tmp_path, toy_model(load="fail no such device"), wait=False) as system:
        system.until(lambda: system.supervisor.status()["toy"].failed)
        system.reload(toy_model(load_s=1.0))
        system.until(lambda: len(system.pids()) == 1)
        [late] = system.pids()
        system.reload(toy_model(load="hang"))  # retires the worker before, which becomes ready within its grace period
        system.until(lambda: not is_alive(late))
        assert system.dispatcher.status("toy").reason == "failed: no such device"


def test_old_settings_apply_until_the_new_workers_take_over_and_old_workers_get_no_job_after(tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    with ToySystem(tmp_path / "spool", toy_model(queue_limit=8)) as system:
        system.reload(toy_model(load=f"until {loads} hang", queue_limit=1))
        system.until(lambda: len(system.pids()) == 2)
        held = [system.job("sleep 0.3") for _ in range(2)]
        waiting = [system.job("sleep 0.01") for _ in range(6)]  # more than the new limit allows; the old one applies
        assert system.serving == []
        for job in held + waiting:
            assert finish(job).state is State.DONE
        system.reload(toy_model(load="fail broken weights", queue_limit=1))
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert system.serving == []
        system.reload(toy_model(queue_limit=7, capacity=3))
        system.until(lambda: bool(system.serving))
        assert [model.queue_limit for model in system.serving] == [7]
        assert system.dispatcher.status("toy").capacity == 3  # without the old worker's


def test_reload_retires_one_old_worker_for_each_ready_new_one(tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    loads.touch()
    with ToySystem(tmp_path / "spool", toy_model(replicas=3)) as system:
        system.reload(toy_model(replicas=3, load_s=0.5, load=f"until {loads} hang"))
        system.until(lambda: system.supervisor.worker_pids().keys() > {"toy/1#1"})
        loads.unlink()  # the first is ready, the others hang while they load
        system.until(lambda: "toy/2#0" not in system.supervisor.worker_pids())
        pids = system.pids()
        system.ask_all(["sleep 0.1"] * 6)
        assert system.pids() == pids
        assert system.ready() == 3
        assert system.serving == []


def test_reload_retires_dead_old_workers_before_ready_ones(tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    loads.touch()
    slow = {"restart_delay_s": 60.0, "max_restart_delay_s": 60.0}
    with ToySystem(tmp_path / "spool", toy_model(replicas=2), **slow) as system:
        os.kill(system.supervisor.worker_pids()["toy/1#0"], signal.SIGKILL)
        system.until(lambda: system.ready() == 1)
        system.reload(toy_model(replicas=2, load_s=0.5, load=f"until {loads} hang"))
        system.until(lambda: system.supervisor.worker_pids().keys() >= {"toy/0#1", "toy/1#1"})
        loads.unlink()  # the first is ready, the other hangs while it loads
        system.ask_all(["sleep 0.1"] * 6)
        assert system.supervisor.worker_pids().keys() == {"toy/0#0", "toy/0#1", "toy/1#1"}
        assert system.ready() == 2
        assert system.serving == []


def test_half_failed_reload_recreates_the_old_worker_it_had_retired(tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    loads.touch()
    with ToySystem(tmp_path / "spool", toy_model(replicas=2)) as system:
        system.reload(toy_model(replicas=2, load_s=0.5, load=f"until {loads} exit 7", capacity=9))
        system.until(lambda: system.supervisor.worker_pids().keys() > {"toy/1#1"})
        loads.unlink()  # the first is ready, the other dies at each start
        system.until(lambda: "toy/1#0" not in system.supervisor.worker_pids())
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        system.until(lambda: system.dispatcher.status("toy").capacity == 4)
        assert system.ask("echo").state is State.DONE
        assert system.serving == []


def test_half_failed_reload_takes_over_if_no_old_worker_is_ready(tmp_path: Path) -> None:
    worked, loads = tmp_path / "worked", tmp_path / "loads"
    worked.touch()
    loads.touch()
    slow = {"restart_delay_s": 60.0, "max_restart_delay_s": 60.0}
    with ToySystem(tmp_path / "spool", toy_model(replicas=2, load=f"until {worked} exit 7"), **slow) as system:
        worked.unlink()
        for pid in system.pids():
            os.kill(pid, signal.SIGKILL)
        system.until(lambda: system.ready() == 0)
        half = toy_model(replicas=2, load_s=0.5, load=f"until {loads} exit 7", queue_limit=7)
        system.reload(half, crash_loop_limit=2)
        system.until(lambda: "toy/1#1" in system.supervisor.worker_pids())
        loads.unlink()  # the first is ready, the other dies at each start
        system.until(lambda: "toy/1#3" in system.supervisor.worker_pids())  # and is restarted beyond the limit
        assert system.ask("echo").state is State.DONE
        loads.touch()
        assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
        assert system.ready() == 2
        assert [model.queue_limit for model in system.serving] == [7]


def test_reload_to_fewer_and_to_more_replicas(tmp_path: Path) -> None:
    with ToySystem(tmp_path, toy_model(replicas=3)) as system:
        for replicas in (1, 3):
            system.reload(toy_model(replicas=replicas))
            assert system.supervisor.wait_reloaded(Deadline.after(PATIENCE_S))
            system.until(lambda: len(system.pids()) == replicas)  # noqa: B023 - awaited here


def test_watchdog_is_fed_while_both_loops_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "600000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        with ToySystem(tmp_path / "spool"):
            assert [manager.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3


def test_two_systems_share_a_spool_directory(tmp_path: Path) -> None:
    with ToySystem(tmp_path) as one, ToySystem(tmp_path) as two:
        assert one.ask("echo").state is State.DONE
        assert two.ask("echo").state is State.DONE


def test_watchdog_is_not_fed_while_the_dispatcher_is_blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        go_on = threading.Event()
        with ToySystem(tmp_path / "spool") as system:
            wake = system.dispatcher.on_change
            system.dispatcher.on_change = lambda: assert_called(go_on.wait(PATIENCE_S))
            os.kill(system.pids()[0], signal.SIGKILL)
            manager.settimeout(2.0)
            fed_s, started = 0.0, time.monotonic()
            with contextlib.suppress(TimeoutError):
                while fed_s < PATIENCE_S:
                    manager.recv(100)
                    fed_s = time.monotonic() - started
            assert 3.0 < fed_s < PATIENCE_S  # the tolerated delay, then no message for more than six intervals
            system.dispatcher.on_change = wake
            go_on.set()
            manager.settimeout(PATIENCE_S)
            assert manager.recv(100) == b"WATCHDOG=1"


def assert_called(value: bool) -> None:
    assert value
