"""Models with LoRA adapters in their graphs, against what diffusers and peft compute (fixture `lora`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from ovserve.engines.lora.adapters import read_adapter
from ovserve.engines.lora.graph import SCALE_INPUT, adapt_model
from ovserve.errors import ModelError
from tests.loras import ORACLE, kohya_tensors, safetensors
from tests.pictures import directory_of

pytestmark = pytest.mark.engine

CORE = ov.Core()
PROPERTIES = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
TOLERANCE = 2e-5  # of outputs up to 1.2; float32, other order of sums
SPELLINGS = ("peft", "diffusers", "kohya")


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    with np.load(ORACLE / "oracle.npz") as arrays:
        return dict(arrays)


def model_of(component: str) -> Any:
    return CORE.read_model(ORACLE / component / "openvino_model.xml")


def compiled_of(model: Any) -> Any:
    return CORE.compile_model(model, "CPU", PROPERTIES)


def run(compiled: Any, inputs: dict[Any, Any], weights: Any = None) -> Any:
    found = compiled(inputs if weights is None else {**inputs, SCALE_INPUT: np.array(weights, np.float32)})
    return np.array(found[0])


def unet_inputs(oracle: dict[str, Any]) -> dict[Any, Any]:
    return {name: oracle[name] for name in ("sample", "timestep", "encoder_hidden_states")}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_unet_with_adapters_equals_diffusers(oracle: dict[str, Any], spelling: str) -> None:
    adapters = [read_adapter(ORACLE / f"a_{spelling}.safetensors"), read_adapter(ORACLE / "b_kohya.safetensors")]
    model = compiled_of(adapt_model(model_of("unet"), "denoiser", adapters))
    for label, weights in (("none", (0, 0)), ("a", (1, 0)), ("b", (0, 0.5)), ("both", (0.8, -0.5))):
        found = run(model, unet_inputs(oracle), [weights] * 3)
        assert np.abs(found - oracle[f"unet_{label}"]).max() < TOLERANCE, label
        if label != "none":
            assert np.abs(found - oracle["unet_none"]).max() > 1000 * TOLERANCE, label


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_text_encoder_with_an_adapter_equals_diffusers(oracle: dict[str, Any], spelling: str) -> None:
    adapters = [read_adapter(ORACLE / f"a_{spelling}.safetensors")]
    model = compiled_of(adapt_model(model_of("text_encoder"), "text_encoder", adapters))
    for label, weight in (("none", 0), ("a", 1)):
        found = run(model, {0: oracle["input_ids"]}, [[weight]] * 2)
        assert np.abs(found - oracle[f"text_{label}"]).max() < 10 * TOLERANCE


def test_rows_with_other_adapters_equal_those_alone(oracle: dict[str, Any]) -> None:
    adapters = [read_adapter(ORACLE / f"{name}_kohya.safetensors") for name in "ab"]
    model, inputs = compiled_of(adapt_model(model_of("unet"), "denoiser", adapters)), unet_inputs(oracle)
    weights = [[0.8, 0], [0, 0.5], [0, 0]]
    together = run(model, inputs, weights)
    for row in range(3):
        alone = run(model, {name: array[row : row + 1] for name, array in inputs.items()}, weights[row : row + 1])
        assert np.array_equal(together[row : row + 1], alone)
    # The plain graph fuses other operations, so on some processors its last bits differ: pictures without adapters are
    # computed by it, unless the option `lora_denoiser` is `shared`.
    assert np.abs(together[2] - run(compiled_of(model_of("unet")), inputs)[2]).max() < TOLERANCE


def test_a_component_without_adapters_is_not_copied() -> None:
    assert adapt_model(model_of("text_encoder"), "text_encoder", [read_adapter(ORACLE / "b_kohya.safetensors")]) is None


def adapted_builtin(tmp_path: Path, tensors: dict[str, Any]) -> Any:
    path = tmp_path / "style.safetensors"
    path.write_bytes(safetensors(tensors))
    model = CORE.read_model(directory_of("builtin") / "unet" / "openvino_model.xml")
    return adapt_model(model, "denoiser", [read_adapter(path)])


def test_modules_are_found_in_an_export_that_wraps_the_model(tmp_path: Path) -> None:
    assert adapted_builtin(tmp_path, kohya_tensors(1)) is not None  # paths there begin with denoiser.unet


def test_file_with_modules_of_another_model_is_refused_with_their_names(tmp_path: Path) -> None:
    tensors = kohya_tensors(1)
    for role in ("lora_down.weight", "lora_up.weight", "alpha"):
        source = f"lora_unet_down_blocks_0_attentions_0_proj_out.{role}"
        tensors[f"lora_unet_down_blocks_7_attentions_0_proj_out.{role}"] = tensors.pop(source)
    with pytest.raises(
        ModelError, match=r"style\.safetensors: 1 of its 5 modules .*_down_blocks_7_attentions_0_proj_out"
    ):
        adapted_builtin(tmp_path, tensors)


@pytest.mark.parametrize(
    ("down", "up"),
    [((4, 81), (80, 4)), ((4, 80), (81, 4)), ((4, 80, 3, 3), (80, 4))],
)
def test_matrices_of_another_size_are_refused_with_both_sizes(
    tmp_path: Path, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": np.zeros(down), f"{name}.lora_up.weight": np.zeros(up)}
    with pytest.raises(ModelError, match=r"to_q.* has the sizes .*\(80, 80\)"):
        adapted_builtin(tmp_path, tensors)
