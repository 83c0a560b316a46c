"""Warm files: the next upload goes into a used file, and nobody who had the old one sees the new bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovserve.errors import ContentTooLarge
from ovserve.wire.blobs import Blob
from ovserve.wire.local.spool import Segment, Spool, open_blob
from ovserve.wire.local.warm import MOST_FILES, join

MIB = 1 << 20


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path, 32 * MIB, warm_bytes=8 * MIB)
    yield spool
    spool.close()
    assert not list(tmp_path.rglob("*warm*"))


def filled(spool: Spool, data: bytes, ceiling: int = 0) -> Segment:
    segment = spool.borrow(ceiling or len(data))
    segment.reserve(len(data))
    segment.view[: len(data)] = data
    return segment


def files(spool: Spool) -> list[str]:
    return sorted(path.name for path in spool.directory.iterdir() if path.name != "lock")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_next_segment_uses_the_same_file_under_another_name(spool: Spool) -> None:
    first = filled(spool, b"first upload" * 1000)
    path, number = first.path, os.stat(first.path).st_ino
    first.release()
    assert not Path(path).exists()
    assert spool.used_bytes == 0
    assert spool.warm.size == 12_000
    second = filled(spool, b"second" * 10)
    assert os.stat(second.path).st_ino == number
    assert second.path != path
    assert spool.used_bytes == 12_000
    assert spool.warm.size == 0
    with open_blob(second.blob(0, 60)) as view:
        assert bytes(view) == b"second" * 10


def test_a_small_upload_does_not_get_the_file_of_a_large_one(spool: Spool) -> None:
    filled(spool, b"x" * (6 * MIB)).release()
    small, unknown = filled(spool, b"y" * 5000), spool.borrow(6 * MIB, wanted=5000)
    assert (small.reserved, unknown.reserved, spool.warm.size) == (5000, 0, 6 * MIB)
    assert spool.borrow(6 * MIB).reserved == 6 * MIB


def test_a_file_serves_larger_uploads_than_its_first(spool: Spool) -> None:
    first = filled(spool, b"x" * 1000)
    number = os.stat(first.path).st_ino
    first.release()
    second = filled(spool, b"y" * 500_000)
    assert os.stat(second.path).st_ino == number
    assert second.reserved == 500_000
    assert bytes(second.view[:500_000]) == b"y" * 500_000


def test_the_smallest_file_that_is_large_enough_is_lent(spool: Spool) -> None:
    segments = [filled(spool, b"x" * size) for size in (100_000, 400_000, 200_000)]
    for segment in segments:
        segment.release()
    assert spool.borrow(150_000).reserved == 200_000
    assert spool.borrow(900_000).reserved == 400_000
    assert spool.borrow(2 * MIB).reserved == 0
    assert spool.borrow(10).reserved == 100_000


def test_results_never_lie_in_warm_files(spool: Spool) -> None:
    filled(spool, b"an upload").release()
    assert spool.create(9, reserve=9).view[:9] == bytes(9)
    assert spool.warm.size == 9


def test_a_worker_that_comes_late_finds_nothing(spool: Spool) -> None:
    first = filled(spool, b"first")
    blob = first.blob(0, 5)
    first.release()
    for _ in range(2):
        with pytest.raises(FileNotFoundError), open_blob(blob):
            pass
        filled(spool, b"other")


def test_a_file_that_a_worker_reads_is_not_lent_again(spool: Spool) -> None:
    first = filled(spool, b"first")
    with open_blob(first.blob(0, 5)) as seen:
        first.release()
        assert spool.warm.size == 0
        filled(spool, b"other")
        assert bytes(seen) == b"first"
    assert len(files(spool)) == 1


def test_a_worker_that_opened_the_file_before_and_joins_after_it_was_lent_gets_nothing(spool: Spool) -> None:
    first = filled(spool, b"first")
    path = first.path
    early = os.open(path, os.O_RDONLY)
    first.release()
    with pytest.raises(FileNotFoundError):
        join(early, path)  # it is kept
    second = filled(spool, b"other")
    assert os.fstat(early).st_ino == os.stat(second.path).st_ino
    with pytest.raises(FileNotFoundError):
        join(early, path)  # it is lent
    os.close(early)


def test_a_worker_that_was_killed_holds_nothing(spool: Spool) -> None:
    first = filled(spool, b"first")
    script = (
        "import sys; from ovserve.wire.local.spool import Blob, open_blob\n"
        "with open_blob(Blob(sys.argv[1], 0, 5)): print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, first.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout
        assert worker.stdout.readline() == b"open\n"
        worker.kill()
        worker.wait(10)
    first.release()
    assert spool.warm.size == 5


def test_a_file_with_a_view_that_is_still_held_is_not_lent_again(spool: Spool) -> None:
    first = filled(spool, b"first")
    held = first.view[:5]
    first.release()
    assert spool.warm.size == 0
    filled(spool, b"other")
    assert bytes(held) == b"first"
    held.release()


def test_releasing_twice_does_not_touch_the_next_owner(spool: Spool) -> None:
    first = filled(spool, b"first")
    first.release()
    second = filled(spool, b"other")
    first.release()
    assert bytes(second.view[:5]) == b"other"
    assert Path(second.path).exists()


def test_what_is_kept_has_a_limit_in_bytes(spool: Spool) -> None:
    segments = [filled(spool, b"x" * (3 * MIB)) for _ in range(4)]
    for segment in segments:
        segment.release()
    assert spool.warm.size == 6 * MIB
    assert len(files(spool)) == 2
    filled(spool, b"x" * (9 * MIB)).release()
    assert spool.warm.size == 6 * MIB


def test_what_is_kept_is_at_most_a_quarter_of_the_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 4 * MIB, warm_bytes=4 * MIB)
    filled(spool, b"x" * (MIB + 1)).release()
    assert spool.warm.size == 0
    filled(spool, b"x" * MIB).release()
    assert spool.warm.size == MIB
    spool.close()


@pytest.mark.parametrize("announced", [True, False])
def test_an_upload_that_filled_the_spool_leaves_room_for_the_small_ones_after_it(
    tmp_path: Path, announced: bool
) -> None:
    spool = Spool(tmp_path, 4 * MIB, warm_bytes=4 * MIB)
    filled(spool, b"x" * (4 * MIB)).release()
    for _ in range(3):
        upload = spool.borrow(5000 if announced else 4 * MIB, wanted=5000)
        upload.reserve(5000)
        spool.store(b"its request").release()
        upload.release()
    spool.close()


def test_an_upload_that_filled_a_small_tmpfs_leaves_room_for_the_small_ones_after_it(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "docker", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs a privilege that this user lacks")
    spool = Spool(tmp_path, 2048 * MIB, warm_bytes=64 * MIB)  # the defaults, in a container's /dev/shm
    try:
        large = spool.borrow(256 * MIB)
        large.reserve(64 * MIB)
        assert large.view[:1] == b"\0"
        with pytest.raises(ContentTooLarge):
            large.reserve(65 * MIB)
        large.release()
        for _ in range(3):
            small = filled(spool, b"small")
            spool.store(b"its request").release()
            small.release()
    finally:
        spool.close()
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_what_is_kept_has_a_limit_in_files(spool: Spool) -> None:
    before = descriptors()
    segments = [filled(spool, b"x") for _ in range(MOST_FILES + 5)]
    for segment in segments:
        segment.release()
    assert len(files(spool)) == MOST_FILES
    spool.close()
    assert descriptors() < before


def test_warm_files_give_way_at_the_spools_limit(spool: Spool) -> None:
    filled(spool, b"x" * (8 * MIB)).release()
    segment = spool.create(32 * MIB, reserve=32 * MIB)
    assert spool.warm.size == 0
    segment.release()
    with pytest.raises(ContentTooLarge):
        spool.create(33 * MIB, reserve=33 * MIB)


def test_warm_files_give_way_in_a_full_directory(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tiny", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs a privilege that this user lacks")
    spool = Spool(tmp_path, 16 * MIB, warm_bytes=8 * MIB)
    try:
        filled(spool, b"x" * (MIB // 2)).release()
        assert spool.warm.size == MIB // 2
        filled(spool, b"y" * (3 * MIB // 2), ceiling=4 * MIB).release()
    finally:
        spool.close()
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_folder_that_vanishes_takes_its_warm_files_along(spool: Spool) -> None:
    before = descriptors()
    held = filled(spool, b"held")
    for _ in range(2):
        filled(spool, b"upload").release()
    shutil.rmtree(spool.directory)
    held.release()  # it cannot be kept
    assert spool.used_bytes == 0
    filled(spool, b"next").release()  # the kept one cannot be lent
    assert spool.warm.size == 4
    spool.cool()
    assert (descriptors(), spool.used_bytes) == (before, 0)


def test_warm_files_of_a_folder_that_vanished_are_given_up_when_it_is_made_anew(spool: Spool) -> None:
    filled(spool, b"upload").release()
    shutil.rmtree(spool.directory)
    spool.store(b"request").release()
    assert spool.warm.size == 0


def test_without_a_pool_every_segment_has_its_own_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MIB)
    first = filled(spool, b"first")
    blob = first.blob(0, 5)
    first.release()
    assert files(spool) == []
    assert spool.borrow(5).view[:0] == b""
    assert isinstance(blob, Blob)
    spool.close()
