"""`ovserve devices`: what devices report, as plain values; and the real CPU."""

from __future__ import annotations

import json
from typing import Any

import openvino as ov
import pytest

from ovserve.cli import devices
from ovserve.cli.commands import ExitCode
from ovserve.engines import devices as engine_devices
from ovserve.engines.devices import choose_device, device_report
from ovserve.errors import ModelError


class FakeCore:
    """A machine with a GPU, as far as its properties matter."""

    available_devices = ("CPU", "GPU.1")
    values: dict[tuple[str, str], Any] = {  # noqa: RUF012 - a constant
        ("CPU", "FULL_DEVICE_NAME"): "A processor",
        ("GPU.1", "GPU_DEVICE_TOTAL_MEM_SIZE"): 16 << 30,
        ("GPU.1", "INFERENCE_PRECISION_HINT"): ov.Type.f16,
        ("GPU.1", "OPTIMIZATION_CAPABILITIES"): ["FP16", "INT8"],
        ("GPU.1", "RANGE_FOR_STREAMS"): (1, 4),
    }

    def get_property(self, device: str, name: str) -> Any:
        if (device, name) not in self.values:
            raise RuntimeError("Unsupported property")
        return self.values[device, name]


def test_report_has_what_each_device_reports() -> None:
    assert device_report(FakeCore()) == {
        "CPU": {"name": "A processor"},
        "GPU.1": {
            "memory_bytes": 16 << 30,
            "precision": "f16",
            "capabilities": ["FP16", "INT8"],
            "streams": [1, 4],
        },
    }


def test_command_prints_lines_or_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    report = device_report(FakeCore())
    monkeypatch.setattr(engine_devices, "device_report", lambda: report)
    assert devices.run([]) == ExitCode.OK
    assert "  memory: 16384 MiB\n" in capsys.readouterr().out
    assert devices.run(["--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == report


def test_processor_of_this_machine_is_listed() -> None:
    report = device_report()
    assert report["CPU"]["name"]
    assert "FP32" in report["CPU"]["capabilities"]


@pytest.mark.parametrize(
    ("given", "available", "chosen"),
    [
        ("auto", ["CPU"], "CPU"),
        ("auto", ["CPU", "GPU.1", "GPU.0", "NPU"], "GPU.0"),
        ("auto", ["CPU", "NPU"], "CPU"),
        ("auto CPU auto", ["CPU", "GPU"], "GPU CPU GPU"),
        ("GPU", ["CPU", "GPU.0", "GPU.1"], "GPU"),
        ("GPU.1", ["CPU", "GPU.0", "GPU.1"], "GPU.1"),
        ("GPU.0", ["CPU", "GPU"], "GPU.0"),
        ("AUTO", ["CPU"], "AUTO"),
        ("HETERO:GPU,CPU", ["CPU"], "HETERO:GPU,CPU"),
        ("NPU", ["CPU", "NPU"], "NPU"),
    ],
)
def test_auto_is_the_first_gpu_or_the_cpu(given: str, available: list[str], chosen: str) -> None:
    assert choose_device(given, available) == chosen


@pytest.mark.parametrize("given", ["GPU", "GPU.1", "NPU", "CPU GPU CPU"])
def test_device_that_does_not_exist_is_named_with_those_that_do(given: str) -> None:
    with pytest.raises(ModelError, match=r"does not exist; OpenVINO sees CPU$"):
        choose_device(given, ["CPU"])
