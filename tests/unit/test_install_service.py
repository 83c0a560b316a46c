"""scripts/install-service below a folder (DESTDIR), and the unit file that it installs."""

from __future__ import annotations

import configparser
import fcntl
import grp
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ovserve.cli.commands import COMMANDS, ExitCode

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "scripts" / "ovserve.service"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Return a folder with an environment in opt/ovserve, as step 1 of docs/install.md makes it."""
    python = tmp_path / "opt" / "ovserve" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    return tmp_path


def install(machine: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / "install-service", *arguments],
        env={**os.environ, "DESTDIR": str(machine)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def files(machine: Path) -> set[str]:
    return {str(path.relative_to(machine)) for path in machine.rglob("*") if path.is_file()}


def drop_in(machine: Path, name: str) -> str:
    return (machine / "etc/systemd/system/ovserve.service.d" / name).read_text("utf-8")


def unit() -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser["Service"]


def test_machine_without_devices_and_keys_gets_no_drop_in(machine: Path) -> None:
    done = install(machine)
    assert done.returncode == 0, done.stderr
    assert files(machine) == {
        "opt/ovserve/bin/python", "etc/ovserve.toml", "etc/systemd/system/ovserve.service", "usr/local/bin/ovserve",
    }  # fmt: skip
    assert (machine / "etc/systemd/system/ovserve.service").read_bytes() == UNIT.read_bytes()
    command = machine / "usr/local/bin/ovserve"
    assert "/opt/ovserve/bin/python -P -m ovserve" in command.read_text()
    assert os.access(command, os.X_OK)


def test_groups_of_devices_are_a_drop_in_that_goes_with_the_devices(machine: Path) -> None:
    device = machine / "dev" / "dri" / "renderD128"
    device.parent.mkdir(parents=True)
    device.touch()
    group = next(entry for entry in grp.getgrall() if entry.gr_name != "root") if os.getuid() == 0 else None
    if group:
        os.chown(device, 0, group.gr_gid)
    name = group.gr_name if group else grp.getgrgid(device.stat().st_gid).gr_name
    assert install(machine).returncode == 0
    assert f"\nSupplementaryGroups={name}\n" in drop_in(machine, "devices.conf")
    device.unlink()
    assert install(machine).returncode == 0
    assert "etc/systemd/system/ovserve.service.d/devices.conf" not in files(machine)


def test_keys_are_copied_before_each_reload(machine: Path) -> None:
    (machine / "etc").mkdir()
    (machine / "etc" / "ovserve.keys").write_text("sk-one\n")
    assert install(machine).returncode == 0
    lines = drop_in(machine, "keys.conf").splitlines()
    reloads = [line.partition("=")[2] for line in lines if line.startswith("ExecReload=")]
    assert reloads[0] == ""  # clears the commands of the unit
    assert [line.partition("=")[2] for line in lines if line.startswith("ExecStartPre=")] == [reloads[1]]
    assert "/etc/ovserve.keys /run/ovserve/keys" in reloads[1]
    text = UNIT.read_text("utf-8")
    assert reloads[2:] == [line.partition("=")[2] for line in text.splitlines() if line.startswith("ExecReload=")]
    assert " check " in reloads[2]
    assert reloads[3] == unit()["ExecReload"]
    assert "Environment=OVSERVE_API_KEY_FILE=/run/ovserve/keys" in lines


def test_named_keys_and_a_certificate_are_copied_too(machine: Path) -> None:
    (machine / "etc").mkdir()
    for name in ("ovserve.keys.toml", "ovserve.pem"):
        (machine / "etc" / name).write_text("secret\n")
    assert install(machine).returncode == 0
    lines = drop_in(machine, "keys.conf").splitlines()
    assert "Environment=OVSERVE_NAMED_KEYS_FILE=/run/ovserve/keys.toml" in lines
    assert "Environment=OVSERVE_TLS_CERTIFICATE=/run/ovserve/tls.pem" in lines
    assert not any("API_KEY_FILE" in line for line in lines)
    before = [line.partition("=")[2] for line in lines if line.startswith("ExecStartPre=")]
    reloads = [line.partition("=")[2] for line in lines if line.startswith("ExecReload=")]
    assert len(before) == 2
    assert reloads[:3] == ["", *before]
    assert " check " in reloads[3]


def test_socket_unit_is_installed_when_asked_for(machine: Path) -> None:
    done = install(machine, "--socket")
    assert done.returncode == 0, done.stderr
    installed = machine / "etc/systemd/system/ovserve.socket"
    assert installed.read_bytes() == (ROOT / "scripts" / "ovserve.socket").read_bytes()
    assert install(machine).returncode == 0
    assert installed.exists()  # without the flag, what is installed stays
    assert install(machine, "--uninstall").returncode == 0
    assert not installed.exists()
    assert install(machine, "--sockets").returncode == 2


def test_uninstall_leaves_settings_and_keys_and_purge_leaves_nothing(machine: Path) -> None:
    (machine / "etc").mkdir()
    (machine / "etc" / "ovserve.keys").write_text("sk-one\n")
    for used in ("opt/ovserve-old/bin/python", "var/cache/private/ovserve/pictures/a.png"):
        (machine / used).parent.mkdir(parents=True)
        (machine / used).touch()
    spools = [machine / "dev" / "shm" / f"ovserve-spool-{name}" / "lock" for name in ("killed", "live")]
    for spool in spools:
        spool.parent.mkdir(parents=True)
        spool.touch()
    assert install(machine).returncode == 0
    (machine / "etc" / "ovserve.toml").write_text("port = 8001\n")
    with spools[1].open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a running server does
        done = install(machine, "--uninstall")
    assert done.returncode == 0, done.stderr
    assert files(machine) == {"etc/ovserve.toml", "etc/ovserve.keys", "dev/shm/ovserve-spool-live/lock"}
    assert install(machine, "--purge").returncode == 0
    assert files(machine) == set()


def test_settings_are_not_overwritten(machine: Path) -> None:
    (machine / "etc").mkdir()
    (machine / "etc" / "ovserve.toml").write_text("port = 8001\n")
    assert install(machine).returncode == 0
    assert (machine / "etc" / "ovserve.toml").read_text() == "port = 8001\n"


def test_machine_without_the_environment_is_an_error(tmp_path: Path) -> None:
    done = install(tmp_path)
    assert done.returncode == 1
    assert "docs/install.md" in done.stderr
    assert files(tmp_path) == set()


def test_unit_depends_on_no_group_and_sets_a_home() -> None:
    assert "SupplementaryGroups" not in unit()
    assert unit()["Environment"] == "HOME=/var/cache/ovserve"


def test_unit_is_not_restarted_after_a_wrong_configuration_only() -> None:
    assert unit()["RestartPreventExitStatus"] == str(int(ExitCode.USAGE))
    assert unit()["Restart"] == "on-failure"
    assert "\nStartLimitIntervalSec=0\n" in UNIT.read_text("utf-8")
    assert {ExitCode.TRANSIENT, ExitCode.MODELS_FAILED} < {*COMMANDS["serve"].exit_codes}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd on this machine")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    text = UNIT.read_text("utf-8").replace("/opt/ovserve/bin/python", "/bin/true")
    (tmp_path / "ovserve.service").write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / "ovserve.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "ovserve.service" not in done.stderr
