"""Several addresses of one server: the shared limit of connections, Unix sockets, sockets of the service manager."""

from __future__ import annotations

import grp
import os
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from ovserve.errors import StartupError
from ovserve.front import listener as listener_module
from ovserve.front.listener import Listener, ListenerGroup
from ovserve.settings.access import ListenAddress, parse_listen
from ovserve.settings.options import Settings
from ovserve.wire.local.spool import Spool
from tests.rawclient import RawClient
from tests.toyapi import ToyApi

DESCRIBE = b"GET /describe HTTP/1.1\r\nHost: a.test\r\n\r\n"

pytestmark = pytest.mark.usefixtures("leak_guard")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", ListenAddress("127.0.0.1", 80)),
        ("https://[::1]:8443", ListenAddress("::1", 8443, scheme="https")),
        ("http://localhost:1", ListenAddress("127.0.0.1", 1, scheme="http")),
        ("unix:/run/x.sock", ListenAddress("", 0, "/run/x.sock")),
    ],
)
def test_addresses_are_parsed(text: str, address: ListenAddress) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize("text", ["ftp://127.0.0.1:1", "http://127.0.0.1", "unix:x.sock", "http:///run/x", ""])
def test_malformed_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected an address with a port"):
        parse_listen(text)


def test_listeners_share_the_limit_of_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "MIN_QUIET_S", 0.0)
    path = tmp_path / "http.sock"
    settings = Settings(max_connections=2, allowed_hosts="*", socket_mode="640")
    group, api, spool = ListenerGroup(settings), ToyApi(), Spool(tmp_path, 1_000_000)
    with ExitStack() as stack:
        stack.callback(spool.close)
        stack.callback(api.close)
        places = [ListenAddress("127.0.0.1", 0), ListenAddress("127.0.0.1", 0), ListenAddress("", 0, str(path))]
        first, second, third = (Listener(settings, api, spool, address=place, group=group) for place in places)
        for listener in (first, second, third):
            listener.start()
            stack.callback(listener.stop, 0)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert third.url == f"unix:{path}"
        quiet = [stack.enter_context(RawClient(listener.port)) for listener in (first, second)]
        for client in quiet:
            assert client.send(DESCRIBE).read_response().status == 200
        # Both places are taken, by connections at the other addresses: one gives way.
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(path))
            client.sendall(DESCRIBE)
            assert client.recv(12) == b"HTTP/1.1 200"
        assert quiet[0].read_rest() == b""
        assert quiet[1].send(DESCRIBE).read_response().status == 200


SHOW = """
from ovserve import systemd
found = systemd.inherited_sockets()
print([(name, s.getsockname()[1], s.get_inheritable()) for name, s in found], systemd.inherited_sockets())
"""


def inherited(*, descriptor: int, pid: str = "$$", names: str = "admin") -> subprocess.CompletedProcess[str]:
    """Run a process as systemd does, with a descriptor as number 3; it prints what it inherits."""
    command = f'exec 3<&{descriptor}; LISTEN_FDS=1 LISTEN_PID={pid} LISTEN_FDNAMES={names} exec "$0" -c "$1"'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, SHOW],
        pass_fds=[descriptor], capture_output=True, text=True, timeout=60, check=False, env={**os.environ},
    )  # fmt: skip


def test_sockets_of_the_service_manager_are_taken_over_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert inherited(descriptor=server.fileno()).stdout == f"[('admin', {port}, False)] []\n"
        assert inherited(descriptor=server.fileno(), pid="1").stdout == "[] []\n"  # meant for another process
        with socket.create_connection(("127.0.0.1", port)) as connected:
            assert "is not a listening socket" in inherited(descriptor=connected.fileno()).stderr
    with open(os.devnull, "rb") as nothing:
        assert "OSError" in inherited(descriptor=nothing.fileno()).stderr


def test_unix_socket_gets_an_owner_and_a_group(tmp_path: Path) -> None:
    own, path = os.getgid(), tmp_path / "http.sock"
    name = grp.getgrgid(own).gr_name
    number = "65534" if os.getuid() == 0 else str(os.getuid())  # only root can give a file away
    settings = Settings(socket_mode="660", socket_owner=number, socket_group=name)
    api, spool = ToyApi(), Spool(tmp_path, 1_000_000)
    with ExitStack() as stack:
        stack.callback(spool.close)
        stack.callback(api.close)
        listener = Listener(settings, api, spool, address=ListenAddress("", 0, str(path)))
        stack.callback(listener.stop, 0)
        found = path.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (int(number), own, 0o660)
        for wrong in ({"socket_group": "no-such-group"}, {"socket_owner": "no-such-user"}):
            other = tmp_path / "other.sock"
            with pytest.raises(StartupError, match=r"no-such-.*socket_owner, socket_group"):
                Listener(Settings(**wrong), api, spool, address=ListenAddress("", 0, str(other)))  # type: ignore[arg-type]
            assert not other.exists()
