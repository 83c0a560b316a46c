"""Pulls from a fake hub: what arrives, faults of the hub and the disk, and hostile content."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovserve.cli import pull
from ovserve.cli.commands import ExitCode
from ovserve.errors import HubError, StartupError
from ovserve.hub.client import HubClient
from ovserve.hub.progress import Event, Reporter, Snapshot
from ovserve.hub.pull import Puller, PullRequest, find_pulled
from ovserve.hub.stored import RECORD, read_record
from ovserve.hub.transfer import Retries, Stopped
from ovserve.models.profile import builtin_directory
from tests.fakehub import FakeHub

QUICK = Retries(limit=3, delay_s=0.001, max_delay_s=0.01)
REPOSITORY = "owner/shapes"


class Notes(Reporter):
    """Keeps what a pull reports."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.snapshots: list[Snapshot] = []

    def progress(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def show(self, event: Event) -> None:
        self.events.append(event)

    def named(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a pipeline as on a hub: the built-in model with files that no server reads."""
    root = tmp_path_factory.mktemp("hub")
    folder = root / REPOSITORY
    shutil.copytree(builtin_directory(), folder)
    (folder / "README.md").write_text("# a model\n")
    (folder / ".gitattributes").write_text("*.bin lfs\n")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80pickle" * 1000)
    (folder / "unet" / "custom.py").write_text("raise SystemExit\n")
    return root


@pytest.fixture
def hub(repositories: Path) -> Iterator[FakeHub]:
    with FakeHub(repositories) as found:
        yield found


def puller(hub: FakeHub, root: Path, notes: Reporter | None = None, **options: Any) -> Puller:
    """Return a puller of the model in the fake hub."""
    token, free = options.pop("token", ""), options.pop("free_bytes", None)
    memory, stop = options.pop("memory_bytes", 1 << 40), options.pop("stop", threading.Event())
    request = PullRequest(**{"repository": REPOSITORY, "root": root, **options})
    client = HubClient(hub.url, token, timeout_s=10)
    return Puller(client, request, notes or Reporter(), stop, retries=QUICK, memory_bytes=memory, free_bytes=free)


def test_pull_brings_only_the_files_that_the_server_reads(hub: FakeHub, tmp_path: Path, leak_guard: None) -> None:
    notes = Notes()
    directory = puller(hub, tmp_path, notes).run()
    assert directory == tmp_path / "owner" / "shapes"
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    source = builtin_directory()
    wanted = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()} - {"MODEL_CARD.md"}
    assert found == wanted | {RECORD}
    assert all((directory / path).read_bytes() == (source / path).read_bytes() for path in wanted)
    record = read_record(directory)
    assert record is not None
    assert (record.repository, record.revision, record.commit) == (REPOSITORY, "main", "a" * 40)
    assert find_pulled(tmp_path, REPOSITORY, "main") == directory
    plan = notes.named("plan")[0].values
    assert plan["total_bytes"] == sum((directory / path).stat().st_size for path in wanted)
    assert notes.snapshots[-1].percent == 100
    assert not (tmp_path / "owner" / ".shapes.pull").exists()


def test_second_pull_asks_for_the_listing_only(hub: FakeHub, tmp_path: Path) -> None:
    puller(hub, tmp_path).run()
    hub.seen.clear()
    puller(hub, tmp_path).run()
    assert set(hub.downloads()) == {"model_index.json"}


def test_missing_file_is_pulled_again_and_the_others_are_kept(hub: FakeHub, tmp_path: Path) -> None:
    directory = puller(hub, tmp_path).run()
    (directory / "unet" / "openvino_model.bin").unlink()
    assert find_pulled(tmp_path, REPOSITORY, "main") is None
    hub.seen.clear()
    puller(hub, tmp_path).run()
    assert set(hub.downloads()) == {"model_index.json", "unet/openvino_model.bin"}


def test_new_commit_brings_only_what_changed(repositories: Path, tmp_path: Path) -> None:
    shutil.copytree(repositories, tmp_path / "hub")
    with FakeHub(tmp_path / "hub") as hub:
        directory = puller(hub, tmp_path / "models").run()
        old = (directory / "unet" / "config.json").open()
        hub.faults.commit = "b" * 40
        changed = tmp_path / "hub" / REPOSITORY / "unet" / "config.json"
        changed.write_text(json.dumps({**json.loads(changed.read_text()), "new": 1}))
        (tmp_path / "hub" / REPOSITORY / "ovserve.json").unlink()
        hub.seen.clear()
        assert puller(hub, tmp_path / "models").run() == directory
        assert set(hub.downloads()) == {"model_index.json", "unet/config.json"}
    with old:
        assert "new" not in json.load(old)  # a server that has the old file open keeps it
    assert json.loads((directory / "unet" / "config.json").read_text())["new"] == 1
    assert not (directory / "ovserve.json").exists()
    assert not list((tmp_path / "models" / "owner").glob(".shapes.*[!k]"))  # only the lock is left


def test_broken_connections_continue_where_they_ended(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.drop_after, hub.faults.drops = 5000, 12
    directory = puller(hub, tmp_path, connections=1).run()
    assert find_pulled(tmp_path, REPOSITORY, "main") == directory
    resumed = [seen.headers for seen in hub.seen if "range" in seen.headers]
    assert len(resumed) == 12
    assert all(headers["if-range"].startswith('"') for headers in resumed)


def test_connection_that_always_breaks_is_an_error_that_names_the_file(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.drop_after, hub.faults.drops = 500, 10**6
    hub.faults.no_ranges = True
    with pytest.raises(HubError, match=r"the connection ended after 500 of \d+ bytes") as failure:
        # Each attempt brings 500 bytes and loses them again, which is no progress.
        puller(hub, tmp_path).run()
    assert failure.value.is_transient


def test_hub_without_ranges_sends_the_whole_file_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.no_ranges = True
    hub.faults.drop_after, hub.faults.drops = 5000, 2
    assert find_pulled(tmp_path, REPOSITORY, "main") is None
    puller(hub, tmp_path, connections=1).run()
    assert find_pulled(tmp_path, REPOSITORY, "main") is not None


@pytest.mark.parametrize(("corruptions", "succeeds"), [(1, True), (5, False)])
@pytest.mark.parametrize("path", ["unet/openvino_model.bin", "scheduler/scheduler_config.json"])
def test_file_with_a_wrong_sum_is_received_once_more(
    hub: FakeHub, tmp_path: Path, path: str, corruptions: int, succeeds: bool
) -> None:
    hub.faults.corrupt, hub.faults.corruptions = path, corruptions
    if succeeds:
        directory = puller(hub, tmp_path).run()
        assert (directory / path).read_bytes() == (builtin_directory() / path).read_bytes()
    else:
        with pytest.raises(HubError, match=f"{path} has a wrong sum"):
            puller(hub, tmp_path).run()
        assert not (tmp_path / REPOSITORY).exists()
    assert hub.downloads()[path] == 2


def test_rate_limits_and_faults_of_the_hub_are_waited_out(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.rate_limited, hub.faults.broken = 1, 1
    puller(hub, tmp_path).run()
    hub.faults.broken = 100
    with pytest.raises(HubError, match="the hub answers with status 500") as failure:
        puller(hub, tmp_path).run()
    assert failure.value.is_transient


def test_redirect_to_another_host_gets_no_token(hub: FakeHub, repositories: Path, tmp_path: Path) -> None:
    with FakeHub(repositories) as storage:
        hub.faults.redirect_to = storage.url
        hub.faults.gated = "hf_secret"
        hub.faults.drop_after, storage.faults.drop_after, storage.faults.drops = 0, 5000, 3
        puller(hub, tmp_path, token="hf_secret").run()
        assert storage.seen
        assert not [seen for seen in storage.seen if "authorization" in seen.headers]
    assert all(seen.headers["authorization"] == "Bearer hf_secret" for seen in hub.seen)


def test_gated_repository_says_what_to_do(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.gated = "hf_right"
    with pytest.raises(HubError, match=rf"gated: accept its licence at {hub.url}/{REPOSITORY}, and set HF_TOKEN"):
        puller(hub, tmp_path).run()
    with pytest.raises(HubError, match="a token that may read it"):
        puller(hub, tmp_path, token="hf_wrong").run()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repository": "owner/nowhere"}, "owner/nowhere: no such repository"),
        ({"revision": "v9"}, "no such revision"),
        ({"memory_bytes": 1 << 20}, "of weights; serving it needs about"),
        ({"free_bytes": lambda _: 1 << 20}, "where 1.0 MB are free"),
        ({"is_offline": True}, "the pull is offline"),
    ],
)
def test_what_cannot_be_pulled_is_said_before_the_download(
    hub: FakeHub, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(HubError, match=words):
        puller(hub, tmp_path, **options).run()
    assert not [path for path in hub.downloads() if path != "model_index.json"]


def test_offline_pull_finds_what_is_complete(hub: FakeHub, tmp_path: Path) -> None:
    directory = puller(hub, tmp_path).run()
    hub.seen.clear()
    assert puller(hub, tmp_path, is_offline=True).run() == directory
    assert puller(hub, tmp_path, is_offline=True, revision="a" * 40).run() == directory
    assert not hub.seen


def test_directory_that_no_pull_has_made_is_replaced_only_on_request(hub: FakeHub, tmp_path: Path) -> None:
    own = tmp_path / REPOSITORY
    own.mkdir(parents=True)
    (own / "precious").touch()
    with pytest.raises(HubError, match="was not made by a pull"):
        puller(hub, tmp_path).run()
    assert (own / "precious").exists()
    assert puller(hub, tmp_path, replaces=True).run() == own
    assert not (own / "precious").exists()


def test_class_that_is_not_served_is_an_error_before_the_download(repositories: Path, tmp_path: Path) -> None:
    shutil.copytree(repositories, tmp_path / "hub")
    index = tmp_path / "hub" / REPOSITORY / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "AudioLDMPipeline"}))
    with FakeHub(tmp_path / "hub") as hub:
        with pytest.raises(HubError, match="'AudioLDMPipeline'"):
            puller(hub, tmp_path).run()
        assert set(hub.downloads()) == {"model_index.json"}


@pytest.mark.parametrize(
    "path",
    [
        "../evil",
        "/etc/passwd",
        "a/../../evil",
        "C:/evil",
        "c:evil",
        "a\\..\\evil",
        "a//b",
        "./a",
        "a\nb",
        "x" * 600,
        "",
    ],
)
def test_unsafe_path_in_a_listing_is_refused(hub: FakeHub, tmp_path: Path, path: str) -> None:
    hub.faults.listed = {"sha": "a" * 40, "siblings": [{"rfilename": path, "size": 1, "blobId": "0" * 40}]}
    with pytest.raises(HubError, match="unsafe path"):
        puller(hub, tmp_path / "models").run()
    assert not (tmp_path / "models").exists()


def listed(*files: dict[str, Any]) -> dict[str, Any]:
    """Return a listing as the hub sends it."""
    return {"sha": "a" * 40, "siblings": [{"size": 1, **file} for file in files]}


@pytest.mark.parametrize(
    ("listing", "words"),
    [
        ([], "no JSON object"),
        ({"sha": "main", "siblings": []}, "names no commit"),
        ({"sha": "a" * 40, "siblings": {}}, "no list"),
        (listed({"rfilename": "a", "size": -1}), "without a valid size"),
        (listed({"rfilename": "a", "size": True}), "without a valid size"),
        (listed({"rfilename": "a"}, {"rfilename": "A"}), "twice"),
        (listed({"rfilename": "a.safetensors"}), "use --lora"),
    ],
)
def test_wrong_listing_is_refused(hub: FakeHub, tmp_path: Path, listing: Any, words: str) -> None:
    hub.faults.listed = listing
    with pytest.raises(HubError, match=words):
        puller(hub, tmp_path).run()


def test_folder_that_is_a_symbolic_link_is_not_written_through(hub: FakeHub, tmp_path: Path) -> None:
    outside, staging = tmp_path / "outside", tmp_path / "models" / "owner" / ".shapes.pull"
    outside.mkdir()
    staging.mkdir(parents=True)
    (staging / "unet").symlink_to(outside)
    with pytest.raises(OSError, match="unet"):
        puller(hub, tmp_path / "models").run()
    assert not list(outside.iterdir())


def test_full_disk_is_an_error_and_the_next_pull_continues(hub: FakeHub, tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tiny", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs a privilege that this user does not have")
    try:
        with pytest.raises(HubError, match="No space left on device; make space and run the pull again") as failure:
            puller(hub, tmp_path, free_bytes=lambda _: 1 << 40).run()
        assert failure.value.is_transient
        subprocess.run(["mount", "-o", "remount,size=128m", str(tmp_path)], check=True)
        hub.seen.clear()
        notes = Notes()
        puller(hub, tmp_path, notes).run()
        assert notes.named("plan")[0].values["done_bytes"] > 500_000
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_stopped_pull_continues_at_the_next_one(hub: FakeHub, tmp_path: Path, leak_guard: None) -> None:
    hub.faults.hold, stop = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def pull() -> None:
        try:
            puller(hub, tmp_path, stop=stop).run()
        except Stopped as error:
            failures.append(error)

    running = threading.Thread(target=pull)
    running.start()
    assert hub.holding.wait(30)
    stop.set()
    running.join(30)
    assert not running.is_alive()
    assert failures
    hub.faults.hold.set()
    hub.faults.hold = None
    hub.seen.clear()
    puller(hub, tmp_path).run()
    assert [seen for seen in hub.seen if "range" in seen.headers]


def test_part_of_another_commit_is_not_continued(repositories: Path, tmp_path: Path) -> None:
    shutil.copytree(repositories, tmp_path / "hub")
    with FakeHub(tmp_path / "hub") as hub:
        hub.faults.drop_after, hub.faults.drops = 5000, 100
        hub.faults.no_ranges = True
        with pytest.raises(HubError):
            puller(hub, tmp_path / "models").run()
        hub.faults.drops, hub.faults.no_ranges = 0, False
        hub.faults.commit = "b" * 40
        weights = tmp_path / "hub" / REPOSITORY / "unet" / "openvino_model.bin"
        weights.write_bytes(weights.read_bytes()[::-1])
        directory = puller(hub, tmp_path / "models").run()
        assert (directory / "unet" / "openvino_model.bin").read_bytes() == weights.read_bytes()


def test_two_pulls_at_once_download_each_file_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.hold = threading.Event()
    second_notes = Notes()
    results: list[Path] = []
    first = threading.Thread(target=lambda: results.append(puller(hub, tmp_path).run()))
    first.start()
    assert hub.holding.wait(30)
    waiting = threading.Event()

    class Second(Notes):
        def show(self, event: Event) -> None:
            super().show(event)
            if event.name == "wait":
                waiting.set()

    second_notes = Second()
    second = threading.Thread(target=lambda: results.append(puller(hub, tmp_path, second_notes).run()))
    second.start()
    assert waiting.wait(30)
    hub.faults.hold.set()
    first.join(30)
    second.join(30)
    assert results == [tmp_path / REPOSITORY] * 2
    del hub.downloads()["model_index.json"]
    assert {count for path, count in hub.downloads().items() if path != "model_index.json"} == {1}


# --- adapters ---------------------------------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes) -> bytes:
    """Return a file of the format."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = safetensors({"x": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}}, bytes(12))


@pytest.mark.parametrize("content", [GOOD, b"", b"\x80\x04pickle", GOOD[:-1], GOOD + b"x"])
def test_adapter_is_checked_before_it_is_put_in_place(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "hub" / "artist" / "style"
    folder.mkdir(parents=True)
    (folder / "style.safetensors").write_bytes(content)
    (folder / "style.bin").write_bytes(b"pickle")
    target = tmp_path / "models" / "artist" / "style" / "style.safetensors"
    with FakeHub(tmp_path / "hub") as hub:
        pull = puller(hub, tmp_path / "models", repository="artist/style", adapter="")
        if content == GOOD:
            assert pull.run() == target
            assert target.read_bytes() == GOOD
        else:
            with pytest.raises(StartupError, match="not a safetensors file"):
                pull.run()
            assert not target.exists()
        assert set(hub.downloads()) <= {"style.safetensors"}


def test_second_adapter_of_a_repository_keeps_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "artist" / "style"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(GOOD)
    with FakeHub(tmp_path / "hub") as hub:

        def pull(file: str, **options: Any) -> Path:
            return puller(hub, tmp_path / "m", repository="artist/style", adapter=file, **options).run()

        with pytest.raises(HubError, match=r"has a.safetensors, b.safetensors; choose one: artist/style@FILE"):
            pull("")
        with pytest.raises(HubError, match=r"has no 'c\.safetensors'"):
            pull("c.safetensors")
        with pytest.raises(HubError, match="other formats can run code"):
            pull("a.ckpt")
        first = pull("a.safetensors")
        second = pull("b.safetensors")
        assert first.exists()
        assert second.exists()
        assert pull("a.safetensors", is_offline=True) == first


# --- the command ------------------------------------------------------------------------------------------------------


def command(hub: FakeHub, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "ovserve", "pull", *arguments]


def variables(hub: FakeHub, **more: str) -> dict[str, str]:
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "", **more}


def test_killed_pull_is_continued_by_the_next_process(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.hold = threading.Event()
    arguments = command(hub, REPOSITORY, "--model_repository_path", str(tmp_path), "--json")
    with subprocess.Popen(arguments, env=variables(hub), stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout
        for line in killed.stdout:
            if json.loads(line).get("done_bytes", 0) >= 100:
                break
        killed.send_signal(signal.SIGKILL)
    hub.faults.hold.set()
    hub.faults.hold = None
    hub.seen.clear()
    done = subprocess.run(arguments, env=variables(hub), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"plan", "progress", "done"} <= {event["event"] for event in events}
    assert next(event for event in events if event["event"] == "plan")["done_bytes"] >= 100
    assert [event for event in events if event["event"] == "progress"][-1]["percent"] == 100
    assert [seen for seen in hub.seen if "range" in seen.headers]
    assert find_pulled(tmp_path, REPOSITORY, "main") is not None


def test_interrupted_pull_says_that_it_continues(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults.hold = threading.Event()
    arguments = command(hub, REPOSITORY, "--model-repository-path", str(tmp_path))
    with subprocess.Popen(
        arguments, env=variables(hub), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert hub.holding.wait(30)
        running.send_signal(signal.SIGINT)
        output, log = running.communicate(timeout=30)
    assert running.returncode == 75
    assert "the same command continues the pull" in log.splitlines()[-1]
    assert "\x1b" not in log  # no bar in a pipe
    assert not output


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "name a repository"),
        (["../x"], 2, "expected OWNER/NAME"),
        ([REPOSITORY, "--revision", "../x"], 2, "--revision"),
        ([REPOSITORY, "--connections", "0"], 2, "expected 1 to 16"),
        ([REPOSITORY, "--extra_quantization_params=--trust-remote-code"], 2, "--trust-remote-code"),
        (["owner/nowhere"], 2, "no such repository"),
        ([REPOSITORY, "--offline"], 2, "offline"),
    ],
)
def test_wrong_command_is_one_line_with_its_exit_code(
    hub: FakeHub, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    done = subprocess.run(
        command(hub, *arguments, "--model_repository_path", str(tmp_path)),
        env=variables(hub), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_pull_restores_the_handlers_of_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    seen: list[object] = []

    class Ready:
        def __init__(self, *_: object) -> None:
            pass

        def run(self) -> Path:
            seen.extend(map(signal.getsignal, numbers))
            return tmp_path

    monkeypatch.setattr(pull, "Puller", Ready)
    before = [signal.getsignal(number) for number in numbers]
    assert pull.run([REPOSITORY, "--model_repository_path", str(tmp_path)]) == ExitCode.OK
    assert len(set(seen)) == 1
    assert not set(seen) & set(before)
    assert [signal.getsignal(number) for number in numbers] == before


def test_pull_alone_does_not_import_what_measures_plans() -> None:
    code = "import sys, ovserve.cli.pull; sys.exit('ovserve.cli.tune' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pulled_model_is_tuned_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[list[str]] = []
    codes = [ExitCode.TRANSIENT, ExitCode.OK]
    monkeypatch.setattr(pull, "pull_all", lambda *_: codes.pop(0))
    monkeypatch.setattr("ovserve.cli.tune.run", lambda arguments: tuned.append(arguments) or ExitCode.MODELS_FAILED)
    arguments = [REPOSITORY, "--model_repository_path", str(tmp_path), "--tune"]
    assert (pull.run(arguments), tuned) == (ExitCode.TRANSIENT, [])
    assert pull.run(arguments) == ExitCode.MODELS_FAILED
    assert tuned == [[str(tmp_path / REPOSITORY), "--write"]]
    for wrong in ([REPOSITORY, "--tune", "--json"], ["--lora", REPOSITORY, "--tune"]):
        with pytest.raises(SystemExit):
            pull.run(wrong)
