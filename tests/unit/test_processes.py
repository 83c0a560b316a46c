from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ovserve.dispatch.supervision.processes import explain_exit, machine_memory_bytes, prefer_for_oom, resident_bytes

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("exitcode", "words"),
    [
        (-9, "killed by signal 9 (SIGKILL): out of memory?"),
        (-11, "killed by signal 11 (SIGSEGV): a crash in native code"),
        (-15, "killed by signal 15 (SIGTERM)"),
        (-70, "killed by signal 70"),
        (0, "ended by itself with exit code 0"),
        (3, "ended by itself with exit code 3"),
        (None, "still running"),
    ],
)
def test_exit_codes_in_an_operators_words(exitcode: int | None, words: str) -> None:
    assert explain_exit(exitcode) == words


def test_resident_memory_is_what_the_kernel_counts() -> None:
    before = resident_bytes(os.getpid())
    held = bytearray(os.urandom(32 * MIB))
    assert 24 * MIB < resident_bytes(os.getpid()) - before < 64 * MIB
    del held


def test_pages_mapped_from_a_file_are_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(32 * MIB))
    before = resident_bytes(os.getpid())
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert len(set(mapped[:: mmap.PAGESIZE])) > 1  # touches every page
        assert resident_bytes(os.getpid()) - before < 8 * MIB


def test_resident_memory_of_nobody_is_nothing() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert resident_bytes(ended.pid) == 0


def test_memory_limit_of_the_control_group_counts(tmp_path: Path) -> None:
    whole = machine_memory_bytes(tmp_path)
    assert whole == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_memory_bytes(tmp_path) == whole
    (tmp_path / "memory.max").write_text("1048576\n")
    assert machine_memory_bytes(tmp_path) == MIB
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # v1's word for none
    assert machine_memory_bytes(tmp_path) == whole


def test_worker_goes_before_the_front_end_when_memory_runs_out() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    own = int(Path("/proc/self/oom_score_adj").read_text())
    prefer_for_oom(child.pid)
    assert int(Path(f"/proc/{child.pid}/oom_score_adj").read_text()) == min(1000, own + 500)
    child.communicate()
    prefer_for_oom(child.pid)  # gone: nothing happens


PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().decode().strip(), flush=True)
sys.stdin.read()
"""
CHILD = """
import os, sys, threading
from ovserve.dispatch.supervision.processes import enter
enter(int(sys.argv[1]))
print("entered", flush=True)
threading.Event().wait()
"""


def test_entered_process_dies_with_its_parent_and_hears_no_signal_of_the_front_end() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    pid_text, said = parent.stdout.readline().split()
    assert said == "entered"
    ended = os.pidfd_open(int(pid_text))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(int(pid_text), number)
    os.kill(int(pid_text), 0)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid_text}/stat").exists() and "Z" not in Path(f"/proc/{pid_text}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.close(ended)


def test_process_whose_parent_is_gone_already_does_not_start() -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, "1"], stdout=subprocess.PIPE)
    assert child.communicate(timeout=10)[0] == b""
    assert child.returncode == 1
