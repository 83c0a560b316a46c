"""A minimal Debian with systemd as process 1, in namespaces of its own, for tests of the service.

It has neither libnss-systemd nor the group `render`, and no devices. Needs root, debootstrap, a Debian mirror (or the
environment variable DEBIAN_MIRROR) and uv.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.live import children_of

__all__ = ["Machine", "boot", "missing_requirement"]

ROOT = Path(__file__).parents[1]
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
PYTHON = "3.11"  # of Debian 12
BOOT_LIMIT_S = 60.0
SOURCE = "opt/ovserve-source"  # with the folder `scripts` of the repository

# Runs in new namespaces; $1 is the root. systemd needs its own control groups, /proc, /run and /tmp.
_BOOT = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
cd "$1"
mount -t proc proc proc
mount -t sysfs sysfs sys -o ro
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    mount -t cgroup2 cgroup2 sys/fs/cgroup
else
    mount -t tmpfs tmpfs sys/fs/cgroup -o mode=755
    mkdir -p sys/fs/cgroup/unified sys/fs/cgroup/systemd
    mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
    mount -t cgroup -o none,name=systemd,xattr cgroup sys/fs/cgroup/systemd
fi
mount -t tmpfs tmpfs dev -o mode=755
for device in null zero full random urandom tty; do touch "dev/$device"; mount --bind "/dev/$device" "dev/$device"; done
mkdir -p dev/shm dev/pts
mount -t tmpfs tmpfs dev/shm -o mode=1777
mount -t devpts devpts dev/pts -o newinstance,ptmxmode=666
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs tmpfs run -o mode=755
mount -t tmpfs tmpfs tmp -o mode=1777
mkdir -p .old
pivot_root . .old
umount -l /.old
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb /lib/systemd/systemd --system --show-status=no
"""
_PATH = "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing_requirement() -> str:
    """Return why this machine cannot boot such a system, or "" if it can."""
    if os.getuid() != 0:
        return "booting systemd in namespaces needs root"
    for program in ("debootstrap", "unshare", "nsenter", "pivot_root"):
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
            return f"no {program} on this machine"
    return ""


class Machine:
    """The running system. Paths are those in it; `root` is its root on this machine.

    Args:
        root: the root.
        pid: the process id of its systemd.
    """

    def __init__(self, root: Path, pid: int) -> None:
        self.root = root
        self._enter = ["nsenter", "--target", str(pid), "--all", "env", "-i", _PATH, "TERM=dumb"]

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command; return its output and errors. Raises AssertionError if it fails, unless `check` is false."""
        done = subprocess.run(
            [*self._enter, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def succeeds(self, *command: str) -> bool:
        """Run a command; return whether its exit code is 0."""
        return subprocess.run([*self._enter, *command], capture_output=True, check=False).returncode == 0

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a command with a pipe as its standard input."""
        return subprocess.Popen([*self._enter, *command], stdin=subprocess.PIPE)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file."""
        file = self.root / path.lstrip("/")
        file.write_text(text)
        file.chmod(mode)

    def status(self) -> dict[str, str]:
        """Return the properties of the service that tests look at."""
        names = "ActiveState,SubState,NRestarts,ExecMainStatus"
        text = self.run("systemctl", "show", "ovserve", "--property", names)
        return dict(line.split("=", 1) for line in text.splitlines())

    def await_status(self, timeout_s: float = 60.0, **wanted: str) -> None:
        """Wait until the service has these properties."""
        end = time.monotonic() + timeout_s
        while not wanted.items() <= (found := self.status()).items():
            journal = self.run("journalctl", "--unit", "ovserve", "--no-pager", "--lines", "20")
            assert time.monotonic() < end, f"{found}\n{journal}"
            time.sleep(0.2)


def _install(root: Path) -> None:
    packages = "systemd,systemd-sysv,dbus,python3-venv,curl"
    command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root), MIRROR]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["chroot", root, "python3", "-m", "venv", "--without-pip", "/opt/ovserve"], check=True)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv, "uv is not installed: scripts/test installs it"
    target = root / f"opt/ovserve/lib/python{PYTHON}/site-packages"
    command = [uv, "pip", "install", "--quiet", "--python-version", PYTHON, "--target", str(target)]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), str(ROOT)], check=True)
    shutil.copytree(ROOT / "scripts", root / SOURCE / "scripts")


@contextmanager
def boot(root: Path) -> Iterator[Machine]:
    """Install Debian and ovserve below `root`, boot it, and yield the running system. Removes `root` at the end."""
    try:
        _install(root)
        namespaces = ["--pid", "--mount", "--uts", "--ipc", "--net", "--cgroup"]
        command = ["unshare", *namespaces, "--fork", "--kill-child", "bash", "-c", _BOOT, "bash", str(root)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as outside:
            try:
                yield _await_boot(root, outside)
            finally:
                for pid in children_of(outside.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)  # process 1: the kernel then ends all others of its namespace
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _await_boot(root: Path, outside: subprocess.Popen[bytes]) -> Machine:
    end = time.monotonic() + BOOT_LIMIT_S
    while True:
        assert outside.poll() is None, "the system did not boot"
        for pid in children_of(outside.pid):
            machine = Machine(root, pid)
            if machine.run("systemctl", "is-system-running", check=False).strip() in ("running", "degraded"):
                return machine
        assert time.monotonic() < end, "the system did not boot"
        time.sleep(0.2)
