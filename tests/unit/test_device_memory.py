"""Models whose weights do not fit into the memory of their devices are refused with the arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from ovserve.engines.device_memory import check_device_memory, device_use
from ovserve.errors import ModelError
from ovserve.models.weights import component_bytes

MIB = 1 << 20
SIZES = (100 * MIB, 300 * MIB, 50 * MIB)  # text encoders, denoiser, VAE


class FakeCore:
    """Devices of which GPU.0 has 400 MiB and NPU 200 MiB; a CPU reports nothing."""

    def get_property(self, device: str, name: str) -> Any:
        found = {("GPU.0", "GPU_DEVICE_TOTAL_MEM_SIZE"): 400 * MIB, ("NPU", "NPU_DEVICE_TOTAL_MEM_SIZE"): 200 * MIB}
        if (device, name) not in found:
            raise RuntimeError("Unsupported property")
        return found[device, name]


def test_sizes_are_those_of_the_weight_files(tmp_path: Path) -> None:
    for name, size in (
        ("text_encoder", 3),
        ("text_encoder_2", 4),
        ("unet", 20),
        ("vae_decoder", 5),
        ("vae_encoder", 6),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "openvino_model.bin").write_bytes(bytes(size))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "openvino_tokenizer.bin").write_bytes(bytes(1000))
    assert component_bytes(tmp_path) == (7, 20, 11)


def write_graph(directory: Path, values: int, *, in_float16: bool) -> None:
    """Write a graph with this number of weights, which two layers share."""
    directory.mkdir()
    source = ops.parameter([1, values], np.float32)
    weights = ops.constant(np.random.default_rng(1).normal(size=(1, values)).astype(np.float32))
    model = ov.Model([ops.add(ops.multiply(source, weights), weights)], [source])
    ov.save_model(model, directory / "openvino_model.xml", compress_to_fp16=in_float16)


def test_float32_weights_are_held_as_float16_unless_the_device_computes_in_float32(tmp_path: Path) -> None:
    write_graph(tmp_path / "text_encoder", 1000, in_float16=True)
    write_graph(tmp_path / "transformer", 2000, in_float16=False)
    assert (tmp_path / "transformer" / "openvino_model.bin").stat().st_size == 8000
    assert component_bytes(tmp_path) == (2000, 4000, 0)
    assert component_bytes(tmp_path, keeps_float32=True) == (2000, 8000, 0)


def test_released_text_encoders_are_loaded_one_at_a_time(tmp_path: Path) -> None:
    for name, values in (("text_encoder", 1000), ("text_encoder_2", 3000), ("transformer", 500)):
        write_graph(tmp_path / name, values, in_float16=True)
    assert component_bytes(tmp_path) == (8000, 1000, 0)
    assert component_bytes(tmp_path, releases_encoders=True) == (6000, 1000, 0)


@pytest.mark.parametrize("devices", [["CPU"], ["CPU", "GPU.0", "CPU"], ["NPU", "GPU.0", "NPU"], ["AUTO"]])
def test_weights_that_fit_are_accepted(devices: list[str]) -> None:
    check_device_memory("m", devices, SIZES, FakeCore())


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["GPU.0"], r"its weights on GPU.0 take 450 MiB, and GPU.0 has 400 MiB; .* or three devices"),
        (["GPU.0", "GPU.0", "GPU.0"], r"take 450 MiB"),
        (["CPU", "NPU", "CPU"], r"its weights on NPU take 300 MiB, and NPU has 200 MiB; use an int8 or int4 export$"),
    ],
)
def test_weights_that_do_not_fit_are_refused(devices: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_device_memory("m", devices, SIZES, FakeCore())


def test_use_of_each_device_that_reports_its_memory_is_found() -> None:
    assert device_use(["CPU", "GPU", "GPU.0"], SIZES, FakeCore()) == {"GPU.0": [400 * MIB, sum(SIZES[1:])]}
    assert device_use(["CPU"], SIZES, FakeCore()) == {}


def test_file_that_is_gone_counts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_graph(tmp_path / "unet", 1000, in_float16=True)
    found = [tmp_path / name / "openvino_model.bin" for name in ("unet", "vae_decoder")]
    monkeypatch.setattr(Path, "glob", lambda _directory, _pattern: iter(found))
    assert component_bytes(tmp_path) == (0, 2000, 0)
