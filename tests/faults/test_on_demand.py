"""Models loaded on demand, over HTTP: waiting, progress, states, unloading under a stream, dying while loading."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ovserve.cli import models
from ovserve.models.profile import builtin_directory
from ovserve.models.weights import component_bytes
from tests.faultserver import FaultServer, picture_of
from tests.live import BUILTIN_PATH


def table(name: str, *, load_s: float = 0.2, toy: dict[str, Any] | None = None, **options: Any) -> str:
    """Return the [[model]] table of a lazy toy model."""
    values = {
        "name": name,
        "path": BUILTIN_PATH,
        "load": "lazy",
        "plugin_config": json.dumps({"load_s": load_s, "capacity": 4, **(toy or {})}),
        **options,
    }
    return "\n".join(["[[model]]", *(f"{key} = {_toml(value)}" for key, value in values.items())])


def _toml(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value).lower()


def serve(folder: Path, *tables: str, server: str = "") -> FaultServer:
    config = folder / "config.toml"
    config.write_text("\n".join([server, *tables]))
    return FaultServer(folder / "spool", "--config", str(config), "--admin_key", "sk-admin")


def state(client: httpx.Client, name: str) -> dict[str, Any]:
    document: dict[str, Any] = client.get(f"/v3/models/{name}").json()
    return document


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    with serve(
        tmp_path_factory.mktemp("lazy"),
        table("quick", keep_alive_s=0.5),
        table("slow", load_s=4.0, keep_alive_s=-1),
    ) as server:
        yield server


def test_server_without_a_loaded_model_is_ready_and_loads_with_the_first_request(live: FaultServer) -> None:
    with live.client() as client:
        assert client.get("/v2/health/ready").status_code == 200
        assert state(client, "quick")["state"] == "unloaded"
        assert picture_of(live.generate(client, "echo a", model="quick", seed=1)) == b"echo a|1"
        live.until(lambda: state(client, "quick")["state"] == "unloaded" and not live.workers())
        assert picture_of(live.generate(client, "echo a", model="quick", seed=1)) == b"echo a|1"
        live.until(lambda: 'ovserve_model_unloads_total{model="quick"} 2.0' in client.get("/metrics").text)
        assert 'ovserve_model_loads_total{model="quick"} 2.0' in client.get("/metrics").text


def test_stream_gets_comments_while_its_model_loads_and_a_short_deadline_passes(live: FaultServer) -> None:
    with live.client() as client:
        seen: list[str] = []

        def read() -> None:
            body = {"prompt": "echo a", "model": "slow", "stream": True}
            with client.stream("POST", "/v3/images/generations", json=body) as reply:
                seen.extend(line for line in reply.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        live.until(lambda: state(client, "slow")["state"] == "loading")
        assert set(state(client, "slow")["loading"]) == {"percent", "seconds"}
        late = live.generate(client, "echo a", model="slow", timeout_s=0.5)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "while its model was being loaded" in late.json()["error"]["message"]
        reader.join()
        comments = [line for line in seen if line.startswith(": model slow is loading")]
        assert len(comments) >= 2
        assert any("event: image_generation.completed" in line for line in seen)
        assert state(client, "slow")["state"] == "ready"


def test_worker_that_is_killed_while_it_loads_is_started_again_for_the_waiting_requests(tmp_path: Path) -> None:
    with serve(tmp_path, table("m", load_s=1.0)) as server, server.client() as client:
        replies: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: replies.append(server.generate(client, "echo a", model="m", seed=3)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        server.until(lambda: len(server.workers()) == 1)
        [pid] = server.workers()
        os.kill(pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert [picture_of(reply) for reply in replies] == [b"echo a|3"] * 4
        assert len(server.logged("worker died")) == 1


def test_stream_goes_on_when_its_model_is_removed(tmp_path: Path) -> None:
    first = table("m", keep_alive_s=0)
    with serve(tmp_path, first, table("other")) as server, server.client() as client:
        body = {"prompt": "steps 20 0.1", "model": "m", "stream": True}
        with client.stream("POST", "/v3/images/generations", json=body) as reply:
            lines = reply.iter_lines()
            assert any("step 1/20" in line for line in lines)
            (tmp_path / "config.toml").write_text(table("other"))
            reload = client.post("/v1/config/reload", headers={"authorization": "Bearer sk-admin"})
            assert reload.status_code == 200
            rest = list(lines)
        assert any("step 20/20" in line for line in rest)
        assert any("event: image_generation.completed" in line for line in rest)
        server.until(lambda: not server.workers())


def admin(client: httpx.Client, path: str, **query: Any) -> httpx.Response:
    return client.post(path, params=query, headers={"authorization": "Bearer sk-admin"})


def test_operator_loads_and_unloads_a_model_whose_name_has_a_slash(tmp_path: Path) -> None:
    with serve(tmp_path, table("org/m", keep_alive_s=0)) as server, server.client() as client:
        assert client.post("/v1/models/org/m/load").status_code == 403
        reply = admin(client, "/v1/models/org/m/load", keep_alive=-1, wait_s=30)
        assert (reply.status_code, reply.json()["state"]) == (200, "ready")
        [pid] = server.workers()
        assert server.generate(client, "echo a", model="org/m").status_code == 200
        assert server.workers() == [pid]
        reply = admin(client, "/v3/models/org%2Fm/unload", wait_s=30)
        assert (reply.status_code, reply.json()["state"]) == (200, "unloaded")
        server.until(lambda: not server.workers())
        assert admin(client, "/v1/models/none/load").status_code == 404
        assert admin(client, "/v1/models/org/m/load", keep_alive="x").status_code == 400


def test_unload_lets_a_running_stream_end(tmp_path: Path) -> None:
    with serve(tmp_path, table("m", keep_alive_s=-1)) as server, server.client() as client:
        body = {"prompt": "steps 20 0.1", "model": "m", "stream": True}
        with client.stream("POST", "/v3/images/generations", json=body) as stream:
            lines = stream.iter_lines()
            assert any("step 1/20" in line for line in lines)
            reply = admin(client, "/v1/models/m/unload", wait_s=0.1)
            assert (reply.status_code, reply.json()["state"]) == (202, "unloading")
            rest = list(lines)
        assert any("event: image_generation.completed" in line for line in rest)
        server.until(lambda: state(client, "m")["state"] == "unloaded")


def test_failed_model_is_tried_again_when_an_operator_loads_it(tmp_path: Path) -> None:
    marker = tmp_path / "repaired"
    model = table("m", toy={"load": f"until {marker} fail no device"})
    with serve(tmp_path, model) as server, server.client() as client:
        reply = admin(client, "/v1/models/m/load", wait_s=30)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_failed")
        assert "no device" in reply.json()["error"]["message"]
        marker.touch()
        assert admin(client, "/v1/models/m/load", wait_s=30).status_code == 200


def test_keep_alive_of_a_request_shortens_and_lengthens_the_stay(tmp_path: Path) -> None:
    model = table("m", keep_alive_s=0.2)
    with serve(tmp_path, model, server="keep_alive_max_s = 60") as server, server.client() as client:
        assert server.generate(client, "echo a", model="m", keep_alive=60).status_code == 200
        server.until(lambda: state(client, "m")["running"] == 0)
        assert state(client, "m")["state"] == "ready"
        assert server.generate(client, "echo a", model="m", keep_alive=0).status_code == 200
        server.until(lambda: state(client, "m")["state"] == "unloaded")
        for value in (61, -1):
            reply = server.generate(client, "echo a", model="m", keep_alive=value)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "keep_alive")


def test_command_models_shows_loads_and_unloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(tmp_path, table("m", keep_alive_s=-1)) as server:
        monkeypatch.setenv("OVSERVE_ADMIN_KEY", "sk-admin")
        assert models.run(["--url", server.url]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["m", "unloaded", "CPU"]
        assert models.run(["--url", server.url, "--load", "m"]) == 0
        assert "ready" in capsys.readouterr().out
        assert models.run(["--url", server.url, "--unload", "m", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["data"][0]["state"] == "unloaded"
        assert models.run(["--url", server.url, "--load", "none"]) == 75
        assert "404: The model 'none' does not exist" in capsys.readouterr().err
        monkeypatch.setenv("OVSERVE_ADMIN_KEY", "")
        assert models.run(["--url", server.url, "--load", "m"]) == 75
        assert "403: " in capsys.readouterr().err


def test_models_take_turns_in_the_memory_of_a_device_and_leave_the_others_alone(tmp_path: Path) -> None:
    weights = sum(component_bytes(builtin_directory()))
    report = {"devices": {"GPU.0": [weights * 3 // 2, weights]}}
    tables = [table(name, device="GPU", toy=report, keep_alive_s=-1) for name in ("first", "second")]
    tables.append(table("on-cpu", keep_alive_s=-1))
    with serve(tmp_path, *tables, server="min_resident_s = 0.1") as server, server.client() as client:
        for name in ("on-cpu", "first", "second", "first"):
            assert picture_of(server.generate(client, "echo a", model=name, seed=1)) == b"echo a|1"
            other = {"first": "second", "second": "first"}.get(name)
            assert other is None or state(client, other)["state"] in ("unloaded", "unloading")
            assert state(client, "on-cpu")["state"] == "ready"
        loads = client.get("/metrics").text
        assert 'ovserve_model_loads_total{model="first"} 2.0' in loads
        assert 'ovserve_model_loads_total{model="on-cpu"} 1.0' in loads


def test_requests_for_more_models_than_fit_are_all_answered_within_the_budget(tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(4)]
    # A toy worker takes about 30 MiB by measurement; its estimate before the first load is 350 MiB.
    options = f"memory_budget_bytes = {900 << 20}\nmin_resident_s = 0.2"
    with serve(tmp_path, *map(table, names), server=options) as server, server.client() as client:
        statuses: list[int] = []

        def ask(client_number: int) -> None:
            for turn in range(6):
                name = names[(client_number + turn) % len(names)]
                statuses.append(server.generate(client, "sleep 0.05", model=name).status_code)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 24
        metrics = client.get("/metrics").text
        used = next(line for line in metrics.splitlines() if line.startswith("ovserve_memory_bytes "))
        assert 0 < float(used.split()[1]) <= 900 << 20
