"""Stored pictures: names, index, expiry, size limit, byte ranges, other programs in the directory."""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.api.store import Store, StoredPicture, default_store, parse_range
from ovserve.errors import NotFound, RangeNotSatisfiable, SettingsError, SpoolFull
from ovserve.settings.options import Settings

MIB = 1024 * 1024


@contextmanager
def store(folder: Path, **settings: float) -> Iterator[Store]:
    """Yield a store, and close it at the end of the block."""
    with closing(Store(Settings(store_dir=folder, **settings))) as opened:  # type: ignore[arg-type]
        yield opened


def content_of(found: StoredPicture, start: int = 0, end: int | None = None) -> bytes:
    """Read a picture and close it."""
    try:
        return b"".join(found.part(start, found.size if end is None else end).windows())
    finally:
        found.close()


def test_picture_is_found_by_its_name(tmp_path: Path) -> None:
    with store(tmp_path / "s") as kept:
        names = {kept.keep(memoryview(b"data"), "png") for _ in range(20)}
        assert len(names) == 20
        found = kept.find(names.pop())
        assert (found.size, found.media_type) == (4, "image/png")
        assert content_of(found) == b"data"
        assert 3500 < found.expires_in_s <= 3600


@pytest.mark.parametrize(
    "name", ["", "a.png", "../" * 8 + "etc/passwd", "x" * 32 + ".exe", "x" * 32 + ".png\n", "%2e%2e"]
)
def test_invalid_names_are_not_found(tmp_path: Path, name: str) -> None:
    with store(tmp_path) as kept, pytest.raises(NotFound):
        kept.find(name)


def test_oldest_pictures_are_removed_at_the_size_limit(tmp_path: Path) -> None:
    with store(tmp_path, store_bytes=MIB) as kept:
        names = [kept.keep(memoryview(bytes(300_000)), "png") for _ in range(5)]
        left = [name for name in names if (tmp_path / "pictures" / name).exists()]
        assert left == names[2:]


def test_new_store_finds_the_pictures_of_an_old_one(tmp_path: Path) -> None:
    with store(tmp_path) as old:
        name = old.keep(memoryview(b"data"), "jpeg")
    with store(tmp_path) as new:
        assert content_of(new.find(name)) == b"data"


def test_open_picture_is_readable_after_its_file_is_removed(tmp_path: Path) -> None:
    with store(tmp_path) as kept:
        name = kept.keep(memoryview(b"data"), "jpeg")
        found = kept.find(name)
        (tmp_path / "pictures" / name).unlink()
        assert content_of(found, 1, 3) == b"at"


@pytest.mark.usefixtures("leak_guard")
def test_picture_that_is_not_found_leaves_no_descriptor(tmp_path: Path) -> None:
    with store(tmp_path, url_ttl_s=60.0) as kept:
        name = kept.keep(memoryview(b"old"), "webp")
        os.utime(tmp_path / "pictures" / name, (time.time() - 61,) * 2)
        for wrong in (name, "x" * 32 + ".png"):
            with pytest.raises(NotFound):
                kept.find(wrong)


def test_picture_without_a_free_descriptor_is_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store(tmp_path) as kept:
        name = kept.keep(memoryview(b"data"), "png")

        def fail(*_: object, **__: object) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(os, "open", fail)
        with pytest.raises(SpoolFull, match="Too many open files"):
            kept.find(name)


def test_directory_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    with store(tmp_path / "s") as kept:
        kept.keep(memoryview(b"data"), "png")
    assert (tmp_path / "s" / "pictures").stat().st_mode & 0o777 == 0o700


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
    with store(tmp_path, store_bytes=MIB) as kept:
        for _ in range(5):
            kept.keep(memoryview(bytes(300_000)), "png")
    assert other.exists()


# --- the folder: other users of the machine --------------------------------------------------------------------------


def test_pictures_of_earlier_versions_are_moved_into_the_folder(tmp_path: Path) -> None:
    name = "y" * 32 + ".png"
    (tmp_path / name).write_bytes(b"old")
    (tmp_path / ("z" * 32 + ".png")).symlink_to("/etc/passwd")
    with store(tmp_path) as kept:
        kept.keep(memoryview(b"new"), "png")
        assert content_of(kept.find(name)) == b"old"
        assert not (tmp_path / name).exists()
        with pytest.raises(NotFound):
            kept.find("z" * 32 + ".png")


def test_readable_parent_is_accepted_and_the_folder_is_made_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures").chmod(0o755)
    with store(tmp_path) as kept:
        assert kept.keep(memoryview(b"data"), "png")
    assert (tmp_path / "pictures").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("mode", "is_accepted"), [(0o777, False), (0o1777, True), (0o775, True), (0o703, False)])
def test_parent_that_others_may_write_needs_the_sticky_bit(tmp_path: Path, mode: int, is_accepted: bool) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    folder.chmod(mode)
    if is_accepted:
        with store(folder) as kept:
            kept.keep(memoryview(b"data"), "png")
        return
    with pytest.raises(SettingsError, match=rf"store_dir .*/s: every user can write it \(mode 0{mode:o}\)"):
        Store(Settings(store_dir=folder))


def test_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pictures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingsError, match=r"store_dir .*/pictures: is a symbolic link"):
        Store(Settings(store_dir=tmp_path))


def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(SettingsError, match=rf"belongs to another user \(uid {own}\)"):
        Store(Settings(store_dir=tmp_path))


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_only_regular_files_are_served(tmp_path: Path, kind: str) -> None:
    name = "x" * 32 + ".png"
    with store(tmp_path) as kept:
        kept.keep(memoryview(b"data"), "png")
        path = tmp_path / "pictures" / name
        if kind == "link":
            (tmp_path / "secret").write_bytes(b"secret")
            path.symlink_to(tmp_path / "secret")
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.mkdir()
        with pytest.raises(NotFound):
            kept.find(name)


# --- the index --------------------------------------------------------------------------------------------------------


@contextmanager
def calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[Counter[str]]:
    """Count the calls of these functions of `os` within the block."""
    counted: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        for name in names:
            function = getattr(os, name)

            def call(*arguments: Any, _name: str = name, _function: Any = function, **named: Any) -> Any:
                counted[_name] += 1
                return _function(*arguments, **named)

            patch.setattr(os, name, call)
        yield counted


def fill(folder: Path, number: int, size: int = 10, age_s: float = 0.0) -> list[str]:
    """Write pictures of an earlier run, each a second younger than the one before; return their names."""
    folder = folder / "pictures"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    names = [f"{index:032d}.png" for index in range(number)]
    for index, name in enumerate(names):
        (folder / name).write_bytes(bytes(size))
        os.utime(folder / name, (time.time() - age_s - number + index,) * 2)
    return names


def until(is_so: Callable[[], bool]) -> None:
    """Wait for the store's thread, which signals nothing."""
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def store_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "store"]


@pytest.mark.parametrize("number", [10, 1000])
def test_directory_is_read_once_however_many_pictures_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fill(tmp_path, number)
    with store(tmp_path) as kept, calls(monkeypatch, "scandir", "listdir", "stat", "lstat", "fstat", "unlink") as made:
        for _ in range(20):
            kept.keep(memoryview(b"data"), "png")
        assert made["scandir"] + made["listdir"] == 2  # the folder, and its parent for pictures of earlier versions
        assert made["stat"] + made["lstat"] + made["fstat"] <= 3 * 20 + 1  # for each picture, not for each file
        assert made["unlink"] == 0


def test_only_the_pictures_that_have_to_go_are_touched_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = fill(tmp_path, 8, size=MIB // 8)
    with store(tmp_path, store_bytes=MIB) as kept:
        kept.keep(memoryview(bytes(1)), "png")
        with calls(monkeypatch, "unlink") as made:
            for _ in range(3):
                kept.keep(memoryview(bytes(MIB // 8)), "png")
        assert made["unlink"] == 3
    assert [name for name in names if (tmp_path / "pictures" / name).exists()] == names[4:]


def test_index_of_an_earlier_run_is_in_the_order_of_age(tmp_path: Path) -> None:
    names = fill(tmp_path, 4, size=MIB // 4)
    for age, name in enumerate([names[2], names[0], names[3], names[1]]):
        os.utime(tmp_path / "pictures" / name, (time.time() - age,) * 2)
    with store(tmp_path, store_bytes=MIB) as kept:
        kept.keep(memoryview(bytes(MIB // 2)), "png")
    assert [name for name in names if (tmp_path / "pictures" / name).exists()] == [names[0], names[2]]


def test_picture_larger_than_the_limit_replaces_all_others(tmp_path: Path) -> None:
    names = fill(tmp_path, 3)
    with store(tmp_path, store_bytes=MIB) as kept:
        name = kept.keep(memoryview(bytes(MIB + 1)), "png")
        assert len(content_of(kept.find(name))) == MIB + 1
    assert not any((tmp_path / "pictures" / each).exists() for each in names)


def test_failed_write_counts_nothing_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store(tmp_path, store_bytes=MIB) as kept:
        first = kept.keep(memoryview(bytes(MIB // 2)), "png")
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", raise_no_space)
            for _ in range(3):
                with pytest.raises(OSError, match="No space left"):
                    kept.keep(memoryview(bytes(MIB // 4)), "png")
        second = kept.keep(memoryview(bytes(MIB // 2)), "png")
        assert sorted(os.listdir(tmp_path / "pictures")) == sorted([first, second])


def raise_no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_pictures_of_many_threads_stay_within_the_limit(tmp_path: Path) -> None:
    with store(tmp_path, store_bytes=MIB) as kept:
        names: list[str] = []

        def keep() -> None:
            names.extend(kept.keep(memoryview(bytes(MIB // 16)), "png") for _ in range(20))

        threads = [threading.Thread(target=keep) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        left = os.listdir(tmp_path / "pictures")
        assert len(set(names)) == 160
        assert set(left) <= set(names)
        assert len(left) == 16


# --- expiry -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("leak_guard")
def test_picture_is_removed_when_it_expires(tmp_path: Path) -> None:
    kept = Store(Settings(store_dir=tmp_path, url_ttl_s=0.3))
    name = kept.keep(memoryview(b"data"), "png")
    assert len(store_threads()) == 1
    until(lambda: not (tmp_path / "pictures" / name).exists())
    until(lambda: store_threads() == [])  # without pictures no thread waits
    again = kept.keep(memoryview(b"data"), "png")
    until(lambda: not (tmp_path / "pictures" / again).exists())


@pytest.mark.usefixtures("leak_guard")
def test_pictures_of_an_earlier_run_expire_without_a_new_one(tmp_path: Path) -> None:
    names = fill(tmp_path, 5, age_s=3600)
    (tmp_path / "pictures" / ".ovserve-new-abc").write_bytes(b"of a server that was killed")
    os.utime(tmp_path / "pictures" / ".ovserve-new-abc", (0, 0))
    young = kept_file(tmp_path)
    with store(tmp_path) as kept:
        kept.start()
        until(lambda: not any((tmp_path / "pictures" / name).exists() for name in names))
        until(lambda: not (tmp_path / "pictures" / ".ovserve-new-abc").exists())
        assert len(store_threads()) == 1  # waits for the young one
    assert young.exists()
    assert store_threads() == []


def kept_file(folder: Path) -> Path:
    path = folder / "pictures" / ("y" * 32 + ".png")
    path.write_bytes(b"young")
    return path


@pytest.mark.usefixtures("leak_guard")
def test_empty_or_missing_directory_needs_no_thread(tmp_path: Path) -> None:
    with store(tmp_path / "s") as kept:
        kept.start()
        until(lambda: store_threads() == [])
        assert not (tmp_path / "s").exists()


def test_expired_picture_is_not_found_before_the_timer_has_run(tmp_path: Path) -> None:
    now = time.time()
    with closing(Store(Settings(store_dir=tmp_path, url_ttl_s=60.0), clock=lambda: now)) as kept:
        name = kept.keep(memoryview(b"data"), "png")
        assert content_of(kept.find(name)) == b"data"
        now += 61
        with pytest.raises(NotFound):
            kept.find(name)
        assert (tmp_path / "pictures" / name).exists()
        kept.keep(memoryview(b"new"), "png")
        assert not (tmp_path / "pictures" / name).exists()


def test_closed_store_starts_no_thread(tmp_path: Path) -> None:
    kept = Store(Settings(store_dir=tmp_path))
    kept.close()
    name = kept.keep(memoryview(b"data"), "png")  # by a request at the end of the grace period
    kept.start()
    kept.close()
    assert store_threads() == []
    assert content_of(kept.find(name)) == b"data"


def test_directory_that_cannot_be_read_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with store(tmp_path / "s") as kept:
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "pictures").write_bytes(b"in the way")
        kept.start()
        until(lambda: store_threads() == [])
        assert "store_dir cannot be read" in caplog.messages
        with pytest.raises(OSError, match="Not a directory"):
            kept.keep(memoryview(b"data"), "png")


# --- other programs in the directory ----------------------------------------------------------------------------------


def test_files_that_others_remove_are_tolerated(tmp_path: Path) -> None:
    with store(tmp_path / "s", store_bytes=MIB) as kept:
        names = [kept.keep(memoryview(bytes(MIB // 4)), "png") for _ in range(4)]
        (tmp_path / "s" / "pictures" / names[0]).unlink()
        with pytest.raises(NotFound):
            kept.find(names[0])
        kept.keep(memoryview(bytes(MIB // 4)), "png")
        assert all((tmp_path / "s" / "pictures" / name).exists() for name in names[1:])
        shutil.rmtree(tmp_path / "s")
        name = kept.keep(memoryview(bytes(MIB // 4)), "png")
        assert len(content_of(kept.find(name))) == MIB // 4
        assert (tmp_path / "s" / "pictures").stat().st_mode & 0o777 == 0o700


def test_files_that_others_add_are_served_and_not_removed(tmp_path: Path) -> None:
    with store(tmp_path, store_bytes=MIB) as kept:
        kept.keep(memoryview(b"data"), "png")
        added = kept_file(tmp_path)
        for _ in range(5):
            kept.keep(memoryview(bytes(MIB // 2)), "png")
        assert content_of(kept.find(added.name)) == b"young"


def test_two_stores_share_a_directory(tmp_path: Path) -> None:
    with store(tmp_path, store_bytes=MIB) as one:
        early = one.keep(memoryview(bytes(MIB // 2)), "png")
        with store(tmp_path, store_bytes=MIB) as two:
            for _ in range(8):
                names = [each.keep(memoryview(bytes(MIB // 2)), "png") for each in (one, two)]
                for each in (one, two):
                    for name in names:
                        assert len(content_of(each.find(name))) == MIB // 2
            with pytest.raises(NotFound):
                one.find(early)
            assert len(os.listdir(tmp_path / "pictures")) == 4  # each applies the limit to its own


def test_start_of_a_second_store_does_not_disturb_a_picture_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def keep_another(source: str, target: str, **folders: int) -> None:
        monkeypatch.setattr(os, "replace", replace)
        with store(tmp_path, store_bytes=MIB) as two:
            two.keep(memoryview(bytes(MIB // 4)), "png")
        replace(source, target, **folders)

    monkeypatch.setattr(os, "replace", keep_another)
    with store(tmp_path, store_bytes=MIB) as one:
        name = one.keep(memoryview(bytes(MIB // 4)), "png")
        assert len(content_of(one.find(name))) == MIB // 4
    assert len(os.listdir(tmp_path / "pictures")) == 2


# --- before the work --------------------------------------------------------------------------------------------------


def test_check_of_a_usable_store_leaves_no_file(tmp_path: Path) -> None:
    with store(tmp_path / "a" / "b") as kept:
        kept.check(create=False)
        assert not (tmp_path / "a").exists()
        kept.check()
        assert (tmp_path / "a" / "b" / "pictures").stat().st_mode & 0o777 == 0o700
        kept.check(create=False)
        assert not list((tmp_path / "a" / "b" / "pictures").iterdir())


def test_check_of_a_full_store_raises_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store(tmp_path) as kept:
        monkeypatch.setattr(os, "posix_fallocate", raise_no_space)
        with pytest.raises(OSError, match="No space left"):
            kept.check()
    assert not list((tmp_path / "pictures").iterdir())


def test_store_that_cannot_be_written_is_logged_at_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with store(tmp_path / "file" / "pictures") as kept:
        kept.start()
        with pytest.raises(NotADirectoryError):
            kept.check()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with store(tmp_path / "pictures") as kept:
        kept.start()
    whys = [record.fields["why"] for record in caplog.records if "no picture can be stored" in record.message]  # type: ignore[attr-defined]
    assert whys == ["Not a directory", "Permission denied"]


def test_usable_store_starts_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with store(tmp_path / "pictures") as kept:
        kept.start()
    assert not caplog.records
