"""Stored pictures: names, expiry, size limit, byte ranges."""

from __future__ import annotations

import os
import pwd
import tempfile
import time
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.api.store import Store, default_store, parse_range
from ovserve.errors import NotFound, RangeNotSatisfiable, SettingsError
from ovserve.settings.options import Settings

MIB = 1024 * 1024


def store(folder: Path, **settings: float) -> Store:
    return Store(Settings(store_dir=folder, **settings))  # type: ignore[arg-type]


def test_picture_is_found_by_its_name(tmp_path: Path) -> None:
    kept = store(tmp_path / "s")
    names = {kept.keep(memoryview(b"data"), "png") for _ in range(20)}
    assert len(names) == 20
    found = kept.find(names.pop())
    assert (found.data, found.media_type) == (b"data", "image/png")
    assert 3500 < found.expires_in_s <= 3600


@pytest.mark.parametrize(
    "name", ["", "a.png", "../" * 8 + "etc/passwd", "x" * 32 + ".exe", "x" * 32 + ".png\n", "%2e%2e"]
)
def test_invalid_names_are_not_found(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFound):
        store(tmp_path).find(name)


def test_expired_picture_is_not_found_and_is_removed(tmp_path: Path) -> None:
    kept = store(tmp_path, url_ttl_s=60.0)
    name = kept.keep(memoryview(b"old"), "webp")
    os.utime(tmp_path / name, (time.time() - 61,) * 2)
    with pytest.raises(NotFound):
        kept.find(name)
    kept.keep(memoryview(b"new"), "webp")
    assert not (tmp_path / name).exists()


def test_oldest_pictures_are_removed_at_the_size_limit(tmp_path: Path) -> None:
    kept = store(tmp_path, store_bytes=MIB)
    names = []
    for age in range(5, 0, -1):
        names.append(kept.keep(memoryview(bytes(300_000)), "png"))
        os.utime(tmp_path / names[-1], (time.time() - age,) * 2)
    left = [name for name in names if (tmp_path / name).exists()]
    assert left == names[2:]


def test_new_store_finds_the_pictures_of_an_old_one(tmp_path: Path) -> None:
    name = store(tmp_path).keep(memoryview(b"data"), "jpeg")
    assert store(tmp_path).find(name).data == b"data"


def test_directory_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    store(tmp_path / "s").keep(memoryview(b"data"), "png")
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o700


def test_default_directory_follows_systemd_and_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    assert default_store() == Path("/c/ovserve/pictures")
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/ovserve")
    assert default_store() == Path("/var/cache/ovserve/pictures")


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the temporary directory of a user without HOME and without an entry in the user database."""

    def unknown(_: int) -> NoReturn:
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "CACHE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_user_without_a_home_has_a_private_default_directory(homeless: Path) -> None:
    own = homeless / f"ovserve-{os.getuid()}"
    assert default_store() == default_store() == own / "pictures"
    assert own.stat().st_mode & 0o777 == 0o700


def test_default_directory_that_other_users_can_write_is_rejected(homeless: Path) -> None:
    own = homeless / f"ovserve-{os.getuid()}"
    own.mkdir()
    own.chmod(0o777)
    with pytest.raises(SettingsError, match="store_dir"):
        default_store()
    own.rmdir()
    own.symlink_to("/")
    with pytest.raises(SettingsError, match="store_dir"):
        default_store()


@pytest.mark.parametrize(
    ("value", "part"),
    [(None, None), ("bytes=0-0", (0, 1)), ("bytes=2-", (2, 10)), ("bytes=-3", (7, 10)), ("bytes=0-99", (0, 10)),
     ("bytes=-99", (0, 10)), ("bytes=5-2", None), ("bytes=0-1,3-4", None), ("lines=0-1", None), ("bytes=-", None),
     ("bytes=a-b", None)],
)  # fmt: skip
def test_range_is_parsed(value: str | None, part: tuple[int, int] | None) -> None:
    assert parse_range(value, 10) == part


@pytest.mark.parametrize("value", ["bytes=10-", "bytes=10-20", "bytes=-0"])
def test_range_outside_the_file_is_rejected(value: str) -> None:
    with pytest.raises(RangeNotSatisfiable) as caught:
        parse_range(value, 10)
    assert caught.value.headers == {"content-range": "bytes */10"}


@given(value=st.text(alphabet="bytes=0123456789-, ", max_size=24) | st.text(max_size=12), size=st.integers(1, 10**6))
def test_any_range_is_inside_the_file_or_rejected(value: str, size: int) -> None:
    try:
        part = parse_range(value, size)
    except RangeNotSatisfiable:
        return
    assert part is None or 0 <= part[0] < part[1] <= size


def test_other_files_in_the_directory_are_not_removed(tmp_path: Path) -> None:
    other = tmp_path / "holiday.jpg"
    other.write_bytes(bytes(900_000))
    os.utime(other, (0, 0))
    kept = store(tmp_path, store_bytes=MIB)
    for _ in range(5):
        kept.keep(memoryview(bytes(300_000)), "png")
    assert other.exists()
