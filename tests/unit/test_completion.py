"""Shell completion: the scripts know every command and option, and the shells offer them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ovserve.cli.commands import COMMANDS, ExitCode
from ovserve.cli.completion import SHELLS, choices, completion_script, options_by_command, run
from ovserve.settings.options import ModelSettings, Settings, options_of

BASH = shutil.which("bash") or ""


def test_options_are_those_of_the_help() -> None:
    found = options_by_command()
    assert found.keys() == COMMANDS.keys()
    for table in (Settings, ModelSettings):
        assert {f"--{name}" for name in options_of(table)} <= set(found["serve"])
    assert {"-p", "--prompt", "--mask", "--output", "--builtin", "--help"} <= set(found["edit"])
    assert not any(word.rstrip("-") == "" for words in found.values() for word in words)


def test_values_are_those_of_the_options() -> None:
    assert choices()["--engine"] == ("auto", "genai", "stepwise")
    assert choices()["--web_pages"] == ("true", "false")


@pytest.mark.parametrize("shell", SHELLS)
def test_script_has_every_command_and_option(shell: str) -> None:
    script = completion_script(shell)
    for name, words in options_by_command().items():
        assert name in script
        assert all(word.lstrip("-") in script for word in words)


def offered(*words: str, cwd: Path) -> list[str]:
    """Return what bash offers for the last of `words` after `ovserve`."""
    listed = " ".join(f"'{word}'" for word in ("ovserve", *words))
    script = completion_script("bash") + f"\nCOMP_WORDS=({listed})\nCOMP_CWORD={len(words)}\n_ovserve\n"
    script += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run([BASH, "-c", script], capture_output=True, text=True, check=True, cwd=cwd)
    return done.stdout.split()


@pytest.mark.skipif(not BASH, reason="no bash on this machine")
def test_bash_offers_commands_options_values_and_files(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    assert offered("ge", cwd=tmp_path) == ["generate"]
    assert set(offered("", cwd=tmp_path)) == set(COMMANDS)
    assert "--builtin" in offered("edit", "a.png", "--bu", cwd=tmp_path)
    assert offered("--engine", "ste", cwd=tmp_path) == ["stepwise"]
    assert "--port" in offered("--po", cwd=tmp_path)  # of the default command
    assert offered("edit", "ph", cwd=tmp_path) == ["photo.png"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_reads_its_script(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} on this machine")
    path = tmp_path / f"ovserve.{shell}"
    path.write_text(completion_script(shell))
    subprocess.run([program, "-n", str(path)], check=True)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish on this machine")
def test_fish_offers_commands_options_and_values(tmp_path: Path) -> None:
    path = tmp_path / "ovserve.fish"
    path.write_text(completion_script("fish"))
    for line, expected in (("gen", "generate"), ("edit --buil", "--builtin"), ("serve --engine ste", "stepwise")):
        command = f"source {path}; complete -C 'ovserve {line}'"
        done = subprocess.run(["fish", "-N", "-c", command], capture_output=True, text=True, check=True)
        assert expected in done.stdout.split(), done


def test_wrong_shell_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["tcsh"]):
        with pytest.raises(SystemExit) as ended:
            run(arguments)
        assert ended.value.code == ExitCode.USAGE
        assert "name a shell: bash, zsh, fish" in capsys.readouterr().err
    assert run(["fish"]) == ExitCode.OK
    assert "complete -c ovserve" in capsys.readouterr().out
