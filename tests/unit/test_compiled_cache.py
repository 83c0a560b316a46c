"""The cache of compiled models: nothing damaged, unlisted or half written is left when a model is loaded from it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ovserve.settings.options import NO_CACHE, ModelSettings, Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.worker import compiled_cache
from ovserve.worker.compiled_cache import CompiledCache, cache_key, cache_root, open_cache
from tests.toys import toy_profile

MIB = 1 << 20
BLOB = bytes(range(256)) * 6000  # two chunks


def cache(root: Path, key: str = "m", limit: int = 1 << 40) -> CompiledCache:
    return CompiledCache(root, key, limit)


def fill(root: Path, key: str = "m", content: bytes = BLOB, limit: int = 1 << 40) -> Path:
    """Store one blob as a worker does; return its path."""
    made = cache(root, key, limit)
    assert made.open()
    blob = made.folder / "1.blob"
    if not blob.exists():
        blob.write_bytes(content)
    made.record()
    made.close()
    return blob


def reopened(root: Path) -> list[str]:
    """Return the files that a worker finds in the folder."""
    made = cache(root)
    assert made.open()
    names = sorted(path.name for path in made.folder.iterdir())
    made.close()
    return names


def test_file_stays_while_it_is_unchanged(tmp_path: Path) -> None:
    fill(tmp_path)
    assert reopened(tmp_path) == ["1.blob", "checksums.json", "lock"]
    assert os.stat(tmp_path / "m").st_mode & 0o777 == 0o700


@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255), st.integers(0, 2000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_flipped_byte_deletes_the_file(tmp_path: Path, position: int, flip: int, cut: int) -> None:
    blob = fill(tmp_path)
    damaged = bytearray(BLOB[: len(BLOB) - cut])
    damaged[min(position, len(damaged) - 1)] ^= flip
    blob.write_bytes(damaged)
    os.utime(blob, (1, 1))
    assert "1.blob" not in reopened(tmp_path)


def test_file_of_a_worker_that_died_while_it_wrote_is_deleted(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "m" / "2.blob").write_bytes(b"half")
    assert "2.blob" not in reopened(tmp_path)
    assert "1.blob" in reopened(tmp_path)


@given(st.one_of(st.binary(max_size=50), st.sampled_from([b"[]", b"{}", b'{"1.blob": 3}', b'{"1.blob": ["x"]}'])))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_any_list_of_checksums_is_read_or_ignored(tmp_path: Path, content: bytes) -> None:
    fill(tmp_path)
    (tmp_path / "m" / "checksums.json").write_bytes(content)
    assert "1.blob" not in reopened(tmp_path)


def test_symbolic_link_and_directory_in_the_folder_are_not_served(tmp_path: Path) -> None:
    blob = fill(tmp_path)
    outside = tmp_path / "outside"
    outside.write_bytes(BLOB)
    blob.unlink()
    blob.symlink_to(outside)
    assert "1.blob" not in reopened(tmp_path)
    assert outside.read_bytes() == BLOB


def test_least_recently_used_folders_are_deleted_above_the_limit(tmp_path: Path) -> None:
    for number, key in enumerate("abc"):
        blob = fill(tmp_path, key)
        os.utime(blob.with_name("checksums.json"), (number, number))
    assert cache(tmp_path, "a").open()  # now the most recently used; no longer locked when this object is collected
    (tmp_path / "foreign").mkdir()
    fill(tmp_path, "d", limit=3 * len(BLOB) + 5000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d", "foreign"]


def test_folder_in_use_is_not_deleted(tmp_path: Path) -> None:
    used = cache(tmp_path, "a")
    fill(tmp_path, "a")
    assert used.open()
    fill(tmp_path, "b", limit=len(BLOB))
    assert (tmp_path / "a").exists()
    used.close()
    fill(tmp_path, "c", limit=len(BLOB))
    assert not (tmp_path / "a").exists()


def test_workers_load_from_one_folder_at_the_same_time(tmp_path: Path) -> None:
    fill(tmp_path)
    first, second = cache(tmp_path), cache(tmp_path)
    assert first.open()
    assert second.open()
    first.close()
    second.close()


def test_worker_loads_without_the_cache_while_another_writes_for_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_cache, "LOCK_WAIT_S", 0.2)
    writer, beats = cache(tmp_path), []
    assert writer.open()
    other = CompiledCache(tmp_path, "m", 1 << 40, lambda: beats.append(1))
    assert not other.open()
    assert beats
    writer.record()
    assert other.open()
    writer.close()
    other.close()


def test_model_is_not_cached_when_there_is_too_little_space(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not cache(tmp_path, limit=100 * MIB).open(expected_bytes=90 * MIB)
    assert "too little space" in caplog.text
    assert cache(tmp_path, limit=300 * MIB).open(expected_bytes=90 * MIB)


def test_folder_that_was_deleted_while_it_was_opened_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def delete_first(descriptor: int, operation: int) -> None:
        if (tmp_path / "m" / "lock").exists():
            (tmp_path / "m" / "lock").unlink()
            (tmp_path / "m" / "lock").touch()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    with pytest.raises(FileNotFoundError, match="deleted by another worker"):
        cache(tmp_path).open()


WORKER = WorkerSettings.of(Settings())


def test_key_changes_with_the_models_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    profile = dataclasses.replace(toy_profile(), directory=model)
    keys = {cache_key(profile, tmp_path)}
    (model / "weights.bin").write_bytes(b"1")
    keys.add(cache_key(profile, tmp_path))
    os.utime(model / "weights.bin", (1, 1))
    keys.add(cache_key(profile, tmp_path))
    assert len(keys) == 3
    assert all(key.startswith("model-") for key in keys)


def test_default_is_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/x")
    assert cache_root(ModelSettings(name="m")) == Path("/var/cache/x/compiled")
    assert cache_root(ModelSettings(name="m", cache_dir=NO_CACHE)) is None
    assert cache_root(ModelSettings(name="m", cache_dir=Path("/c"))) == Path("/c")


def test_directory_that_cannot_be_used_means_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    model = ModelSettings(name="m", cache_dir=tmp_path / "file" / "below")
    assert open_cache(toy_profile(), model, WORKER, lambda: None) is None
    assert "not cached" in caplog.text
    assert open_cache(toy_profile(), ModelSettings(name="m", cache_dir=NO_CACHE), WORKER, lambda: None) is None


def test_list_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    blob = fill(tmp_path)
    document = json.loads(blob.with_name("checksums.json").read_text())
    assert document["1.blob"][0] == len(BLOB)
    assert len(document["1.blob"]) == 3
