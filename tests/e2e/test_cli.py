"""The command line: start-up errors, exit codes, signals."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import openai
import pytest

import ovserve
from ovserve.cli.commands import ExitCode
from ovserve.models.profile import builtin_directory
from tests.live import BUILTIN_NAME, BUILTIN_PATH, LiveServer, is_alive

START_LIMIT_S = 60


def run(
    *arguments: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ovserve", *arguments],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=START_LIMIT_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model-path", "/"], "model_index.json"),
        (["--port", "99999"], "--port=99999"),
        (["--target_device", "CPU GPU"], "device"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--model_path", BUILTIN_PATH, "--max_num_inference_steps", "3"], "num_inference_steps"),
        (
            ["--model_path", "builtin:other"],
            "not one of the built-in models: builtin:shapes, builtin:things",
        ),
    ],
)
def test_wrong_option_value_is_one_line_and_exit_code_two(arguments: list[str], words: str) -> None:
    done = run("--port", "0", *arguments) if "--port" not in arguments else run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_unknown_device_is_a_start_error_that_names_it(tmp_path: Path) -> None:
    options = ("--target_device", "TPU", "--spool_dir", str(tmp_path), "--log_level", "error")
    done = run("--port", "0", "--model_path", BUILTIN_PATH, *options)
    assert done.returncode == ExitCode.MODELS_FAILED
    assert "TPU" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_port_in_use_is_a_start_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("--port", str(taken.getsockname()[1]), "--model_path", BUILTIN_PATH)
    assert done.returncode == ExitCode.TRANSIENT
    assert "in use" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model_path", "nowhere"], "no such directory"),
        (["--model_path", "{folder}"], "is its file system mounted?"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--api_key_file", "nowhere"], "No such file"),
    ],
)
def test_fault_that_may_pass_has_its_own_exit_code(tmp_path: Path, arguments: list[str], words: str) -> None:
    options = [each.format(folder=tmp_path) for each in arguments]
    done = run("--port", "0", *options, *([] if "--model_path" in options else ["--model_path", BUILTIN_PATH]))
    assert (done.returncode, done.stdout) == (ExitCode.TRANSIENT, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_lack_of_descriptors_at_the_start_is_a_fault_that_may_pass() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (6, 6))

    done = subprocess.run(
        [sys.executable, "-m", "ovserve", "--port", "0", "--model_path", BUILTIN_PATH],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=START_LIMIT_S,
        check=False,
    )
    assert done.returncode == ExitCode.TRANSIENT, done.stderr
    assert "Too many open files" in done.stderr.splitlines()[-1]


def test_check_prints_what_would_be_served_and_starts_nothing(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    model = f"[[model]]\nname = 'shapes'\npath = '{BUILTIN_PATH}'\nreplicas = 2\n"
    config.write_text(f"port = 4711\ndefault_model = 'shapes'\n{model}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("check", "--config", str(config), "--port", str(taken.getsockname()[1]))
        port = taken.getsockname()[1]
    assert (done.returncode, done.stderr) == (ExitCode.OK, "")
    assert done.stdout.splitlines()[0] == f"configuration is valid: host 127.0.0.1, port {port}, 0 API keys"
    assert "model shapes (default): stable-diffusion from " in done.stdout
    assert "replicas 2" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model_path", "nowhere"], "no such directory"),
        (["--port", "99999"], "--port=99999"),
        (["--prot", "1"], "did you mean --port?"),
        (["--api_key_file", "nowhere"], "No such file"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_check_reports_an_error_as_a_start_does(arguments: list[str], words: str) -> None:
    done = run("check", *arguments)
    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_version_and_help_list_flags_commands_and_exit_codes() -> None:
    assert run("--version").stdout.startswith("ovserve ")
    text = run("--help").stdout
    for flag in ("--model_path", "--rest_port", "--target_device", "--config"):
        assert flag in text
    for row in ("serve", *(code.text for code in ExitCode)):
        assert row in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prot", "80"], "unknown option --prot; did you mean --port?"),
        (["serve", "--modelpath=x"], "unknown option --modelpath; did you mean --model_path?"),
        (["--model-pth", "x"], "unknown option --model_pth; did you mean --model_path?"),
        (["--zzzzzz"], "unknown option --zzzzzz"),
        (["serv"], "unknown command 'serv'; did you mean serve?"),
        (["--port"], "--port: expected a value"),
        (["--port", "0", "stray"], "unexpected argument 'stray'"),
    ],
)
def test_wrong_command_line_is_one_line_with_the_nearest_name(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (ExitCode.USAGE, "", f"ovserve: {message}\n")


def test_folder_named_ovserve_in_the_current_directory_is_no_package(tmp_path: Path) -> None:
    """A clone: a folder without `__init__.py`, which Python takes for a namespace package."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = [sys.executable, "-P", "-c", "import ovserve; print(ovserve.__file__)"]
    found = subprocess.run(where, env=environment, capture_output=True, text=True, check=False, timeout=60)
    if found.stdout.strip() != ovserve.__file__:
        pytest.skip("this environment has ovserve installed from somewhere else, or not at all")
    (tmp_path / "ovserve" / "ovserve").mkdir(parents=True)
    (tmp_path / "ovserve" / "pyproject.toml").touch()
    done = run("--version", environment={"PYTHONPATH": ""}, cwd=tmp_path)
    assert (done.stdout, done.stderr) == (f"ovserve {ovserve.__version__}\n", "")


SHADOWED = (
    "PIL", "argparse", "dataclasses", "json", "logging", "multiprocessing", "multipart", "numpy", "openvino",
    "openvino_genai", "pickle", "prometheus_client", "socket", "subprocess", "tempfile",
)  # fmt: skip


CONSOLE_SCRIPT = """
import sys
from ovserve.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""  # what an installer writes for [project.scripts]


@pytest.mark.parametrize("how", ["python -m", "python -P -m", "console script"])
def test_no_module_is_imported_from_the_current_directory(tmp_path: Path, how: str) -> None:
    programs = {
        "python -m": [sys.executable, "-m", "ovserve"],
        "python -P -m": [sys.executable, "-P", "-m", "ovserve"],
        "console script": [sys.executable, str(tmp_path / "bin" / "ovserve")],
    }
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ovserve").write_text(CONSOLE_SCRIPT)
    for name in SHADOWED:
        (cwd / f"{name}.py").write_text("import os; open('imported', 'a').write(__name__); os._exit(7)\n")
    with LiveServer(program=programs[how], cwd=cwd, spool=tmp_path / "spool") as live:
        assert live.fetch("/v2/health/ready")[0] == 200
        assert live.workers()
    assert not (cwd / "imported").exists()


FAKE_COMMAND = """
import multiprocessing, ovserve

def show():
    print(ovserve.__file__, flush=True)

def main():
    show()
    process = multiprocessing.get_context("spawn").Process(target=show)
    process.start()
    process.join()
    return process.exitcode
"""


def test_ovserve_in_the_current_directory_is_used_by_workers_too(tmp_path: Path) -> None:
    package = tmp_path / "ovserve"
    (package / "cli").mkdir(parents=True)
    for path in (package / "__init__.py", package / "cli" / "__init__.py"):
        path.touch()
    shutil.copy(Path(ovserve.__file__).with_name("__main__.py"), package)
    (package / "cli" / "main.py").write_text(FAKE_COMMAND)
    done = run(cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()) == (0, [str(package / "__init__.py")] * 2), done.stderr


def test_process_spawned_by_the_console_script_imports_no_front_end() -> None:
    front_end = "('ovserve.front', 'ovserve.server')"
    code = f"import sys, ovserve.cli.main; print([m for m in sys.modules if m.startswith({front_end})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_server_without_a_model_option_serves_the_builtin_model(tmp_path: Path) -> None:
    with LiveServer(spool=tmp_path, model=None) as live:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == [BUILTIN_NAME]
            assert client.images.generate(prompt="a red star").data
        assert live.fetch("/v2/health/ready")[0] == 200


def test_model_directory_is_served_under_the_given_name(tmp_path: Path) -> None:
    with LiveServer("--model_name", "me/shapes", "--model_path", str(builtin_directory()), spool=tmp_path) as live:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            assert client.models.retrieve("me/shapes").id == "me/shapes"
            assert client.images.generate(prompt="a red star", model="me/shapes").data
        assert live.fetch("/v2/health/ready")[0] == 200


def test_signals_of_log_rotation_end_no_process(tmp_path: Path) -> None:
    with LiveServer(spool=tmp_path) as live:
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            for pid in live.workers():
                os.kill(pid, number)
            live.signal(number)
        while not any("signal ignored" in line for line in list(live.log)):
            assert live.process.poll() is None
        assert live.fetch("/v2/health/ready")[0] == 200
        assert not [line for line in live.log if "worker died" in line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_signal_drains_jobs_in_flight_and_leaves_no_process_or_file(tmp_path: Path, data: Path, number: int) -> None:
    live = LiveServer(spool=tmp_path)
    workers = live.workers()
    assert workers
    completed = threading.Event()
    started = threading.Event()

    def generate() -> None:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            stream = client.images.generate(
                model=BUILTIN_NAME, prompt="a red star", stream=True, extra_body={"num_inference_steps": 100}
            )
            for event in stream:
                if event.type == "image_generation.completed":
                    completed.set()

    def watch() -> None:  # a job that is queued or dispatched is in flight
        while not started.is_set():
            started.set() if live.fetch(f"/v3/models/{BUILTIN_NAME}")[1]["running"] else None

    threads = [threading.Thread(target=generate), threading.Thread(target=watch)]
    for thread in threads:
        thread.start()
    assert started.wait(30)
    live.signal(number)
    assert live.wait() == 0
    for thread in threads:
        thread.join()
    assert completed.is_set()
    assert not [pid for pid in workers if is_alive(pid)]
    assert not list(tmp_path.iterdir())


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    live = LiveServer("--grace_period_s", "600", spool=tmp_path)
    workers = live.workers()
    with socket.create_connection(("127.0.0.1", live.port)) as slow:
        # A request whose body does not arrive stays in flight until its timeout.
        slow.sendall(
            b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 5\r\n\r\n"
        )
        live.fetch("/v2/health/live")
        live.signal(signal.SIGTERM)
        while not any("draining" in line for line in list(live.log)):
            assert live.process.poll() is None
        live.signal(signal.SIGTERM)
        assert live.wait() == 1
    assert not [pid for pid in workers if is_alive(pid)]
    assert not list(tmp_path.iterdir())


def test_variables_of_a_kubernetes_service_are_ignored_and_logged(tmp_path: Path) -> None:
    variables = {"OVSERVE_PORT": "tcp://10.0.0.11:8000", "OVSERVE_SERVICE_HOST": "10.0.0.11"}
    options = ("--target_device", "TPU", "--spool_dir", str(tmp_path))
    done = run("--port", "0", "--model_path", BUILTIN_PATH, *options, environment=variables)
    assert "TPU" in done.stderr.splitlines()[-1]
    [entry] = [line for line in done.stderr.splitlines() if "Kubernetes" in line]
    assert 'ignored="OVSERVE_PORT, OVSERVE_SERVICE_HOST"' in entry


def test_missing_directory_of_one_model_is_a_start_error(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f"port = 0\n[[model]]\nname = 'right'\npath = '{BUILTIN_PATH}'\n[[model]]\nname = 'wrong'\npath = 'nowhere'\n"
    )
    done = run("--config", str(config))
    assert done.returncode == ExitCode.TRANSIENT
    assert "nowhere: no such directory" in done.stderr


# A server whose worker process blocks SIGTERM. Argument: the exit code; 2 means an error at start.
STUCK_WORKER = """
import multiprocessing, signal, sys, time
from multiprocessing import resource_tracker
from ovserve import errors
from ovserve.cli import serve

class Server:
    def __init__(self, *_): pass
    def run(self):
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
        process.start()
        print(process.pid)
        if sys.argv[1] == "2":
            raise errors.ModelError("no model")
        return int(sys.argv[1])

if __name__ == "__main__":
    serve.Server = Server
    sys.exit(serve.run([]))
"""


@pytest.mark.parametrize("code", [0, 2])
def test_server_exits_although_a_worker_ignores_signals(tmp_path: Path, code: int) -> None:
    script, output, errors = tmp_path / "stuck_worker.py", tmp_path / "output", tmp_path / "errors"
    script.write_text(STUCK_WORKER)
    with (
        output.open("w") as out,
        errors.open("w") as err,
        subprocess.Popen([sys.executable, str(script), str(code)], stdout=out, stderr=err) as server,
    ):
        try:
            assert server.wait(START_LIMIT_S / 2) == code
        finally:
            server.kill()
            os.kill(int(output.read_text()), signal.SIGKILL)
    assert "exiting while workers that survived SIGKILL still run" in errors.read_text()
