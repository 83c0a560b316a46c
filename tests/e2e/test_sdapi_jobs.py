"""AUTOMATIC1111's API on a live server with toy workers: keys, the caller's own progress and interrupt, errors."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faultserver import TINY_PNG, FaultServer
from tests.live import BUILTIN_NAME as NAME
from tests.rawclient import RawClient

PICTURE = base64.b64encode(TINY_PNG).decode()
KEYS = ("sk-one", "sk-two")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    folder = tmp_path_factory.mktemp("sdapi")
    (folder / "spool").mkdir()
    (folder / "keys").write_text("\n".join(KEYS))
    (folder / "keys").chmod(0o600)
    arguments = ("--api_key_file", str(folder / "keys"))
    with FaultServer(folder / "spool", *arguments, toy_options={"capacity": 8}) as server:
        yield server


@pytest.fixture
def clients(keyed: FaultServer) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Clients with the one and the other key as a password."""
    one, two = (
        httpx.Client(base_url=f"{keyed.url}/sdapi/v1", auth=("me", key), timeout=60, verify=False) for key in KEYS
    )
    with one, two:
        yield one, two


def progress(client: httpx.Client, **query: str) -> dict[str, Any]:
    reply = client.get("/progress", params=query)
    assert reply.status_code == 200
    document: dict[str, Any] = reply.json()
    return document


def until(is_so: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(600):
        if is_so():
            return
        pause.wait(0.05)
    raise AssertionError("not within 30 s")


def texts(reply: httpx.Response) -> list[str]:
    """Return the bytes that the toys deliver for each picture, as text."""
    assert reply.status_code == 200, reply.text
    return [base64.b64decode(image).decode() for image in reply.json()["images"]]


# --- keys -------------------------------------------------------------------------------------------------------------


def test_key_is_the_password_of_any_user(keyed: FaultServer) -> None:
    for auth in (("", "sk-one"), ("admin", "sk-two"), ("a:b", "x")):
        status = httpx.get(f"{keyed.url}/sdapi/v1/options", auth=auth).status_code
        assert status == (401 if auth[1] == "x" else 200)
    assert httpx.get(f"{keyed.url}/v1/models", auth=("me", "sk-one")).status_code == 200
    bearer = {"authorization": "Bearer sk-one"}
    assert httpx.get(f"{keyed.url}/sdapi/v1/options", headers=bearer).status_code == 200


@pytest.mark.parametrize("credentials", ["Basic", "Basic !!!", "Basic c2stb25l", "Basic OnNr", "Bearer", "Basic Og=="])
def test_missing_and_malformed_credentials_get_this_api_s_401(keyed: FaultServer, credentials: str) -> None:
    reply = httpx.get(f"{keyed.url}/sdapi/v1/progress", headers={"authorization": credentials})
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"].startswith("Basic ")
    assert "API key" in reply.json()["detail"]
    other = httpx.get(f"{keyed.url}/v1/models", headers={"authorization": credentials})
    assert (other.headers["www-authenticate"], list(other.json())) == ("Bearer", ["error"])


# --- the caller's own jobs --------------------------------------------------------------------------------------------


def test_progress_shows_only_the_caller_s_jobs(clients: tuple[httpx.Client, httpx.Client]) -> None:
    one, two = clients
    assert progress(one)["state"]["job_count"] == 0
    with ThreadPoolExecutor() as pool:
        running = pool.submit(one.post, "/txt2img", json={"prompt": "paint 60", "batch_size": 2, "seed": 7})
        until(lambda: progress(one)["current_image"] is not None)
        mine, theirs = progress(one), progress(two)
        assert base64.b64decode(mine["current_image"]) == b"preview"
        assert mine["progress"] == 0.25  # one of two steps of one of two pictures
        assert mine["eta_relative"] > 0
        state = mine["state"]
        assert (state["job"], state["job_count"], state["job_no"]) == ("scripts_txt2img", 2, 0)
        assert (state["sampling_step"], state["sampling_steps"], state["jobs"]) == (1, 2, 1)
        assert progress(one, skip_current_image="true")["current_image"] is None
        assert (theirs["progress"], theirs["current_image"], theirs["state"]["job_count"]) == (0, None, 0)
        assert two.post("/interrupt").json() == {}
        assert progress(one)["state"]["jobs"] == 1  # the other client's interrupt has ended nothing
        assert one.post("/interrupt").json() == {}
        reply = running.result(30)
    assert reply.status_code == 200
    assert reply.json()["images"] == []
    info = json.loads(reply.json()["info"])
    assert info["interrupted"] is True
    assert info["all_seeds"] == [7, 8]
    assert progress(one)["state"]["job_count"] == 0


def test_interrupted_job_returns_the_finished_pictures(clients: tuple[httpx.Client, httpx.Client]) -> None:
    one, _ = clients
    with ThreadPoolExecutor() as pool:
        running = pool.submit(one.post, "/txt2img", json={"prompt": "first 60", "n_iter": 3, "seed": 1})
        until(lambda: bool(progress(one)["state"]["job_no"] == 1))
        one.post("/interrupt")
        reply = running.result(30)
    assert texts(reply) == ["first 60|1"]


def test_interrupt_ends_queued_and_running_jobs_but_no_others(
    keyed: FaultServer, clients: tuple[httpx.Client, httpx.Client]
) -> None:
    one, two = clients
    with ThreadPoolExecutor() as pool:
        mine = [pool.submit(one.post, "/txt2img", json={"prompt": "sleep 60"}) for _ in range(3)]
        theirs = pool.submit(two.post, "/txt2img", json={"prompt": "steps 200 0.05"})
        until(lambda: progress(one)["state"]["jobs"] == 3 and progress(two)["state"]["sampling_step"] > 0)
        one.post("/interrupt")
        assert [future.result(30).json()["images"] for future in mine] == [[], [], []]
        assert progress(two)["state"]["jobs"] == 1
        two.post("/interrupt")
        theirs.result(30)
    # Jobs of the other routes of the same client are not ended.
    with keyed.client() as client, ThreadPoolExecutor() as pool:
        client.headers["authorization"] = "Bearer sk-one"
        running = pool.submit(keyed.generate, client, "sleep 1")
        until(lambda: keyed_running(client) == 1)
        one.post("/interrupt")
        assert running.result(30).status_code == 200


def opened(server: FaultServer) -> httpx.Client:
    """Return a client without a key."""
    return httpx.Client(base_url=f"{server.url}/sdapi/v1", timeout=60)


def keyed_running(client: httpx.Client) -> int:
    return int(client.get("/v1/models").json()["data"][0]["running"])


def test_without_keys_the_address_is_the_caller(tmp_path: Path) -> None:
    with FaultServer(tmp_path) as server, opened(server) as client, ThreadPoolExecutor() as pool:
        running = pool.submit(client.post, "/txt2img", json={"prompt": "sleep 60"})
        until(lambda: progress(client)["state"]["jobs"] == 1)
        stranger = httpx.get(f"{server.url}/sdapi/v1/progress", auth=("", "some-key")).json()
        assert stranger["state"]["jobs"] == 0
        client.post("/interrupt")
        assert running.result(30).json()["images"] == []


def test_client_that_leaves_ends_its_job(keyed: FaultServer, clients: tuple[httpx.Client, httpx.Client]) -> None:
    one, _ = clients
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{keyed.url}/sdapi/v1/txt2img", auth=("", "sk-one"), json={"prompt": "sleep 60"}, timeout=0.5)
    until(lambda: progress(one)["state"]["jobs"] == 0)
    until(lambda: not keyed.segments())


# --- replies ----------------------------------------------------------------------------------------------------------


def test_pictures_parameters_and_info(clients: tuple[httpx.Client, httpx.Client]) -> None:
    one, _ = clients
    body = {"prompt": "echo hi", "batch_size": 2, "seed": 5, "steps": 3, "eta": 0.3, "nonsense": True}
    reply = one.post("/txt2img", json=body)
    assert texts(reply) == ["echo hi|5", "echo hi|6"]
    document = reply.json()
    assert list(document) == ["images", "parameters", "info"]
    assert {name: document["parameters"][name] for name in ("prompt", "steps", "batch_size")} == {
        "prompt": "echo hi", "steps": 3, "batch_size": 2,
    }  # fmt: skip
    assert "nonsense" not in document["parameters"]
    info = json.loads(document["info"])
    assert (info["seed"], info["all_seeds"], info["steps"]) == (5, [5, 6], 3)
    assert info["all_prompts"] == ["echo hi", "echo hi"]
    assert set(info["ignored"]) == {"nonsense", "eta"}
    assert reply.headers["x-ovserve-ignored"] in ("nonsense, eta", "eta, nonsense")
    assert one.post("/txt2img", json={"prompt": "echo hi", "send_images": False}).json()["images"] == []


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_image_reaches_the_worker_byte_for_byte(clients: tuple[httpx.Client, httpx.Client], prefix: str) -> None:
    one, _ = clients
    body = {"prompt": "echo", "init_images": [prefix + PICTURE], "mask": prefix + PICTURE}
    reply = one.post("/img2img", json=body)
    assert base64.b64decode(reply.json()["images"][0]) == TINY_PNG
    assert reply.json()["parameters"]["init_images"] is None


def test_errors_have_this_api_s_form(clients: tuple[httpx.Client, httpx.Client]) -> None:
    one, _ = clients
    for path, body, status, loc in (
        ("/txt2img", {"prompt": "x", "steps": 0}, 422, ["body", "steps"]),
        ("/img2img", {"prompt": "raise", "init_images": [PICTURE]}, 422, ["body", "init_images"]),  # by the worker
        ("/img2img", {"prompt": "x"}, 404, None),
        ("/txt2img", {"prompt": "x", "sampler_name": "Heun"}, 404, None),
        ("/txt2img", {"prompt": "x", "override_settings": {"sd_model_checkpoint": "y"}}, 404, None),
        ("/options", {"sd_model_checkpoint": "y"}, 404, None),
        ("/options", {"sd_model_checkpoint": 5}, 422, ["body", "sd_model_checkpoint"]),
        ("/png-info", {"image": "nonsense"}, 422, ["body", "image"]),
        ("/scripts", {}, 404, None),
        ("/sd-models", {}, 405, None),
    ):
        reply = one.post(path, json=body)
        assert reply.status_code == status, (path, reply.text)
        found = reply.json()["detail"]
        assert (found[0]["loc"] if status == 422 else None) == loc
        assert reply.json()["errors"]
        assert isinstance(found, list if status == 422 else str)
    malformed = one.post("/txt2img", content=b'{"prompt": ', headers={"content-type": "application/json"})
    assert malformed.status_code == 422
    assert one.post("/txt2img", data={"prompt": "x"}, files={"a": b"b"}).status_code == 415


def test_limits_are_those_of_the_other_routes(tmp_path: Path) -> None:
    limits = ("--queue_limit", "1", "--max_body_bytes", "100000")
    with (
        FaultServer(tmp_path, *limits, toy_options={"capacity": 1}) as server,
        opened(server) as client,
        ThreadPoolExecutor() as pool,
    ):
        jobs = [pool.submit(client.post, "/txt2img", json={"prompt": "sleep 60"}) for _ in range(2)]
        until(lambda: progress(client)["state"]["jobs"] == 2)
        full = client.post("/txt2img", json={"prompt": "echo"})
        assert (full.status_code, type(full.json()["detail"])) == (429, str)
        assert full.headers["retry-after"]
        large = client.post("/img2img", json={"prompt": "x", "init_images": ["A" * 200_000]})
        assert large.status_code == 413
        client.post("/interrupt")
        assert [job.result(30).status_code for job in jobs] == [200, 200]
        page = httpx.get(f"{server.url}/metrics").text
        assert 'ovserve_http_responses_total{route="/sdapi/v1/txt2img",status="429"} 1.0' in page
        assert 'state="cancelled"} 2.0' in page


def test_deadline_is_504(clients: tuple[httpx.Client, httpx.Client]) -> None:
    one, _ = clients
    reply = one.post("/txt2img", json={"prompt": "sleep 60"}, headers={"x-timeout-s": "0.2"})
    assert (reply.status_code, reply.json()["error"]) == (504, "deadline_exceeded")


def test_handler_of_a_short_job_never_misses_its_end(keyed: FaultServer) -> None:
    headers = {"authorization": "Bearer sk-one"}
    with httpx.Client(base_url=keyed.url, headers=headers, timeout=10) as client:  # below the pause of a stream
        for path, body in (("/sdapi/v1/txt2img", {}), ("/v1/images/generations", {"stream": True})):
            for _ in range(150):
                assert client.post(path, json={"prompt": "echo", **body}).status_code == 200


def test_options_change_nothing(clients: tuple[httpx.Client, httpx.Client]) -> None:
    one, _ = clients
    options = one.get("/options").json()
    assert options["sd_model_checkpoint"] == NAME
    assert one.post("/options", json={**options, "CLIP_stop_at_last_layers": 2}).json() is None
    assert one.post("/options", json={"sd_model_checkpoint": f"{NAME}.safetensors [0123abcd]"}).status_code == 200
    assert one.get("/options").json() == options


def test_open_webui_requests_are_served(keyed: FaultServer) -> None:
    """Replay what the engine automatic1111 of Open WebUI 0.12.4 sends, byte for byte except for port, key and prompt.

    Recorded from its unmodified functions, `verify_connection`, `get_models`, `set_image_model`, `image_generations`.
    """
    credentials = base64.b64encode(b"me:sk-one").decode()

    def replay(method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        head = (
            f"{method} /sdapi/v1/{path} HTTP/1.1\r\nHost: 127.0.0.1:{keyed.port}\r\n"
            f"authorization: Basic {credentials}\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
            "User-Agent: Python/3.11 aiohttp/3.14.5\r\n"
        )
        if body:
            head += f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n"
        with RawClient(keyed.port) as raw:
            raw.send(head.encode() + b"\r\n" + body)
            reply = raw.read_response()
            return reply.status, reply.json

    status, options = replay("GET", "options")
    assert (status, options["sd_model_checkpoint"]) == (200, NAME)
    assert replay("GET", "sd-models")[1][0]["title"] == NAME
    assert replay("POST", "options", json.dumps(options).encode()) == (200, None)
    body = b'{"prompt": "echo a cat", "batch_size": 2, "width": 128, "height": 128, "steps": 8}'
    status, made = replay("POST", "txt2img", body)
    assert status == 200
    assert base64.b64decode(made["images"][0]).startswith(b"echo a cat|")
    assert "," not in made["images"][0]  # the client takes what is before a comma for the head of a data URL
    assert json.loads(made["info"])["ignored"] == []
