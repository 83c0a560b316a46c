"""The commands `edit`, `generate` and `vary` against a live server, in pipes and in a terminal."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovserve.cli.commands import ExitCode
from tests.live import LiveServer

LIMIT_S = 120
PROMPT = "a green circle on a blue background"
COMMAND = [sys.executable, "-m", "ovserve"]


def environment(url: str = "", **more: str) -> dict[str, str]:
    known = {key: value for key, value in os.environ.items() if not key.startswith(("OVSERVE_", "OPENAI_"))}
    return {**known, **({"OVSERVE_URL": url} if url else {}), **more}


def run(*arguments: str, cwd: Path, url: str, stdin: bytes = b"", **more: str) -> tuple[int, bytes, str]:
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environment(url, **more),
        input=stdin,
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr.decode()


def pixels(path: Path | io.BytesIO) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture
def folder(tmp_path: Path, data: Path) -> Path:
    shutil.copy(data / "red_circle.png", tmp_path / "photo.png")
    return tmp_path


def test_edit_writes_beside_the_picture_and_overwrites_nothing(server: LiveServer, folder: Path) -> None:
    for name in ("photo-edited.png", "photo-edited-2.png"):
        code, out, err = run(
            "edit", "photo.png", "-p", PROMPT, "--seed", "3", "--strength", "0.5", cwd=folder, url=server.url
        )
        assert (code, err) == (0, "")
        assert out.decode() == f"{name}  seed 3\n"
    first, second = (folder / name for name in ("photo-edited.png", "photo-edited-2.png"))
    assert first.read_bytes() == second.read_bytes()
    red, green, blue = pixels(first)[128, 128]
    assert green > max(red, blue)


def test_mask_box_keeps_everything_outside(server: LiveServer, folder: Path) -> None:
    code, _, err = run(
        "edit",
        "photo.png",
        "-p",
        "a yellow star",
        "--mask-box",
        "64,64,128,128",
        "-o",
        "out.png",
        cwd=folder,
        url=server.url,
    )
    assert (code, err) == (0, "")
    changed = (pixels(folder / "photo.png") != pixels(folder / "out.png")).any(axis=2)
    assert changed[64:192, 64:192].any()
    changed[64:192, 64:192] = False
    assert not changed.any()


def test_several_files_go_to_a_directory_and_json_describes_them(server: LiveServer, folder: Path) -> None:
    shutil.copy(folder / "photo.png", folder / "other.png")
    (folder / "out").mkdir()
    code, out, _ = run("edit", "*.png", "-p", PROMPT, "--n", "2", "-o", "out", "--json", cwd=folder, url=server.url)
    assert code == 0
    documents = [json.loads(line) for line in out.splitlines()]
    assert [document["file"] for document in documents] == [
        f"out/{n}-{k}.png" for n in ("other", "photo") for k in (1, 2)
    ]
    assert all((folder / document["file"]).is_file() and document["size"] == "256x256" for document in documents)
    assert documents[1]["seed"] == documents[0]["seed"] + 1


def test_pictures_pass_through_pipes(server: LiveServer, folder: Path) -> None:
    source = (folder / "photo.png").read_bytes()
    code, out, err = run(
        "edit", "-", "-p", PROMPT, "-o", "-", "--format", "webp", cwd=folder, url=server.url, stdin=source
    )
    assert (code, err) == (0, "")
    assert Image.open(io.BytesIO(out)).format == "WEBP"
    code, out, _ = run("vary", "-", "-o", "-", cwd=folder, url=server.url, stdin=source)
    assert code == 0
    assert Image.open(io.BytesIO(out)).size == (256, 256)
    code, out, _ = run("generate", "-p", PROMPT, "--field", "resolution=1", cwd=folder, url=server.url)
    assert code == ExitCode.REFUSED
    code, out, _ = run("generate", "-p", PROMPT, "--steps", "4", cwd=folder, url=server.url)
    assert code == 0
    assert (folder / "generated.png").is_file()


def test_failures_have_their_own_exit_codes(server: LiveServer, folder: Path) -> None:
    code, _, err = run("edit", "photo.png", "-p", PROMPT, "--n", "99", cwd=folder, url=server.url)
    assert code == ExitCode.REFUSED
    assert err.startswith("ovserve: n is 99")
    assert err.count("\n") == 1
    code, _, err = run("generate", "-p", "x", cwd=folder, url="http://127.0.0.1:9")
    assert code == ExitCode.NO_SERVER
    assert "ovserve serve" in err
    for arguments, word in (
        (["edit", "missing.png", "-p", "x"], "no such file"),
        (["edit", "photo.png"], "-p PROMPT"),
        (["edit", "-p", "x"], "name a picture"),
        (["edit", "photo.png", "-p", "x", "--mask_box", "1,2"], "X,Y,WIDTH,HEIGHT"),
        (["edit", "photo.png", "-p", "x", "--mask_box", "900,2,4,4"], "outside the picture"),
        (["edit", "photo.png", "-p", "x", "--strenght", "1"], "did you mean --strength"),
        (["generate", "-p", "x", "--url", "ftp://x"], "http"),
    ):
        code, _, err = run(*arguments, cwd=folder, url=server.url)
        assert (code, word in err) == (ExitCode.USAGE, True), err
        assert "Traceback" not in err


def in_terminal(arguments: list[str], cwd: Path, env: dict[str, str], interrupt_at: bytes = b"") -> tuple[int, bytes]:
    """Run a command in a pseudo-terminal; press Ctrl-C once its output has `interrupt_at`."""
    pid, terminal = pty.fork()
    if pid == 0:
        # As at a terminal: a shell in a script starts programs in the background with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.chdir(cwd)
        os.execve(sys.executable, [*COMMAND, *arguments], env)
    output, deadline = b"", time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # the child has closed its side
            break
        if not data:
            break
        output += data
        if interrupt_at and re.search(interrupt_at, output):
            os.write(terminal, b"\x03")
            interrupt_at = b""
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output


def test_terminal_shows_progress_and_the_picture(server: LiveServer, folder: Path) -> None:
    env = environment(server.url, TERM="xterm-kitty", COLUMNS="100")
    env.pop("TMUX", None)
    code, output = in_terminal(["edit", "photo.png", "-p", PROMPT, "--steps", "30"], folder, env)
    assert code == 0
    assert re.search(rb"step \d+/\d+ \[#*-*\]", output)
    chunks = re.findall(rb"\x1b_G[^;]*;([A-Za-z0-9+/=]*)\x1b\\", output)
    assert base64.b64decode(b"".join(chunks)) == (folder / "photo-edited.png").read_bytes()


def test_ctrl_c_cancels_the_job_and_leaves_nothing(server: LiveServer, folder: Path) -> None:
    env = environment(server.url, TERM="dumb")
    arguments = ["edit", "photo.png", "-p", PROMPT, "--steps", "100", "--strength", "1", "--n", "10"]
    code, output = in_terminal(arguments, folder, env, rb"step \d+/")
    assert code == ExitCode.CANCELLED
    assert b"Traceback" not in output
    assert [path.name for path in folder.iterdir()] == ["photo.png"]
    deadline = time.monotonic() + LIMIT_S
    while server.fetch("/v1/models")[1]["data"][0]["running"]:
        assert time.monotonic() < deadline
        select.select([], [], [], 0.05)


@pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")
def test_progress_and_ctrl_c_in_tmux(server: LiveServer, folder: Path) -> None:
    tmux = ["tmux", "-S", str(folder / "socket"), "-f", "/dev/null"]
    edit = [*COMMAND, "edit", "photo.png", "-p", PROMPT, "--steps", "100", "--strength", "1", "--n", "10"]

    def shown() -> str:
        return subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True, check=True).stdout

    def await_line(pattern: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not re.search(pattern, shown()):
            assert time.monotonic() < deadline, shown()
            select.select([], [], [], 0.05)

    command = shlex.join(edit) + "; echo code $?; read line"
    new = [*tmux, "new-session", "-d", "-x", "100", "-y", "20", "-c", str(folder), command]
    subprocess.run(new, env=environment(server.url), check=True, timeout=LIMIT_S)
    try:
        await_line(r"picture \d+/10 step \d+/100 \[#*-+\] [\d.]+ s left")
        subprocess.run([*tmux, "send-keys", "C-c"], check=True, timeout=LIMIT_S)
        await_line(rf"Cancelled\.[\s^C]+code {ExitCode.CANCELLED:d}")
        assert "step" not in shown(), "the line of progress is removed"
    finally:
        subprocess.run([*tmux, "kill-server"], check=False, timeout=LIMIT_S)
    deadline = time.monotonic() + LIMIT_S
    while server.fetch("/v1/models")[1]["data"][0]["running"]:
        assert time.monotonic() < deadline
        select.select([], [], [], 0.05)


def processes_with(marker: str) -> list[int]:
    """Return the processes whose environment has this text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_builtin_starts_a_server_for_the_call_and_stops_it(folder: Path) -> None:
    marker = f"mark-{folder}"
    code, out, err = run("generate", "-p", PROMPT, "--builtin", "--seed", "3", cwd=folder, url="", CLI_TEST_MARK=marker)
    assert (code, out.decode()) == (0, "generated.png  seed 3\n"), err
    assert processes_with(marker) == []


def test_ctrl_c_ends_the_server_of_the_call_too(folder: Path) -> None:
    marker = f"mark-{folder}"
    env = environment(TERM="dumb", CLI_TEST_MARK=marker)
    arguments = ["edit", "photo.png", "-p", PROMPT, "--builtin", "--steps", "100", "--strength", "1", "--n", "10"]
    code, output = in_terminal(arguments, folder, env, rb"step \d+/\d+ \[")
    assert code == ExitCode.CANCELLED, output
    assert b"Traceback" not in output
    assert processes_with(marker) == []
    assert [path.name for path in folder.iterdir()] == ["photo.png"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_closed_terminal_ends_the_server_of_the_call_too(folder: Path, number: signal.Signals) -> None:
    marker = f"mark-{folder}"
    command = [*COMMAND, "generate", "-p", PROMPT, "--builtin"]
    started = subprocess.Popen(
        command, cwd=folder, env=environment(CLI_TEST_MARK=marker), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + LIMIT_S
    while len(processes_with(marker)) < 2:  # the command and its server
        assert time.monotonic() < deadline
        assert started.poll() is None
        select.select([], [], [], 0.02)
    started.send_signal(number)
    _, error = started.communicate(timeout=LIMIT_S)
    assert (started.returncode, error) == (ExitCode.CANCELLED, b"")
    assert processes_with(marker) == []


def test_key_comes_from_the_environment(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with LiveServer(spool=tmp_path_factory.mktemp("spool"), environment={"OVSERVE_API_KEY": "sk-cli"}) as keyed:
        code, _, err = run("generate", "-p", PROMPT, cwd=folder, url=keyed.url)
        assert (code, "OVSERVE_API_KEY" in err) == (ExitCode.REFUSED, True)
        code, _, err = run("generate", "-p", PROMPT, cwd=folder, url=keyed.url + "/v1", OVSERVE_API_KEY="sk-cli")
        assert (code, err) == (0, "")
