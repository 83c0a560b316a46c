"""Requests to a hub: which addresses are connected to, proxies, redirects, and the variables of the environment."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.errors import HubError
from ovserve.hub.addresses import connect, is_private_host
from ovserve.hub.client import HubClient
from ovserve.hub.environment import endpoint_of, is_offline, token_of
from ovserve.hub.listing import Listing, check_path, parse_listing
from tests.fakehub import FakeHub


def resolver(**hosts: str) -> Any:
    """Return a stand-in for getaddrinfo: `hub_example="93.184.216.34"`; other names are looked up."""

    def resolve(host: str, port: int, **options: Any) -> list[Any]:
        return socket.getaddrinfo(hosts.get(host.replace(".", "_"), host), port, **options)

    return resolve


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    folder = tmp_path / "owner" / "model"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "large.json").write_text(json.dumps("x" * 2000))
    with FakeHub(tmp_path) as found:
        yield found


PRIVATE = [
    "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
    "::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "2002:7f00:1::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_host_with_a_private_address_is_not_connected_to(address: str) -> None:
    resolve = resolver(cdn_example=address)
    assert is_private_host("cdn.example", 443, resolve)
    with pytest.raises(HubError, match=r"cdn\.example, which is .*: not a public address"):
        connect("cdn.example", 443, 5, may_be_private=False, resolve=resolve)


def test_one_private_address_among_public_ones_is_enough() -> None:
    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(2, 1, 6, "", (address, port)) for address in ("93.184.216.34", "127.0.0.1")]

    assert is_private_host("cdn.example", 443, resolve)
    assert not is_private_host("93.184.216.34", 443)


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:1", "http://2130706433", "http://0x7f.1", "http://[::1]", "http://localhost"]
)
def test_redirect_to_a_private_address_by_a_proxy_is_refused(hub: FakeHub, target: str) -> None:
    client = HubClient(
        "http://hub.example", proxies={"http": hub.url}, timeout_s=10, resolve=resolver(hub_example="93.184.216.34")
    )
    listing = client.listing("owner/model", "main")
    assert hub.seen[-1].path == "/api/models/owner/model/revision/main"
    hub.faults.redirect_to = target
    with pytest.raises(HubError, match="not a public address"):
        client.document(listing, "large.json")


def test_hub_on_loopback_may_redirect_to_loopback(hub: FakeHub, tmp_path: Path) -> None:
    with FakeHub(tmp_path) as storage:
        hub.faults.redirect_to = storage.url
        client = HubClient(hub.url, timeout_s=10)
        assert client.document(client.listing("owner/model", "main"), "large.json") == "x" * 2000
        assert storage.seen


@pytest.mark.parametrize("target", ["ftp://a.example/x", "http://user:password@a.example/", "http://a.example/ b"])
def test_redirect_to_no_proper_url_is_refused(hub: FakeHub, target: str) -> None:
    client = HubClient(hub.url, timeout_s=10)
    listing = client.listing("owner/model", "main")
    hub.faults.redirect_to = target
    with pytest.raises(HubError, match="redirects to a wrong place"):
        client.document(listing, "large.json")


def test_redirects_without_end_are_an_error(hub: FakeHub) -> None:
    client = HubClient(hub.url, timeout_s=10)
    listing = client.listing("owner/model", "main")
    hub.faults.redirect_to = f"{hub.url}/owner/model/resolve/main/large.json?"
    with pytest.raises(HubError, match="more than 5 redirects"):
        client.document(listing, "large.json")


@pytest.mark.parametrize("endpoint", ["", "huggingface.co", "file:///etc", "http://", "https://user:pw@hub.example"])
def test_wrong_endpoint_is_an_error(endpoint: str) -> None:
    with pytest.raises(HubError, match="HF_ENDPOINT"):
        HubClient(endpoint)


def test_token_with_a_line_end_is_refused() -> None:
    with pytest.raises(HubError, match="HF_TOKEN contains"):
        HubClient(token="hf_a\r\nx: y")


def test_hub_that_cannot_be_reached_is_a_fault_that_may_pass() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        client = HubClient(f"http://127.0.0.1:{closed.getsockname()[1]}", timeout_s=5)
        with pytest.raises(HubError, match="cannot be reached") as failure:
            client.listing("owner/model", "main")
    assert failure.value.is_transient


def test_variables_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_file\n")
    assert endpoint_of({}) == "https://huggingface.co"
    assert endpoint_of({"HF_ENDPOINT": "https://mirror.example/"}) == "https://mirror.example"
    assert token_of({"HF_TOKEN": "hf_a", "HF_HOME": str(tmp_path)}) == "hf_a"
    assert token_of({"HF_HOME": str(tmp_path)}) == "hf_file"
    assert token_of({"HF_TOKEN_PATH": str(tmp_path / "token"), "HOME": "/nowhere"}) == "hf_file"
    assert token_of({"HOME": str(tmp_path)}) == ""
    with pytest.raises(HubError, match="HF_TOKEN_PATH"):
        token_of({"HF_TOKEN_PATH": str(tmp_path / "missing")})
    assert is_offline({"HF_HUB_OFFLINE": "1"})
    assert not is_offline({"HF_HUB_OFFLINE": "0"})


@given(st.text(max_size=40))
def test_checked_path_stays_inside_its_directory(path: str) -> None:
    try:
        checked = check_path(path)
    except ValueError:
        return
    assert Path("/root/target", checked).resolve().is_relative_to("/root/target")
    assert Path(checked).parts == tuple(checked.split("/"))


KEYS = st.sampled_from(["sha", "siblings", "rfilename", "size", "lfs", "sha256", "blobId"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


@given(JSON | st.fixed_dictionaries({"sha": st.just("a" * 40), "siblings": st.lists(JSON, max_size=3)}))
def test_any_listing_is_parsed_or_refused(document: Any) -> None:
    try:
        listing = parse_listing(document, "owner/model")
    except HubError:
        return
    assert isinstance(listing, Listing)
