"""The stored plan of a model: OpenVINO properties and options that `ovserve tune` measured, in the model's directory.

A plan changes the bits of pictures. So it is used only where the option `plan` is `measured`, and only on the kind of
machine it was measured on: the file records the denoiser's graph, the release of OpenVINO and the processor.

    ovserve-plan.json   {"measured_on": {"graph": ..., "openvino": ..., "processor": ...}, "plans": {DEVICE: PLAN}}
    PLAN                {"properties": {NAME: VALUE}, "options": {NAME: NUMBER}}; both empty: the library's own plan

`read_profile` reads it in the front end, so all workers of a model run the same plan until a reload.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import platform
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ovserve.errors import ModelError
from ovserve.settings.options import ModelSettings, options_of

__all__ = ["EXACT", "PLAN_FILE", "Plan", "read_plan", "write_plan"]

PLAN_FILE = "ovserve-plan.json"
EXACT = "exact"  # of the option `plan`
PRECISION, GROUP_SIZE = "INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE"
PRECISIONS = ("f32", "bf16", "f16")
OPTIONS = ("vae_tile_px",)
_MAX_GROUP = (1 << 63) - 1  # the largest that OpenVINO's Python binding takes; the property has 64 bits without a sign
MIN_TILE_PX = 64  # smaller tiles are nearly all overlap
_MAX_FILE_BYTES = 64 * 1024
_SHOWN_CHARS = 100  # of a name or a value in a message

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What differs from the library's own plan.

    Attributes:
        properties: OpenVINO properties: PRECISION, GROUP_SIZE.
        options: model options of OPTIONS.
    """

    properties: Mapping[str, str | int] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        named = [f"{name}={value}" for name, value in (*self.properties.items(), *self.options.items())]
        return " ".join(named) or "default"

    def apply(self, settings: ModelSettings) -> ModelSettings:
        """Return the settings with this plan. A property or an option that the operator has set is kept."""
        own = json.loads(settings.plugin_config) if settings.plugin_config else {}
        properties = {**self.properties, **own}
        defaults = options_of(ModelSettings)
        options: dict[str, Any] = {
            name: value for name, value in self.options.items() if getattr(settings, name) == defaults[name][0].default
        }
        plugin_config = json.dumps(properties) if properties else ""
        return dataclasses.replace(settings, plugin_config=plugin_config, **options)


def write_plan(directory: Path, denoiser: str, device: str, plan: Plan) -> Path:
    """Store the plan for a device beside those of other devices that were measured on the same machine.

    Args:
        directory: the model.
        denoiser: the denoiser's folder in it.
        device: the option `device`.
        plan: the plan.

    Raises:
        OSError: the file cannot be written.
    """
    path, subject = directory / PLAN_FILE, _subject(directory / denoiser)
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(folder, fcntl.LOCK_EX)  # another command may store a plan for another device
        kept: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
            document = json.loads(path.read_bytes()[:_MAX_FILE_BYTES])
            kept = dict(document["plans"]) if document.get("measured_on") == subject else {}
        kept[device] = {"properties": dict(plan.properties), "options": dict(plan.options)}
        fresh = path.with_name(f".{PLAN_FILE}.{secrets.token_hex(8)}.new")
        # A link with this name is not followed.
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            with os.fdopen(file, "w", encoding="ascii") as stream:
                json.dump({"measured_on": subject, "plans": kept}, stream, indent=1)
                stream.write("\n")
            fresh.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
    finally:
        os.close(folder)
    return path


def read_plan(directory: Path, denoiser: str, device: str) -> Plan | None:
    """Return the stored plan for a device; None, with a warning, if it was measured under other conditions.

    Raises:
        ModelError: no plan is stored for this device, or the file is invalid.
    """
    path = directory / PLAN_FILE
    advice = f"measure one with `ovserve tune {directory} --device {device!r} --write`, or set plan to {EXACT!r}"
    try:
        with path.open("rb") as stream:
            document = _mapping(json.loads(stream.read(_MAX_FILE_BYTES)))
        found = _mapping(document["plans"]).get(device)
        plan = None if found is None else _parse(_mapping(found))
        measured_on = _mapping(document["measured_on"])
    except FileNotFoundError:
        plan = None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: not a stored plan ({error}); {advice}") from None
    if plan is None:
        raise ModelError(f"{directory}: plan is 'measured', but none is stored for device {device!r}; {advice}")
    subject = _subject(directory / denoiser)
    changed = [name for name in subject if measured_on.get(name) != subject[name]]
    if changed:
        log.warning(
            "%s: the stored plan is ignored, because it was measured with another %s; %s",
            path,
            " and ".join(changed),
            advice,
        )
        return None
    return plan


def _parse(document: Any) -> Plan:
    """Return a plan from JSON. Raises ValueError for what no plan can have, TypeError and KeyError."""
    properties, options = _mapping(document["properties"]), _mapping(document["options"])
    for name, value in properties.items():
        is_group = name == GROUP_SIZE and type(value) is int and 0 <= value <= _MAX_GROUP
        if not is_group and not (name == PRECISION and value in PRECISIONS):
            raise ValueError(f"{_shown(name)}={_shown(value)} cannot be in a plan")
    for name, value in options.items():
        option = options_of(ModelSettings)[name][1] if name in OPTIONS else None
        if option is None or type(value) is not int or not MIN_TILE_PX <= value <= (option.high or 0):
            raise ValueError(f"{_shown(name)}={_shown(value)} cannot be in a plan")
    return Plan(properties, options)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{_shown(value)} is not an object")
    return value


def _shown(value: Any) -> str:
    return repr(value)[:_SHOWN_CHARS]


def _subject(denoiser: Path) -> dict[str, str]:
    """Return what decides which plan is the fastest, apart from the device."""
    graph = hashlib.blake2b((denoiser / "openvino_model.xml").read_bytes(), digest_size=16).hexdigest()
    try:
        library = version("openvino")
    except PackageNotFoundError:  # installed as files only
        library = ""
    return {"graph": graph, "openvino": library, "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} CPUs"}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
