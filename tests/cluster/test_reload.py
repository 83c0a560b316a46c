"""A reload of a server whose workers are on a cluster: models that have not changed keep their actors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.faultserver import FaultServer, picture_of
from tests.live import BUILTIN_PATH
from tests.raycluster import RayCluster

ADMIN = {"authorization": "Bearer sk-admin"}
PATIENCE_S = 60.0


def test_reload_replaces_the_actors_of_changed_models_alone(cluster: RayCluster, tmp_path: Path) -> None:
    def write(*models: dict[str, Any]) -> None:
        lines = [f'default_pool = "ray"\nray_address = "{cluster.address}"']
        for model in models:
            values = {"path": BUILTIN_PATH, "placement": "cpus=1", **model}
            lines += ["[[model]]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        (tmp_path / "config.toml").write_text("\n".join(lines))

    kept, toy = {"name": "kept"}, json.dumps({"capacity": 3})
    write(kept, {"name": "changed"})
    options = ("--config", str(tmp_path / "config.toml"), "--admin_key", "sk-admin")
    others = set(cluster.actors())  # of servers that end now
    with FaultServer(tmp_path / "spool", *options) as server, server.client() as client:
        server.until(lambda: all(model["ready"] for model in server.fetch("/v3/models")[1]["data"]), PATIENCE_S)
        first = set(cluster.actors()) - others
        assert len(first) == 2
        write(kept, {"name": "changed", "plugin_config": toy})
        assert client.post("/v1/config/reload?wait_s=60", headers=ADMIN).status_code == 200
        server.until(lambda: len(set(cluster.actors()) - others) == 2, PATIENCE_S)
        assert len(first & set(cluster.actors())) == 1
        ready = [line.split("worker=")[1].split()[0] for line in server.logged("worker ready")]
        assert sorted(ready) == ["changed/0#0", "changed/0#1", "kept/0#0"]
        for name in ("kept", "changed"):
            assert picture_of(server.generate(client, "echo x", model=name)).startswith(b"echo x")
