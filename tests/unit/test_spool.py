"""Spool and segments: space, limits, fallback, release, and clean-up after a crash."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ovserve.errors import BlobGone, ContentTooLarge, SettingsError, SpoolFull
from ovserve.wire.blobs import Blob, BlobStore
from ovserve.wire.local.folder import sweep
from ovserve.wire.local.spool import Spool, SpoolSegment, default_directory
from ovserve.wire.memory.blobs import MemoryBlobs

MIB = 1024 * 1024


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path, 8 * MIB)
    yield made
    made.close()


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """Mount a tmpfs of 1 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tiny", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs a privilege that this user does not have")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Limit the files of this process to 1 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def no_descriptors() -> Iterator[None]:
    """Leave this process no descriptor for another file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.open(os.devnull, os.O_RDONLY)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file() and path.name != "lock")


def test_stored_bytes_can_be_read_through_a_blob_a_path_and_the_view(spool: Spool) -> None:
    segment = spool.put(b"hello spool")
    with spool.worker_blobs().open(segment.blob(6, 5)) as view:
        assert bytes(view) == b"spool"
    assert spool.worker_blobs().read_blob(segment.blob(6, 5)) == b"spool"
    assert Path(segment.path).read_bytes() == b"hello spool"
    assert bytes(segment.view) == b"hello spool"


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("kind", ["spool", "memory"])
def test_segment_is_read_in_parts_until_it_is_released(spool: Spool, kind: str, is_mapped: bool) -> None:
    store: BlobStore = spool if kind == "spool" else MemoryBlobs()
    segment = store.put(b"hello spool")
    if is_mapped:
        assert bytes(segment.view[:11]) == b"hello spool"
    assert [segment.read(offset, 4) for offset in (0, 4, 8, 11, 20)] == [b"hell", b"o sp", b"ool", b"", b""]
    segment.release()
    with pytest.raises(ValueError, match="released"):
        segment.read(0, 4)


@pytest.mark.usefixtures("spool", "no_descriptors")
def test_no_descriptor_left_for_a_file_is_spool_full(spool: Spool) -> None:
    with pytest.raises(SpoolFull):
        spool.create(10, reserve=10)
    assert spool.used_bytes == 0


@pytest.fixture
def unmapped(spool: Spool) -> SpoolSegment:
    """Return a segment that is not mapped yet."""
    return spool.create(10, reserve=10)


@pytest.mark.usefixtures("unmapped", "no_descriptors")
def test_no_descriptor_left_for_a_mapping_is_spool_full(spool: Spool, unmapped: SpoolSegment) -> None:
    with pytest.raises(SpoolFull, match="open files"):
        unmapped.view  # noqa: B018 - the property raises
    unmapped.release()
    assert (spool.used_bytes, files(spool.directory)) == (0, [])


@pytest.mark.parametrize(("module", "name"), [(mmap, "mmap"), (os, "posix_fallocate"), (os, "open")])
def test_no_memory_is_spool_full(spool: Spool, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(module, name, refuse)
        with pytest.raises(SpoolFull):
            assert spool.create(10, reserve=10).view
    assert spool.unusable_reason == ""


def test_failed_write_leaves_no_segment(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "a disk that dies")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="dies"):
        spool.put(b"bytes")
    assert (spool.used_bytes, files(spool.directory)) == (0, [])


def test_filled_bytes_are_in_the_view(spool: Spool) -> None:
    segment = spool.create(100, reserve=100)
    spool.worker_blobs().fill(segment.id, b"x" * 60)
    assert bytes(segment.view[:60]) == b"x" * 60


def test_segment_grows_in_place(spool: Spool) -> None:
    segment = spool.create(3 * MIB)
    segment.reserve(10)
    segment.view[:10] = b"0123456789"
    segment.reserve(2 * MIB)
    segment.view[2 * MIB - 1] = 7
    assert bytes(segment.view[:10]) == b"0123456789"
    assert segment.reserved == 2 * MIB
    segment.reserve(5)
    assert segment.reserved == 2 * MIB
    with pytest.raises(ValueError, match="may have at most"):
        segment.reserve(3 * MIB + 1)


def test_release_unlinks_the_file_and_frees_its_bytes(spool: Spool) -> None:
    segment = spool.create(MIB, reserve=MIB)
    assert spool.used_bytes == MIB
    segment.release()
    segment.release()
    assert spool.used_bytes == 0
    assert files(spool.directory) == []
    with pytest.raises(ValueError, match="released"):
        segment.view  # noqa: B018 - the property raises


def test_release_while_a_slice_is_held_still_unlinks_the_file(spool: Spool) -> None:
    segment = spool.create(10, reserve=10)
    held = segment.view[2:4]
    segment.release()
    assert files(spool.directory) == []
    assert spool.used_bytes == 0
    held.release()


def test_limit_allows_n_bytes_and_not_n_plus_one(spool: Spool) -> None:
    full = spool.create(8 * MIB, reserve=8 * MIB)
    with pytest.raises(SpoolFull) as caught:
        spool.create(1, reserve=1)
    assert caught.value.retry_after_s is not None
    assert files(spool.directory) == [Path(full.path).name]
    full.release()
    spool.create(1, reserve=1)


def test_size_that_can_never_fit_is_content_too_large(spool: Spool, tmp_path: Path) -> None:
    assert spool.capacity_bytes == 8 * MIB
    spool.check_size(8 * MIB)
    with pytest.raises(ContentTooLarge, match=f"holds {8 * MIB}"):
        spool.create(9 * MIB, reserve=8 * MIB + 1)
    assert (spool.used_bytes, files(tmp_path)) == (0, [])


def test_capacity_is_the_size_of_the_tmpfs_and_its_fallback(tiny: Path, tmp_path: Path) -> None:
    alone, pair = Spool(tiny, 64 * MIB), Spool(tiny, 64 * MIB, fallback=tmp_path / "disk")
    assert (alone.capacity_bytes, pair.capacity_bytes) == (MIB, 64 * MIB)
    alone.close()
    pair.close()


def test_file_system_that_other_files_fill_makes_the_spool_unusable(tiny: Path) -> None:
    spool = Spool(tiny, 64 * MIB)
    assert (spool.unusable_reason, spool.free_bytes) == ("", MIB)
    (tiny / "other").write_bytes(b"x" * (MIB - 200_000))
    assert "the file system of the spool is full" in spool.unusable_reason
    assert spool.free_bytes < 200_000
    (tiny / "other").unlink()
    assert spool.unusable_reason == ""
    spool.close()


def test_segments_in_flight_do_not_make_the_spool_unusable(tiny: Path) -> None:
    spool = Spool(tiny, 64 * MIB)
    segment = spool.create(MIB - 100_000, reserve=MIB - 100_000)
    assert spool.free_bytes < 200_000
    assert spool.unusable_reason == ""
    segment.release()
    spool.close()


def test_file_system_without_free_inodes_makes_the_spool_unusable(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = os.statvfs(spool.directory)
    full = os.statvfs_result([*found[:5], 10, 0, 0, *found[8:]])
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    assert "is full: 0 bytes" in spool.unusable_reason


def test_fallback_counts_as_free_space(tiny: Path, tmp_path: Path) -> None:
    spool = Spool(tiny, 64 * MIB, fallback=tmp_path / "disk")
    (tiny / "other").write_bytes(b"x" * (MIB - 50_000))
    assert (spool.unusable_reason, spool.free_bytes) == ("", 64 * MIB)
    spool.close()


def test_concurrent_growth_never_exceeds_the_limit(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 100 * 1000)
    rejected = []

    def grow() -> None:
        for _ in range(50):
            try:
                spool.put(b"x" * 1000)
            except SpoolFull:
                rejected.append(1)

    threads = [threading.Thread(target=grow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert spool.used_bytes == 100 * 1000
    assert len(rejected) == 100
    spool.close()


def test_full_tmpfs_is_an_error_and_not_a_signal(tiny: Path) -> None:
    spool = Spool(tiny, 64 * MIB)
    kept = spool.create(4 * MIB, reserve=MIB // 2)
    kept.view[: MIB // 2] = b"k" * (MIB // 2)
    with pytest.raises(ContentTooLarge):
        kept.reserve(2 * MIB)
    (tiny / "other-program").write_bytes(b"x" * (MIB // 4))
    with pytest.raises(SpoolFull, match="full"):
        kept.reserve(MIB)
    with pytest.raises(SpoolFull):
        spool.create(MIB, reserve=MIB)
    assert spool.used_bytes == MIB // 2
    assert bytes(kept.view[: MIB // 2]) == b"k" * (MIB // 2)
    kept.release()
    spool.put(b"space again").release()
    spool.close()


@pytest.mark.usefixtures("small_files")
def test_file_size_limit_is_spool_full_and_not_a_signal(spool: Spool) -> None:
    with pytest.raises(SpoolFull):
        spool.create(2 * MIB, reserve=2 * MIB)
    grown = spool.create(2 * MIB, reserve=MIB // 2)
    with pytest.raises(SpoolFull):
        grown.view  # noqa: B018 - the property raises
    with pytest.raises(SpoolFull):
        grown.reserve(2 * MIB)
    grown.release()
    assert spool.used_bytes == 0
    assert files(spool.directory) == []


def test_segment_moves_to_the_fallback_with_its_bytes_when_the_spool_is_full(tiny: Path, tmp_path: Path) -> None:
    spool = Spool(tiny, 64 * MIB, fallback=tmp_path / "disk")
    grown = spool.create(4 * MIB, reserve=MIB // 2)
    grown.view[: MIB // 2] = bytes(range(256)) * (MIB // 512)
    grown.reserve(3 * MIB)
    assert Path(grown.path).is_relative_to(tmp_path / "disk")
    assert bytes(grown.view[: MIB // 2]) == bytes(range(256)) * (MIB // 512)
    grown.view[3 * MIB - 1] = 1
    whole = spool.create(2 * MIB, reserve=2 * MIB)
    assert Path(whole.path).is_relative_to(tmp_path / "disk")
    small = spool.put(b"fits")
    assert Path(small.path).is_relative_to(tiny)
    assert spool.used_bytes == 5 * MIB + 4
    for segment in (grown, whole, small):
        segment.release()
    assert spool.used_bytes == 0
    assert files(tiny) == files(tmp_path / "disk") == []
    spool.close()
    assert list((tmp_path / "disk").iterdir()) == []


def test_full_fallback_is_spool_full(tiny: Path) -> None:
    spool = Spool(tiny, 64 * MIB, fallback=tiny)
    held = spool.create(2 * MIB, reserve=MIB // 4)
    with pytest.raises(SpoolFull, match="fallback"):
        held.reserve(2 * MIB)
    assert files(tiny) == [Path(held.path).name]
    assert spool.used_bytes == MIB // 4
    spool.close()


def test_close_removes_the_folder(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MIB)
    spool.put(b"left behind")
    spool.close()
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_live_front_ends_share_a_directory(tmp_path: Path) -> None:
    first = Spool(tmp_path, MIB)
    kept = first.put(b"mine")
    second = Spool(tmp_path, MIB)
    assert sweep(tmp_path) == 0
    assert Path(kept.path).read_bytes() == b"mine"
    first.close()
    second.close()


def test_next_front_end_removes_the_folder_of_a_killed_one(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path; from ovserve.wire.local.spool import Spool\n"
        "Spool(Path(sys.argv[1]), 1 << 20).put(b'orphan'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert len(files(tmp_path)) == 1
    spool = Spool(tmp_path, MIB)
    assert [spool.directory] == list(tmp_path.iterdir())
    spool.close()


@pytest.mark.parametrize("option", ["spool_dir", "spool_fallback_dir"])
def test_directory_that_cannot_be_used_is_a_settings_error(tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    wrong = tmp_path / "file" / "below"
    with pytest.raises(SettingsError, match=option):
        Spool(wrong, MIB) if option == "spool_dir" else Spool(tmp_path / "good", MIB, fallback=wrong)
    assert not (tmp_path / "good").exists() or list((tmp_path / "good").iterdir()) == []


def test_segments_and_their_folder_are_private(spool: Spool) -> None:
    segment = spool.put(b"secret")
    assert Path(segment.path).stat().st_mode & 0o077 == 0
    assert spool.directory.stat().st_mode & 0o077 == 0


def test_released_segment_is_file_not_found_for_the_worker(spool: Spool) -> None:
    segment = spool.put(b"gone soon")
    blob = segment.blob(0, 4)
    segment.release()
    with pytest.raises(BlobGone):
        spool.worker_blobs().fill(blob.id, b"late")
    with pytest.raises(BlobGone), spool.worker_blobs().open(blob):
        pass


def test_blob_beyond_the_file_is_an_error_and_not_a_signal(spool: Spool) -> None:
    segment = spool.put(b"short")
    with pytest.raises(ValueError), spool.worker_blobs().open(Blob(segment.id, 0, 1 << 30)):  # noqa: PT011 - message of mmap
        pass
    with pytest.raises(BlobGone, match="ends within a blob"):
        spool.worker_blobs().read_blob(Blob(segment.id, 0, 6))


def test_default_directory_is_writable() -> None:
    assert os.access(default_directory(), os.W_OK)
