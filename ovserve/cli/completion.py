"""`ovserve completion`: print a script that completes commands, options and their values in a shell."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Mapping, Sequence

from ovserve.cli.arguments import ArgumentParser, usage_error
from ovserve.cli.commands import COMMANDS, DEFAULT_COMMAND, ExitCode
from ovserve.settings.options import ModelSettings, Settings, options_of

__all__ = ["SHELLS", "choices", "completion_script", "options_by_command", "run"]

_DESCRIPTION = """Print a script that completes commands, options and values in a shell, for example
`source <(ovserve completion bash)` in ~/.bashrc, `source <(ovserve completion zsh)` in ~/.zshrc, or
`ovserve completion fish > ~/.config/fish/completions/ovserve.fish`."""
# A line of `--help` that begins with an option: `  -p TEXT, --prompt TEXT  what ...`
_OPTION_LINE = re.compile(r"^ {2}(-.+?)(?: {2,}|$)", re.MULTILINE)
_OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")

_BASH = """\
_ovserve() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command={default}
    local IFS=$' \\t\\n'
    case ${{COMP_WORDS[1]}} in -*) ;; *) [ "$COMP_CWORD" -gt 1 ] && command=${{COMP_WORDS[1]}} ;; esac
    case $before in
{values}
    esac
    if [ "$COMP_CWORD" = 1 ]; then
        case $word in -*) ;; *) COMPREPLY=($(compgen -W '{commands}' -- "$word")); return ;; esac
    fi
    case $word in
        -*) ;;
        *) COMPREPLY=($(compgen -f -- "$word")); return ;;
    esac
    case $command in
{options}
    esac
}}
complete -o filenames -F _ovserve ovserve
"""
_ZSH = """\
#compdef ovserve
_ovserve() {{
    local command={default}
    [[ $CURRENT -gt 2 && ${{words[2]}} != -* ]] && command=${{words[2]}}
    case ${{words[CURRENT-1]}} in
{values}
    esac
    if [[ $CURRENT -eq 2 && ${{words[2]}} != -* ]]; then
        compadd -- {commands}
        return
    fi
    if [[ ${{words[CURRENT]}} != -* ]]; then
        _files
        return
    fi
    case $command in
{options}
    esac
}}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit; }}
compdef _ovserve ovserve
"""


def options_by_command() -> dict[str, tuple[str, ...]]:
    """Return the options of each command, as its help lists them."""
    return {name: _options_of(name) for name in COMMANDS}


def _options_of(name: str) -> tuple[str, ...]:
    module = importlib.import_module(f"ovserve.cli.{name.replace('-', '_')}")
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        module.run(["--help"])
    lines = _OPTION_LINE.findall(text.getvalue())
    return tuple(dict.fromkeys(option for line in lines for option in _OPTION.findall(line)))


def choices() -> dict[str, tuple[str, ...]]:
    """Return the values of each option of the server that has a fixed list of them."""
    found: dict[str, tuple[str, ...]] = {}
    for table in (Settings, ModelSettings):
        for name, (entry, option) in options_of(table).items():
            values = option.choices or (("true", "false") if isinstance(entry.default, bool) else ())
            if values:
                found |= dict.fromkeys([f"--{each}" for each in (name, *option.aliases)], tuple(values))
    return found


def completion_script(shell: str) -> str:
    """Return the script for a shell of SHELLS."""
    return SHELLS[shell](options_by_command(), choices())


def _bash(options: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[str]]) -> str:
    return _BASH.format(
        default=DEFAULT_COMMAND,
        commands=" ".join(options),
        values="\n".join(
            f"        {option}) COMPREPLY=($(compgen -W '{' '.join(words)}' -- \"$word\")); return ;;"
            for option, words in values.items()
        ),
        options="\n".join(
            f"        {name}) COMPREPLY=($(compgen -W '{' '.join(words)}' -- \"$word\")) ;;"
            for name, words in options.items()
        ),
    )


def _zsh(options: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[str]]) -> str:
    return _ZSH.format(
        default=DEFAULT_COMMAND,
        commands=" ".join(options),
        values="\n".join(
            f"        {option}) compadd -- {' '.join(words)}; return ;;" for option, words in values.items()
        ),
        options="\n".join(f"        {name}) compadd -- {' '.join(words)} ;;" for name, words in options.items()),
    )


def _fish(options: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[str]]) -> str:
    names = " ".join(options)
    lines = [
        f"complete -c ovserve -f -n 'not __fish_seen_subcommand_from {names}' -a '{name}' -d '{_plain(name)}'"
        for name in options
    ]
    for name, words in options.items():
        condition = f"__fish_seen_subcommand_from {name}"
        if name == DEFAULT_COMMAND:
            condition += f"; or not __fish_seen_subcommand_from {names}"
        for word in words:
            kind = "-l" if word.startswith("--") else "-s"
            chosen = f" -x -a '{' '.join(values[word])}'" if word in values else ""
            lines.append(f"complete -c ovserve -n '{condition}' {kind} {word.lstrip('-')}{chosen}")
    return "\n".join(lines) + "\n"


def _plain(name: str) -> str:
    """Return the first sentence of a command's description without quotes."""
    return COMMANDS[name].text.partition(". ")[0].rstrip(".").replace("'", "’")


SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}


def run(arguments: Sequence[str]) -> int:
    """Print the script for the shell that is named; return the exit code."""
    parser = ArgumentParser("completion", _DESCRIPTION)
    parser.usage = f"ovserve completion {'|'.join(SHELLS)}"
    parser.add_argument("shell", nargs="?", default="", metavar="SHELL", help="bash, zsh or fish")
    shell = str(parser.parse(arguments)["shell"])
    if shell not in SHELLS:
        usage_error(f"completion: name a shell: {', '.join(SHELLS)}")
    print(completion_script(shell), end="")
    return ExitCode.OK
