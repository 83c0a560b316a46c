"""The configuration and the models' files change while clients send requests: no request fails."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ovserve.models.plans import Plan, write_plan
from ovserve.models.profile import builtin_directory
from tests.faultserver import FaultServer, gone
from tests.live import BUILTIN_PATH

ADMIN = {"authorization": "Bearer sk-admin"}


def tables(*models: dict[str, Any]) -> str:
    """Return [[model]] tables of toy models."""
    lines = []
    for model in models:
        toy = json.dumps({"load_s": 0.2, "capacity": 4, **model.pop("toy", {})})
        values = {"path": BUILTIN_PATH, "plugin_config": toy, **model}
        lines += ["[[model]]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines)


def serve(folder: Path, text: str, *arguments: str) -> FaultServer:
    (folder / "config.toml").write_text(text)
    return FaultServer(folder / "spool", "--config", str(folder / "config.toml"), "--admin_key", "sk-admin", *arguments)


def await_models(server: FaultServer) -> None:
    """Wait until every model is ready: the server is ready before, and requests for a model that loads get 503."""
    server.until(lambda: all(model["ready"] for model in server.fetch("/v3/models")[1]["data"]))


@contextmanager
def load(server: FaultServer, *names: str) -> Iterator[Counter[tuple[str, int]]]:
    """Send requests for these models without a pause, each from a thread; count the replies by name and status."""
    counts: Counter[tuple[str, int]] = Counter()
    finished = threading.Event()

    def ask(name: str) -> None:
        with server.client() as client:
            while not finished.is_set():
                counts[name, server.generate(client, "sleep 0.02", model=name).status_code] += 1

    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        finished.set()
        for thread in threads:
            thread.join()


def pids(server: FaultServer) -> dict[str, int]:
    """Return the process id of each worker that was started, by its name in the log."""
    started = [
        dict(word.split("=", 1) for word in line.split() if "=" in word) for line in server.logged("worker started")
    ]
    return {each["worker"]: int(each["pid"]) for each in started}


def test_models_are_added_renamed_replaced_and_removed_under_load(tmp_path: Path) -> None:
    kept, renamed = {"name": "kept"}, {"name": "old"}
    with serve(tmp_path, tables(dict(kept), dict(renamed))) as server, server.client() as client:
        await_models(server)
        first = pids(server)

        def reload(*models: dict[str, Any]) -> None:
            (tmp_path / "config.toml").write_text(tables(*models))
            reply = client.post("/v1/config/reload?wait_s=60", headers=ADMIN)
            assert reply.status_code == 200, reply.text

        with load(server, "kept", "old") as counts:
            server.until(lambda: counts["old", 200] > 5)
            reload(dict(kept), dict(renamed), {"name": "added"})
            assert server.generate(client, "echo a", model="added").status_code == 200
            reload(dict(kept), {"name": "new", "aliases": ["old"]}, {"name": "added"})  # renamed; its old name is kept
            assert server.generate(client, "echo a", model="new").status_code == 200
            reload(dict(kept), {"name": "new", "aliases": ["old"], "toy": {"capacity": 3}})  # replaced; `added` goes
            before = counts["old", 200]
            server.until(lambda: counts["old", 200] > before + 5)
        assert {status for _, status in counts} == {200}, counts
        assert server.generate(client, "echo a", model="added").status_code == 404
        assert pids(server).keys() == {"kept/0#0", "old/0#0", "added/0#0", "new/0#0", "new/0#1"}
        assert not gone(first["kept/0#0"])
        server.until(
            lambda: all(gone(pid) for name, pid in pids(server).items() if name not in ("kept/0#0", "new/0#1"))
        )


def test_weights_are_swapped_under_load_and_noticed_by_the_watch(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(builtin_directory(), model)
    configured = tables({"name": "kept"}, {"name": "swapped", "path": str(model)})
    with serve(tmp_path, configured, "--watch", "true", "--watch_interval_s", "0.1") as server:
        await_models(server)
        with load(server, "kept", "swapped") as counts:
            weights = next(model.glob("unet/*.bin"))
            (tmp_path / "fresh.bin").write_bytes(weights.read_bytes())
            (tmp_path / "fresh.bin").replace(weights)
            os.utime(weights, (1, 1))
            server.until(lambda: bool(server.logged("new workers have taken over")))
            (tmp_path / "config.toml").write_text("this is not TOML")
            server.until(lambda: bool(server.logged("reload failed, the old configuration stays")))
            before = counts["swapped", 200]
            server.until(lambda: counts["swapped", 200] > before + 5)
        assert {status for _, status in counts} == {200}, counts
        assert pids(server).keys() == {"kept/0#0", "swapped/0#0", "swapped/0#1"}
        server.until(lambda: gone(pids(server)["swapped/0#0"]))
        with server.client() as client:
            part = client.get("/v1/config").json()["kept"]["reload"]
            assert (part["state"], "config.toml" in part["reason"]) == ("failed", True)


def test_another_stored_plan_replaces_the_workers_that_use_it_and_no_others(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(builtin_directory(), model)
    write_plan(model, "unet", "CPU", Plan())
    configured = tables({"name": "exact", "path": str(model)}, {"name": "m", "path": str(model), "plan": "measured"})
    with serve(tmp_path, configured, "--watch", "true", "--watch_interval_s", "0.1") as server:
        await_models(server)
        write_plan(model, "unet", "CPU", Plan({}, {"vae_tile_px": 256}))
        server.until(lambda: bool(server.logged("new workers have taken over")))
        assert pids(server).keys() == {"exact/0#0", "m/0#0", "m/0#1"}


@pytest.mark.parametrize("wait_s", ["0", "30"])
def test_two_configurations_in_quick_succession_end_with_the_second(tmp_path: Path, wait_s: str) -> None:
    with serve(tmp_path, tables({"name": "m"})) as server, server.client() as client:
        with load(server, "m") as counts:
            statuses = []
            for capacity in (2, 3):
                (tmp_path / "config.toml").write_text(
                    tables({"name": "m", "toy": {"capacity": capacity, "load_s": 1.0}})
                )
                statuses.append(client.post(f"/v1/config/reload?wait_s={wait_s}", headers=ADMIN).status_code)
            assert statuses == ([202, 202] if wait_s == "0" else [200, 200])
            server.until(lambda: client.get("/v1/config/reload/status").json()["state"] == "done")
            server.until(lambda: len(server.workers()) == 1)
        assert {status for _, status in counts} == {200}, counts
        newest = max(pids(server), key=lambda name: int(name.rpartition("#")[2]))
        assert server.workers() == [pids(server)[newest]]
        assert client.get("/v1/config/reload/status").json()["number"] == 2
