"""Limits of a running server: deadlines, a full spool, a worker over its memory limit, reloads, file descriptors."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ovserve.metrics import WATCHED
from tests.faultserver import FaultServer, descriptors_of, gone, picture_of
from tests.live import BUILTIN_PATH


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs of 2 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tiny", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs a privilege that this user lacks")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    """Start a server for tests that do not change it."""
    with FaultServer(tmp_path_factory.mktemp("spool")) as server:
        yield server


def test_deadline_ends_jobs_on_the_device_and_in_the_queue(plain: FaultServer) -> None:
    server = plain
    with server.client() as client:
        started = time.monotonic()
        running = server.generate(client, "sleep 30", timeout_s=0.3)
        assert (running.status_code, running.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert running.headers["x-should-retry"] == "false"
        assert time.monotonic() - started < 15  # the job would take 30 s
        holders = [threading.Thread(target=server.generate, args=(client, "sleep 1.0")) for _ in range(2)]
        for thread in holders:
            thread.start()
        server.until(lambda: server.model_status()["running"] == 2)
        waiting = server.generate(client, "echo", timeout_s=0.2)
        assert waiting.status_code == 504
        assert "queue" in waiting.json()["error"]["message"]
        for thread in holders:
            thread.join()
        assert server.generate(client, "echo").status_code == 200
        server.until(lambda: server.segments() == [])


def test_full_tmpfs_is_503_and_later_requests_succeed(tiny: Path) -> None:
    with FaultServer(tiny) as server, server.client() as client:
        hog = tiny / "other"
        hog.write_bytes(b"x" * (1800 << 10))
        status, document = server.fetch("/v2/health/ready")
        assert status == 503
        assert "the file system of the spool is full" in str(document)
        hog.unlink()
        assert server.fetch("/v2/health/ready")[0] == 200
        hog.write_bytes(b"x" * (1536 << 10))
        files = {"image": ("a.png", b"\x89PNG\r\n\x1a\n" + b"y" * (1 << 20))}
        reply = client.post("/v3/images/edits", data={"prompt": "echo"}, files=files)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "spool_full")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        hog.unlink()
        assert server.generate(client, "echo").status_code == 200
        assert len(server.workers()) == 1
        assert not server.logged("worker died")


def test_request_larger_than_the_tmpfs_is_413_and_logged_at_start(tiny: Path) -> None:
    with FaultServer(tiny) as server, server.client() as client:
        assert server.logged("WARNING", "the spool is smaller than max_body_bytes", f"bytes={2 << 20}")
        files = {"image": ("a.png", b"\x89PNG\r\n\x1a\n" + b"y" * (2 << 20))}
        reply = client.post("/v3/images/edits", data={"prompt": "echo"}, files=files)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "content_too_large")
        assert server.edit(client, "echo").status_code == 200


def test_removed_spool_directory_is_created_again(tmp_path: Path) -> None:
    with FaultServer(tmp_path / "spool") as server, server.client() as client:
        assert server.edit(client, "echo").status_code == 200
        shutil.rmtree(tmp_path / "spool")
        assert [server.edit(client, "echo").status_code for _ in range(2)] == [200, 200]
        shutil.rmtree(tmp_path / "spool")
        (tmp_path / "spool").write_bytes(b"in the way")
        reply = server.edit(client, "echo")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "spool_unusable")
        assert reply.headers["retry-after"]
        assert server.fetch("/v2/health/ready")[0] == 503
        assert "Not a directory" in server.model_status()["reason"]
        (tmp_path / "spool").unlink()
        assert server.fetch("/v2/health/ready")[0] == 200
        assert server.edit(client, "echo").status_code == 200


def test_reload_under_load_loses_no_request(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    table = f"[[model]]\npath = '{BUILTIN_PATH}'\nreplicas = 2\nplugin_config = '{{}}'"
    config.write_text(table.format("{}"))
    with FaultServer(tmp_path / "spool", "--config", str(config)) as server:
        server.until(lambda: server.model_status()["workers"] == 2)
        old = server.workers()
        statuses: list[int] = []
        finished = threading.Event()

        def keep_asking() -> None:
            with server.client() as client:
                while not finished.is_set():
                    statuses.append(server.generate(client, "sleep 0.05").status_code)

        threads = [threading.Thread(target=keep_asking) for _ in range(6)]
        for thread in threads:
            thread.start()
        server.until(lambda: len(statuses) > 10)
        config.write_text(table.format(json.dumps({"capacity": 3})))
        server.signal(signal.SIGHUP)
        server.until(lambda: all(gone(pid) for pid in old) and server.model_status()["workers"] == 2)
        finished.set()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200}
        assert not server.logged("died with a job")


def test_reload_of_an_unchanged_configuration_keeps_every_process(tmp_path: Path) -> None:
    with FaultServer(tmp_path, "--replicas", "2") as server:
        server.until(lambda: server.model_status()["workers"] == 2)
        workers = server.workers()
        server.signal(signal.SIGHUP)
        server.until(lambda: bool(server.logged("reloaded")))
        with server.client() as client:
            assert server.edit(client, "echo").status_code == 200
        assert server.workers() == workers


def test_reload_changes_the_limits_only_when_the_new_workers_are_ready(tmp_path: Path) -> None:
    config, loads = tmp_path / "config.toml", tmp_path / "loads"

    def write(max_steps: int, **plugin: object) -> None:
        table = {"path": BUILTIN_PATH, "max_num_inference_steps": max_steps, "plugin_config": json.dumps(plugin)}
        lines = ["[[model]]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
        config.write_text("\n".join(lines))

    def steps_taken() -> list[int]:
        return [steps for steps in (12, 20, 30) if live.generate(client, "echo", num_inference_steps=steps).is_success]

    def reload(max_steps: int, **plugin: object) -> None:
        write(max_steps, **plugin)
        live.signal(signal.SIGHUP)

    write(15)
    with FaultServer(tmp_path / "spool", "--config", str(config)) as live, live.client() as client:
        assert steps_taken() == [12]
        reload(25, load=f"until {loads} hang")
        live.until(lambda: len(live.workers()) == 2)
        assert steps_taken() == [12]
        loads.touch()
        reload(25, load=f"until {loads} hang")
        live.until(lambda: len(live.logged("new workers have taken over")) == 1)
        assert steps_taken() == [12, 20]
        reload(35, load="fail broken weights")
        live.until(lambda: bool(live.logged("reload failed, the old workers stay", "broken weights")))
        assert steps_taken() == [12, 20]
        reload(12)
        live.until(lambda: len(live.logged("new workers have taken over")) == 2)
        assert steps_taken() == [12]


def test_failed_reload_is_reported_by_the_reply_the_config_and_the_metrics(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"

    def write(**plugin: object) -> None:
        config.write_text(f"[[model]]\npath = '{BUILTIN_PATH}'\nplugin_config = '{json.dumps(plugin)}'")

    write()
    options = ("--config", str(config), "--admin_key", "sk-admin")
    with FaultServer(tmp_path / "spool", *options) as live, live.client() as client:
        client.headers["authorization"] = "Bearer sk-admin"
        write(capacity=3)
        reply = client.post("/v1/config/reload?wait_s=30")
        assert (reply.status_code, reply.json()["reload"]["state"]) == (200, "done")
        assert live.logged("new workers have taken over")
        write(load="hang")
        reply = client.post("/v1/config/reload?wait_s=0.1")
        assert (reply.status_code, reply.json()["reload"]["state"]) == (202, "loading")
        assert client.get(reply.headers["location"]).json()["state"] == "loading"
        write(load="fail broken weights")
        reply = client.post("/v1/config/reload?wait_s=30")
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "reload_failed")
        assert "broken weights" in reply.json()["error"]["message"]
        assert live.generate(client, "echo").status_code == 200
        part = client.get("/v1/config").json()["ovserve-builtin"]
        assert part["model_version_status"][0]["state"] == "AVAILABLE"
        assert (part["reload"]["number"], part["reload"]["state"]) == (3, "failed")
        assert "ovserve_reload_failed 1.0" in client.get("/metrics").text
        config.write_text("max_images = 'x'")
        live.signal(signal.SIGHUP)
        live.until(lambda: client.get("/v1/config/reload/status").json()["number"] == 4)
        live.until(lambda: "max_images" in client.get("/v1/config/reload/status").json()["error"])
        write()
        assert client.post("/v1/config/reload?wait_s=30").status_code == 200
        assert "ovserve_reload_failed 0.0" in client.get("/metrics").text


def test_reload_while_the_model_loads_takes_effect(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    table = f"[[model]]\npath = '{BUILTIN_PATH}'\nplugin_config = '{{}}'"
    config.write_text(table.format(json.dumps({"load": "hang"})))
    with FaultServer(tmp_path / "spool", "--config", str(config), wait_ready=False) as live:
        live.until(lambda: bool(live.workers()))
        config.write_text(table.format("{}"))
        live.signal(signal.SIGHUP)
        live.await_ready()


def test_model_that_failed_to_load_recovers_with_a_corrected_configuration(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    table = f"[[model]]\npath = '{BUILTIN_PATH}'\nplugin_config = '{{}}'"
    config.write_text(table.format(json.dumps({"load": "fail no such device", "load_s": 2.0})))
    with FaultServer(tmp_path / "spool", "--config", str(config), wait_ready=False) as live:
        live.until(lambda: bool(live.workers()))
        config.write_text(table.format(json.dumps({"load_s": 4.0})))
        live.signal(signal.SIGHUP)
        live.until(lambda: bool(live.logged("model failed")))
        live.await_ready()
        with live.client() as client:
            assert live.generate(client, "echo").status_code == 200


def test_worker_over_its_memory_limit_fails_only_its_job(tmp_path: Path) -> None:
    limit = str(300 << 20)
    with FaultServer(tmp_path, "--memory_limit_bytes", limit, "--replicas", "2") as server, server.client() as client:
        server.until(lambda: server.model_status()["workers"] == 2)
        replies: list[httpx.Response] = []
        leak = threading.Thread(target=lambda: replies.append(server.generate(client, "leak")))
        leak.start()
        while leak.is_alive():
            assert server.generate(client, "echo").status_code == 200
        assert replies[0].json()["error"]["code"] == "worker_crashed"
        assert server.logged("worker killed", "memory:", "300 MiB allowed")


def test_metrics_report_spool_use_and_worker_restarts(tmp_path: Path) -> None:
    def figure(name: str) -> float:
        page = client.get("/metrics").text
        return next(
            float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith((name + " ", name + "{"))
        )

    with FaultServer(tmp_path, "--spool_bytes", str(16 << 20)) as server, server.client() as client:
        figures = {name: figure(name) for name in WATCHED if name != "ovserve_node_workers"}  # of a cluster alone
        assert figures["ovserve_memory_bytes"] > figures["ovserve_model_memory_bytes"] > 0
        assert figures["ovserve_model_state"] in (0, 1)  # one line for each state
        assert {name: number for name, number in figures.items() if "memory" not in name and "model" not in name} == {
            "ovserve_queued_jobs": 0,
            "ovserve_running_jobs": 0,
            "ovserve_ready_workers": 1,
            "ovserve_worker_restarts_total": 0,
            "ovserve_worker_deaths_total": 0,
            "ovserve_job_retries_total": 0,
            "ovserve_device_calls_total": 0,
            "ovserve_device_rows_total": 0,
            "ovserve_cache_lookups_total": 0,
            "ovserve_usage_errors_total": 0,
            "ovserve_spool_bytes": 0,
            "ovserve_spool_warm_bytes": 0,
            "ovserve_spool_free_bytes": 16 << 20,
            "ovserve_spool_limit_bytes": 16 << 20,
            "ovserve_reloads_total": 0,
            "ovserve_reload_failed": 0,
        }
        sleeper = threading.Thread(target=server.edit, args=(client, "sleep 1"))
        sleeper.start()
        server.until(lambda: figure("ovserve_running_jobs") == 1)
        assert 0 < figure("ovserve_spool_bytes") < 1 << 20
        sleeper.join()
        server.until(lambda: figure("ovserve_spool_bytes") == 0)
        assert figure("ovserve_spool_warm_bytes") > 0
        server.kill_worker()
        server.until(lambda: figure("ovserve_worker_restarts_total") == 1)
        assert 'cause="crash",model="ovserve-builtin"} 1.0' in client.get("/metrics").text


def test_worker_has_a_higher_oom_score_than_the_front_end(plain: FaultServer) -> None:
    pids = (plain.process.pid, plain.workers()[0])
    ranks = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in pids]
    assert ranks[1] >= min(1000, ranks[0] + 500)


def test_descriptors_do_not_grow_with_worker_deaths(plain: FaultServer) -> None:
    server = plain
    with server.client() as client:
        picture_of(server.generate(client, "echo"))
        before = len(descriptors_of(server.process.pid))
        for _ in range(5):
            pid = server.kill_worker()
            assert server.generate(client, "echo").status_code == 200
            assert gone(pid)
        server.until(lambda: len(descriptors_of(server.process.pid)) <= before)


@contextmanager
def soft_descriptor_limit(limit: int) -> Iterator[None]:
    """Set the soft limit on descriptors for processes started within the block."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_descriptor_limit_is_raised_to_the_hard_limit(tmp_path: Path) -> None:
    with soft_descriptor_limit(256), FaultServer(tmp_path, "--max_connections", "100000") as server:
        soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        assert soft == (65536 if hard == resource.RLIM_INFINITY else min(hard, 65536))
        assert server.logged("WARNING", "max_connections may need more descriptors", f"limit={soft}", "needed=500640")
