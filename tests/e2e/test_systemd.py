"""The service under systemd as process 1: start, faults at the start that pass, keys, signals, uninstall."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import make_pair
from tests.systemdroot import SOURCE, Machine, boot, missing_requirement

pytestmark = pytest.mark.heavy

INSTALL = f"/{SOURCE}/scripts/install-service"
PINNED = "threads = 1\nstreams = 2\nmax_batch = 8\n"
SETTINGS = f'port = 8000\n[[model]]\nname = "ovserve-builtin"\n{PINNED}'
URL = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Boot the system once for all tests of this file."""
    if reason := missing_requirement():
        pytest.skip(reason)
    with boot(tmp_path_factory.mktemp("debian") / "root") as machine:
        yield machine


@pytest.fixture
def machine(booted: Machine) -> Iterator[Machine]:
    """Install the service with its usual settings; stop it at the end."""
    booted.write("/etc/ovserve.toml", SETTINGS)
    booted.run(INSTALL)
    yield booted
    booted.run("systemctl", "stop", "ovserve", check=False)
    booted.run("systemctl", "reset-failed", "ovserve", check=False)


def code(machine: Machine, path: str, key: str = "") -> str:
    """Return the status code of a GET request."""
    field = ["--header", f"Authorization: Bearer {key}"] if key else []
    return machine.run("curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", *field, URL + path)


def test_service_starts_without_user_database_and_groups(machine: Machine) -> None:
    assert "render" not in machine.run("cat", "/etc/group")
    assert not machine.run("sh", "-c", "find / -xdev -name 'libnss_systemd*'")
    machine.run("systemctl", "start", "ovserve")  # returns when the service has sent READY=1
    document = {"prompt": "a red star", "response_format": "url"}
    command = ["curl", "--silent", "--json", json.dumps(document), f"{URL}/v1/images/generations"]
    address = json.loads(machine.run(*command))["data"][0]["url"]
    assert code(machine, address.removeprefix(URL)) == "200"
    assert "is valid" in machine.run("ovserve", "check", "--config", "/etc/ovserve.toml")
    machine.run("systemctl", "kill", "--signal", "USR1", "--kill-who", "main", "ovserve")
    machine.run("systemctl", "reload", "ovserve")
    machine.await_status(ActiveState="active", SubState="running", NRestarts="0")
    assert code(machine, "/v2/health/ready") == "200"


def test_port_in_use_is_retried_until_it_is_free(machine: Machine) -> None:
    listen = "import socket, sys; s = socket.socket(); s.bind(('127.0.0.1', 8000)); s.listen(); sys.stdin.read()"
    with machine.start("python3", "-c", listen) as holder:
        connect = "import socket; socket.create_connection(('127.0.0.1', 8000))"
        while not machine.succeeds("python3", "-c", connect):
            assert holder.poll() is None
        machine.run("systemctl", "start", "--no-block", "ovserve")
        machine.await_status(SubState="auto-restart", ExecMainStatus="75")
        assert holder.stdin
        holder.stdin.close()
    machine.await_status(ActiveState="active")
    assert code(machine, "/v2/health/ready") == "200"


def test_model_on_a_file_system_that_is_mounted_late_is_retried(machine: Machine) -> None:
    machine.run("mkdir", "-p", "/srv/models")
    machine.write("/etc/ovserve.toml", f"{SETTINGS}path = '/srv/models'\n")
    machine.run("systemctl", "start", "--no-block", "ovserve")
    machine.await_status(SubState="auto-restart", ExecMainStatus="75")
    package = next((machine.root / "opt/ovserve/lib").glob("python*/site-packages/ovserve/builtin"))
    machine.run("mount", "--bind", f"/{package.relative_to(machine.root)}", "/srv/models")
    machine.await_status(ActiveState="active")
    machine.run("systemctl", "stop", "ovserve")
    machine.run("umount", "/srv/models")


def test_device_that_is_missing_at_the_start_is_retried(machine: Machine) -> None:
    machine.write("/etc/ovserve.toml", f"{SETTINGS}device = 'GPU'\n")
    machine.run("systemctl", "start", "--no-block", "ovserve")
    machine.await_status(SubState="auto-restart", ExecMainStatus="69")
    machine.write("/etc/ovserve.toml", SETTINGS)
    machine.await_status(ActiveState="active")


def test_wrong_configuration_is_not_retried(machine: Machine) -> None:
    machine.write("/etc/ovserve.toml", "prot = 8000\n")
    machine.run("systemctl", "start", "ovserve", check=False)
    machine.await_status(ActiveState="failed", SubState="failed", NRestarts="0", ExecMainStatus="2")
    assert "did you mean 'port'" in machine.run("journalctl", "--unit", "ovserve", "--no-pager", "--lines", "5")


def test_keys_are_rotated_by_a_reload(machine: Machine) -> None:
    machine.write("/etc/ovserve.keys", "sk-one\n", 0o600)
    machine.run(INSTALL)
    machine.run("systemctl", "start", "ovserve")
    assert [code(machine, "/v1/models", key) for key in ("sk-one", "sk-two")] == ["200", "401"]
    machine.write("/etc/ovserve.keys", "sk-two\n", 0o600)
    machine.run("systemctl", "reload", "ovserve")
    machine.run("sh", "-c", "until journalctl --unit ovserve --no-pager | grep -q ' reloaded '; do sleep 0.1; done")
    assert [code(machine, "/v1/models", key) for key in ("sk-one", "sk-two")] == ["401", "200"]


def test_service_reads_copies_of_named_keys_and_a_certificate_and_writes_the_usage_log(
    machine: Machine, tmp_path: Path
) -> None:
    pair = make_pair(tmp_path, "used")
    machine.write("/etc/ovserve.toml", f'usage_log = "/var/log/ovserve/usage.jsonl"\n{SETTINGS}')
    machine.write("/etc/ovserve.pem", pair.certificate.read_text() + pair.key.read_text(), 0o600)
    key = machine.run("ovserve", "key", "add", "team", "--file", "/etc/ovserve.keys.toml").split()[0]
    machine.run(INSTALL)
    machine.run("systemctl", "start", "ovserve")
    ask = ["curl", "--silent", "--insecure", "--header", f"Authorization: Bearer {key}"]
    reply = machine.run(*ask, "--json", '{"prompt": "a"}', "https://127.0.0.1:8000/v1/images/generations")
    assert json.loads(reply)["data"]
    assert json.loads(machine.run("cat", "/var/log/ovserve/usage.jsonl"))["key"] == "team"
    status = ["--output", "/dev/null", "--write-out", "%{http_code}", "https://127.0.0.1:8000/v1/models"]
    assert machine.run(*ask, *status) == "200"
    machine.run("ovserve", "key", "add", "other", "--file", "/etc/ovserve.keys.toml")
    kept = (machine.root / "etc/ovserve.keys.toml").read_text().split("[[key]]")[2]
    machine.write("/etc/ovserve.keys.toml", f"[[key]]{kept}", 0o600)
    machine.run("systemctl", "reload", "ovserve")
    machine.run("sh", "-c", "until journalctl --unit ovserve --no-pager | grep -q ' reloaded '; do sleep 0.1; done")
    assert machine.run(*ask, *status) == "401"
    for name in ("ovserve.keys.toml", "ovserve.pem"):
        (machine.root / "etc" / name).unlink()
    machine.run(INSTALL)  # without the files, their copies go too


def test_socket_unit_keeps_connections_during_a_restart(machine: Machine) -> None:
    machine.run(INSTALL, "--socket")
    machine.run("systemctl", "start", "ovserve.socket", "ovserve")
    assert code(machine, "/v2/health/ready") == "200"
    machine.run("systemctl", "restart", "--no-block", "ovserve")
    codes = {code(machine, "/v2/health/ready") for _ in range(20)}
    assert codes <= {"200", "503"}
    unix = ["curl", "--silent", "--unix-socket", "/run/ovserve.sock", "http://any/v2/health/live"]
    assert "true" in machine.run(*unix)
    machine.run("systemctl", "stop", "ovserve.socket", "ovserve")


def test_purge_leaves_no_file(machine: Machine) -> None:
    before = {*names(machine.root)}
    assert "etc/ovserve.toml" in before
    machine.run(INSTALL, "--purge")
    left = [name for name in names(machine.root) if "ovserve" in name and not name.startswith(SOURCE)]
    assert left == []
    assert machine.run("sh", "-c", "find /run /dev/shm /tmp -name '*ovserve*'") == ""


def names(root: Path) -> list[str]:
    """Return the paths of all files on the disk of the system, except the journal."""
    found = (str(path.relative_to(root)) for path in root.rglob("*"))
    return [name for name in found if not name.startswith(("proc", "sys/", "var/log"))]
