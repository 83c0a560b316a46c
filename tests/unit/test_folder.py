"""A front end's folder: created, locked, recreated if it vanishes, swept after a crash."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovserve.errors import SpoolFull, SpoolUnusable
from ovserve.wire.local.folder import Folder, sweep


@pytest.fixture
def recreations() -> list[int]:
    return []


@pytest.fixture
def folder(tmp_path: Path, recreations: list[int]) -> Iterator[Folder]:
    made = Folder(tmp_path, lambda: recreations.append(1))
    yield made
    made.close()
    assert not made.path.exists()


def touch(folder: Folder) -> Path:
    path, descriptor = folder.create()
    os.close(descriptor)
    return Path(path)


@pytest.mark.parametrize("with_its_directory", [False, True])
def test_vanished_folder_is_recreated_under_its_name_and_locked(
    tmp_path: Path, recreations: list[int], with_its_directory: bool
) -> None:
    folder = Folder(tmp_path / "spool", lambda: recreations.append(1))
    touch(folder)
    shutil.rmtree(tmp_path / "spool" if with_its_directory else folder.path)
    made = touch(folder)
    assert made.parent == folder.path
    assert folder.path.stat().st_mode & 0o077 == 0
    assert sweep(tmp_path / "spool") == 0
    assert (len(list(folder.path.iterdir())), recreations) == (2, [1])
    touch(folder)
    assert (folder.unusable_reason, recreations) == ("", [1])
    folder.close()
    assert list((tmp_path / "spool").iterdir()) == []


def test_folder_that_cannot_be_recreated_has_a_reason_until_it_can(folder: Folder) -> None:
    shutil.rmtree(folder.path)
    folder.path.write_bytes(b"in the way")
    for _ in range(2):
        with pytest.raises(SpoolUnusable, match="Not a directory") as caught:
            folder.create()
        assert caught.value.retry_after_s
        assert "Not a directory" in folder.unusable_reason
    folder.path.unlink()
    assert folder.unusable_reason == ""  # reading it tries again, because a server that is not ready gets no requests
    assert [path.name for path in folder.path.iterdir()] == ["lock"]


def test_folder_that_cannot_be_locked_is_removed(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder.path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refuse)
        with pytest.raises(SpoolUnusable, match="Permission denied"):
            folder.create()
        assert not folder.path.exists()
    assert touch(folder).exists()
    assert (folder.path / "lock").exists()


def test_read_only_directory_is_the_unusable_reason(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(SpoolUnusable, match="Read-only"):
            folder.create()
        assert "Read-only" in folder.unusable_reason
    assert folder.unusable_reason == ""


def test_full_directory_is_spool_full_and_not_unusable(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=5", "tiny", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs a privilege that this user does not have")
    folder = Folder(tmp_path)
    try:
        made = [touch(folder), touch(folder)]
        with pytest.raises(SpoolFull):
            folder.create()
        assert folder.unusable_reason == ""
        made[0].unlink()
        touch(folder)
    finally:
        folder.close()
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_closed_folder_is_not_recreated(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.close()
    with pytest.raises(SpoolUnusable):
        folder.create()
    assert list(tmp_path.iterdir()) == []


def test_sweep_removes_an_old_folder_without_a_lock_and_keeps_a_new_one(tmp_path: Path) -> None:
    young, old = tmp_path / "ovserve-spool-young", tmp_path / "ovserve-spool-old"
    young.mkdir()
    old.mkdir()
    os.utime(old, (1, 1))
    assert sweep(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [young]


def test_sweep_keeps_everything_else(tmp_path: Path) -> None:
    (tmp_path / "other-folder").mkdir()
    (tmp_path / "a-file").write_bytes(b"")
    with (tmp_path / "locked").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert sweep(tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 3


# --- other users of the machine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "is_accepted"), [(0o777, False), (0o1777, True), (0o755, True)])
def test_directory_that_others_may_write_needs_the_sticky_bit(tmp_path: Path, mode: int, is_accepted: bool) -> None:
    tmp_path.chmod(mode)
    if is_accepted:
        made = Folder(tmp_path)
        assert made.path.stat().st_mode & 0o777 == 0o700
        made.close()
        return
    with pytest.raises(PermissionError, match="has no sticky bit"):
        Folder(tmp_path)


def test_sweep_follows_no_links_and_leaves_what_others_have_made(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "lock").write_bytes(b"")  # unlocked, as in the folder of a dead front end
    (elsewhere / "precious").write_bytes(b"data")
    (tmp_path / "ovserve-spool-link").symlink_to(elsewhere)
    for name in ("file", "fifo", "dangling"):
        (tmp_path / f"ovserve-spool-{name}").mkdir(0o700)
    (tmp_path / "ovserve-spool-file" / "lock").symlink_to(elsewhere / "precious")
    os.mkfifo(tmp_path / "ovserve-spool-fifo" / "lock")
    (tmp_path / "ovserve-spool-dangling" / "lock").symlink_to("nowhere")
    (tmp_path / "ovserve-spool-plain").write_bytes(b"")
    assert sweep(tmp_path) == 0
    assert {path.name for path in elsewhere.iterdir()} == {"lock", "precious"}
    assert len(list(tmp_path.iterdir())) == 5
    dead = tmp_path / "ovserve-spool-dead"
    dead.mkdir(0o700)
    (dead / "lock").write_bytes(b"")
    own = os.geteuid()
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: own + 1)
        assert sweep(tmp_path) == 0  # another user's
    assert sweep(tmp_path) == 1
    assert not dead.exists()
