"""Models that are being pulled: which are, what the catalog and the API say of them, and what ends a pull."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from ovserve.api.readiness import awaited_models, is_ready
from ovserve.api.replies import pending_object
from ovserve.errors import ModelNotFound, NotReady, SettingsError
from ovserve.hub.background import Pulls
from ovserve.hub.stored import RECORD
from ovserve.models.catalog import Catalog
from ovserve.models.pending import PendingModel, PullState
from ovserve.models.profile import builtin_directory
from ovserve.settings.options import Settings
from ovserve.settings.sources import load_settings
from tests.fakehub import FakeHub

REPOSITORY = "owner/shapes"


def settings(root: Path, *tables: str, **flags: str) -> Settings:
    (root / "c.toml").write_text("\n".join(tables))
    return load_settings({"model_repository_path": str(root / "models"), **flags}, {}, root / "c.toml")


PULLED = f'[[model]]\nsource_model = "{REPOSITORY}"\naliases = ["alias"]'


def put_in_place(root: Path, revision: str = "main") -> Path:
    """Write a repository as a pull leaves it."""
    directory = root / "models" / REPOSITORY
    shutil.copytree(builtin_directory(), directory)
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    record = {"repository": REPOSITORY, "revision": revision, "commit": "a" * 40, "weight_format": "", "files": sizes}
    (directory / RECORD).write_text(json.dumps(record))
    return directory


def test_complete_repository_is_served_from_its_directory(tmp_path: Path) -> None:
    directory = put_in_place(tmp_path)
    found, pending = Pulls({}, lambda: None).resolve(settings(tmp_path, PULLED))
    assert not pending
    assert (found.models[0].name, found.models[0].path) == (REPOSITORY, directory)


@pytest.mark.parametrize("damage", ["revision", "missing", "short", "record"])
def test_incomplete_repository_is_pending(tmp_path: Path, damage: str) -> None:
    directory = put_in_place(tmp_path, "v2" if damage == "revision" else "main")
    if damage == "missing":
        (directory / "unet" / "config.json").unlink()
    elif damage == "short":
        (directory / "unet" / "openvino_model.bin").write_bytes(b"")
    elif damage == "record":
        (directory / RECORD).write_text("[" * 10**5)
    found, pending = Pulls({}, lambda: None).resolve(settings(tmp_path, PULLED))
    assert not found.models
    assert pending.keys() == {REPOSITORY, "alias"}
    assert pending["alias"] is pending[REPOSITORY]


def test_pull_of_a_model_ends_with_a_call_and_a_complete_directory(tmp_path: Path) -> None:
    shutil.copytree(builtin_directory(), tmp_path / "hub" / REPOSITORY)
    pulled = threading.Event()
    with FakeHub(tmp_path / "hub") as hub:
        pulls = Pulls({"HF_ENDPOINT": hub.url, "OVSERVE_API_KEY": "secret"}, pulled.set)
        wanted = settings(tmp_path, PULLED)
        pulls.resolve(wanted)
        pulls.start()
        assert pulled.wait(60)
        found, pending = pulls.resolve(wanted)
        assert (len(found.models), pending) == (1, {})
        pulls.stop()


def test_pull_that_cannot_succeed_fails_and_is_tried_again_at_a_reload(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    with FakeHub(tmp_path / "hub") as hub:
        pulls = Pulls({"HF_ENDPOINT": hub.url}, lambda: None)
        wanted = settings(tmp_path, PULLED)
        _, pending = pulls.resolve(wanted)
        pulls.start()
        model, until = pending[REPOSITORY], threading.Event()
        for _ in range(600):
            if model.state.has_failed or until.wait(0.1):
                break
        assert model.reason.startswith(f"pull failed {REPOSITORY}: {REPOSITORY}: no such repository")
        _, again = pulls.resolve(wanted)
        assert again[REPOSITORY] is not model
        _, none = pulls.resolve(settings(tmp_path, '[[model]]\npath = "builtin:shapes"'))
        assert not none
        pulls.stop()


def test_catalog_answers_for_a_pending_model() -> None:
    model = PendingModel("m", REPOSITORY, "main")
    model.state = PullState("5 of 10 bytes", 50.0, 3.0)
    catalog = Catalog({}, "", {"*": "other"}, pending={"m": model, "alias": model})
    for name in ("m", "alias", None):
        with pytest.raises(NotReady, match=rf"pulling {REPOSITORY} 50 %: 5 of 10 bytes") as failure:
            catalog.find(name)
        assert failure.value.retry_after_s
    with pytest.raises(ModelNotFound, match="'m', 'alias'"):
        catalog.find("x")
    document = pending_object(model, "alias", 1)
    assert (document["id"], document["alias_of"], document["state"], document["ready"]) == (
        "alias",
        "m",
        "pulling",
        False,
    )
    assert document["pulling"] == {"percent": 50.0, "left_s": 3.0, "repository": REPOSITORY}


@pytest.mark.parametrize("which", ["default", "any", "all"])
def test_readiness_waits_for_a_pending_model_but_not_for_a_failed_one(which: str) -> None:
    model = PendingModel("m", REPOSITORY, "main")
    catalog, options = Catalog({}, "", pending={"m": model}), Settings(ready_models=which)
    assert not is_ready(options, catalog, {})
    assert awaited_models(options, catalog, {}) == ["m"]
    model.state = PullState("gated", has_failed=True)
    assert not is_ready(options, catalog, {})
    assert not awaited_models(options, catalog, {})


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"source_model": "owner"}, "expected OWNER/NAME"),
        ({"source_model": "../x", "name": "m"}, "expected OWNER/NAME"),
        ({"source_model": "a/b", "revision": "../x"}, "expected a branch, tag or commit"),
        ({"source_model": "a/b", "path": "/m"}, "path and source_model exclude each other"),
    ],
)
def test_wrong_source_model_is_an_error(table: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load_settings(table, {})
