"""Imports only go down the layers, function-level imports included."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import ovserve
from ovserve.models.families import FAMILIES

PACKAGE = Path(ovserve.__file__).parent
# Every module may import these.
FOUNDATIONS = {
    "accounts",
    "errors",
    "deadline",
    "folders",
    "grants",
    "logs",
    "machine",
    "metrics",
    "systemd",
    "settings",
    "stacks",
    "usage",
}

# What each top-level module or package may import from ovserve, besides FOUNDATIONS and itself.
MAY: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "cli": {
        "server",
        "models",
        "hub",
        "client",
        "engines.devices",
        "front.keys",
        "worker.trials",
        "wire.local.processes",
    },
    "client": set(),
    "hub": {"models"},
    "server": {"hub", "front", "api", "dispatch", "fleet", "wire", "models", "worker.main", "watch"},
    "front": {"api", "wire"},
    "api": {"dispatch", "wire", "models"},
    "fleet": {"dispatch", "wire", "models"},
    "dispatch": {"wire", "models"},
    "worker": {"engines", "pixels", "wire", "models"},
    "engines": {"pixels", "wire", "models"},
    "pixels": {"wire", "models"},
    "wire": {"models"},
    "models": set(),
    "web": set(),
    "accounts": set(),
    "grants": {"errors"},
    "errors": set(),
    "folders": {"errors"},
    "deadline": set(),
    "logs": set(),
    "machine": set(),
    "metrics": {"errors"},
    "stacks": {"logs"},
    "systemd": {"errors"},
    "usage": {"errors", "logs"},
    "watch": set(),
    "settings": {"errors"},
}
# What an inner package may import from the package that contains it, besides itself.
INSIDE: dict[str, set[str]] = {
    "api.parameters": {"api.exchange"},
    "api.sdapi": {"api.exchange", "api.images", "api.parameters", "api.replies", "api.windows"},
    "front.http1": set(),
    "front.forms": {"front.http1"},
    "wire.local": {"wire.blobs", "wire.codec", "wire.launcher", "wire.link", "wire.messages"},
    "wire.ray": {
        "wire.blobs",
        "wire.codec",
        "wire.launcher",
        "wire.link",
        "wire.local",
        "wire.messages",
        "wire.request",
    },
    "wire.memory": {"wire.blobs", "wire.codec", "wire.launcher", "wire.link", "wire.messages"},
    "engines.lora": set(),
    "engines.schedulers": set(),
    "engines.families": {"engines.protocol", "engines.schedulers"},
    "engines.stepwise": {
        "engines.protocol",
        "engines.checks",
        "engines.schedulers",
        "engines.families",
        "engines.lora",
    },
}
# The only places that may import these packages.
ONLY: dict[str, tuple[str, ...]] = {
    "numpy": ("worker", "engines", "pixels", "client.sixel"),
    "PIL": ("worker", "engines", "pixels", "client.masks", "client.sixel"),
    "openvino": (
        "engines.genai",
        "engines.genai_loras",
        "engines.lora.graph",
        "engines.stepwise",
        "engines.devices",
        "worker.main",
    ),
    "openvino_genai": ("engines.genai", "engines.genai_loras", "engines.stepwise"),
    "multiprocessing": ("wire", "fleet", "server", "cli"),
    "http": ("front", "hub", "client"),
    "socketserver": ("front",),
    "ray": ("wire.ray.cluster",),
    "opentelemetry": ("api.traces",),
}
# The only places that may contain the name of a model family.
FAMILY_MODULES = ("models.families", "models.classes", "models.variants", "engines.families")


class Modules(Mapping[str, ast.Module]):
    """The syntax tree of each module of ovserve, by name without the leading `ovserve.`.

    Parsed when it is asked for: each process of pytest-xdist collects these tests, but only one runs them.
    """

    def __init__(self) -> None:
        self._paths = {
            ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
            for path in sorted(PACKAGE.rglob("*.py"))
        }
        self._trees: dict[str, ast.Module] = {}

    def __getitem__(self, name: str) -> ast.Module:
        if name not in self._trees:
            self._trees[name] = ast.parse(self._paths[name].read_text("utf-8"))
        return self._trees[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


MODULES = Modules()


@functools.cache
def imports(tree: ast.Module) -> set[str]:
    """Return the full names that a module imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def own(tree: ast.Module) -> set[str]:
    """Return the modules of ovserve that a module imports, without the leading `ovserve.`."""
    found = set()
    for name in imports(tree):
        if name.startswith("ovserve.") and not name.endswith("__version__"):
            parts = name.split(".")[1:]
            while parts and ".".join(parts) not in MODULES:
                parts.pop()
            if parts:
                found.add(".".join(parts))
    return found


def lies_in(name: str, places: Iterable[str]) -> bool:
    """Return whether a module is one of the places or inside one of them."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_only_go_down_the_layers(name: str) -> None:
    top = name.partition(".")[0]
    allowed = {top, *MAY[top], *(FOUNDATIONS if top not in FOUNDATIONS else ())}
    for target in own(MODULES[name]):
        assert lies_in(target, allowed), f"{name} imports {target}"


@pytest.mark.parametrize("folder", INSIDE)
def test_inner_package_imports_only_the_packages_below_it(folder: str) -> None:
    outer = folder.partition(".")[0]
    for name in MODULES:
        if name.startswith(f"{folder}."):
            for target in own(MODULES[name]):
                inside = lies_in(target, {folder, *INSIDE[folder]}) or not lies_in(target, {outer})
                assert inside, f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_restricted_packages_are_imported_only_in_their_places(name: str) -> None:
    for target in imports(MODULES[name]):
        places = ONLY.get(target.partition(".")[0])
        assert places is None or lies_in(name, places), f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_table_and_the_family_modules_name_a_family(name: str) -> None:
    if not lies_in(name, FAMILY_MODULES):
        named = [node for node in ast.walk(MODULES[name]) if isinstance(node, ast.Constant) and node.value in FAMILIES]
        assert not named, f"{name}:{named[0].lineno} names family {named[0].value}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_server_chooses_an_implementation_of_the_wire(name: str) -> None:
    implementations = {"wire.local", "wire.memory", "wire.ray"}
    # The decoding process is a child of its worker, however the worker itself was started, and a trial is one of its
    # command: no choice is made there.
    starts = name.startswith("pixels.decoder") or name == "cli.trials"
    targets = own(MODULES[name]) - ({"wire.local.processes"} if starts else set())
    for target in targets:
        is_allowed = name == "server" or lies_in(name, implementations) or not lies_in(target, implementations)
        assert is_allowed, f"{name} imports {target}"


def test_every_package_is_in_the_table() -> None:
    assert {name.partition(".")[0] for name in MODULES} == MAY.keys()


def test_front_end_loads_neither_openvino_nor_a_decoder() -> None:
    # server uses worker.main as the spawn target; openvino, its threads and device contexts exist only in children.
    code = (
        "import sys, ovserve.cli.serve; print([name for name in sys.modules if name.startswith(('openvino', 'PIL'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_only_the_bridge_imports_the_module_that_imports_ray() -> None:
    assert [name for name in MODULES if "wire.ray.cluster" in own(MODULES[name])] == ["wire.ray.bridge"]
    code = "import sys, ovserve.cli.serve; print([name for name in sys.modules if name.partition('.')[0] == 'ray'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_imports_have_no_cycle() -> None:
    graph = {name: own(tree) for name, tree in MODULES.items()}
    visited: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in visited:
            for target in graph[name]:
                visit(target, (*path, name))
            visited.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_docstring_starts_with_one_sentence(name: str) -> None:
    text = ast.get_docstring(MODULES[name])
    assert text, name
    first = text.split("\n")[0]
    assert first.endswith((".", ":")) or name == "__main__", f"{name}: {first}"


def test_importing_the_package_imports_nothing() -> None:
    assert not [node for node in ast.walk(MODULES["__init__"]) if isinstance(node, ast.Import | ast.ImportFrom)]
