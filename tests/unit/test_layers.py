"""Imports run down the layers only, function-level imports included."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ovserve

PACKAGE = Path(ovserve.__file__).parent
HALL = {"errors", "deadline", "logs", "metrics", "systemd", "config", "profile"}  # every room may use these

# What each place may import of ovserve, beside the hall and its own room.
MAY: dict[str, set[str]] = {
    "__main__": {"cli"},
    "cli": {"server", "options"},
    "options": set(),
    "server": {"front", "api", "dispatch", "device.worker"},
    "front": {"api", "dispatch.link.spool"},
    "api": {"dispatch"},
    "dispatch": set(),
    "device": {"dispatch.link.ipc", "dispatch.link.spool"},
}
# What a folder inside a room may import of that room, beside itself.
INSIDE: dict[str, set[str]] = {
    "api.parameters": {"api.catalog", "api.exchange"},
    "dispatch.link": set(),
    "dispatch.supervision": {"dispatch.link", "dispatch.dispatcher", "dispatch.roster"},
    "front.http1": set(),
    "front.forms": {"front.http1"},
    "device.denoising": set(),
    "device.pixels": {"device.engine"},
    "device.stepwise": {"device.engine", "device.denoising"},
}
HALL_MAY = {"errors": set(), "deadline": set(), "logs": set(), "metrics": {"errors"}, "systemd": {"errors"}, "config": {"errors"}, "profile": {"config", "errors"}}  # fmt: skip


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text("utf-8"))
    return found


MODULES = modules()


def imports(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(tree: ast.Module) -> set[str]:
    """The modules of ovserve that a module imports, as room.module."""
    found = set()
    for name in imports(tree):
        if name.startswith("ovserve.") and not name.endswith("__version__"):
            parts = name.split(".")[1:]
            while parts and ".".join(parts) not in MODULES:
                parts.pop()
            if parts:
                found.add(".".join(parts))
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_down_only(name: str) -> None:
    room = name.partition(".")[0]
    for target in own(MODULES[name]):
        target_room = target.partition(".")[0]
        if room in HALL:
            assert target in HALL_MAY[room], f"{name} imports {target}"
            continue
        if MODULES[target].body[1:] == [] and any(known.startswith(f"{target}.") for known in MAY[room]):
            continue  # `from ovserve.device import worker` also names the package, which holds nothing
        allowed = target_room in HALL or target_room == room or target in MAY[room] or target_room in MAY[room]
        assert allowed, f"{name} imports {target}"


@pytest.mark.parametrize("folder", INSIDE)
def test_a_folder_inside_a_room_imports_what_lies_below_it_only(folder: str) -> None:
    room = folder.partition(".")[0]
    allowed = {folder, *INSIDE[folder]}
    for name in MODULES:
        if name.startswith(f"{folder}."):
            for target in own(MODULES[name]):
                inside = any(target == place or target.startswith(f"{place}.") for place in allowed)
                assert inside or not target.startswith(f"{room}."), f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_workers_see_arrays_decoders_and_openvino(name: str) -> None:
    outside = {target.partition(".")[0] for target in imports(MODULES[name])}
    if not name.startswith("device"):
        assert not outside & {"numpy", "PIL", "openvino", "openvino_genai"}


def test_the_front_end_never_loads_openvino_nor_a_decoder() -> None:
    # server names worker.main as the spawn target: openvino, its threads and contexts exist only in children.
    code = "import sys, ovserve.cli; print([name for name in sys.modules if name.startswith(('openvino', 'PIL'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_no_module_imports_another_in_a_circle() -> None:
    graph = {name: own(tree) for name, tree in MODULES.items()}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in graph[name]:
                walk(target, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_first_line_is_one_sentence(name: str) -> None:
    text = ast.get_docstring(MODULES[name])
    assert text, name
    first = text.split("\n")[0]
    assert first.endswith((".", ":")) or name == "__main__", f"{name}: {first}"


def test_importing_the_package_imports_nothing() -> None:
    assert not [node for node in ast.walk(MODULES["__init__"]) if isinstance(node, ast.Import | ast.ImportFrom)]
