"""What the library does with LoRA adapters, which engine `genai` avoids (`ovserve.engines.genai_loras`) or refuses.

A test fails when the library is mended. Several adapters with weights do act together (the last test).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as og
import pytest
from numpy.typing import NDArray

from ovserve.engines.lora.tensors import read_tensors
from tests.loras import ORACLE, named_model, oracle_model, safetensors
from tests.tinymodels import tiny_model

PROPERTIES = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
OPTIONS: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "rng_seed": 1, "guidance_scale": 3.0}
Weighted = tuple[og.Adapter, float]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Stable Diffusion model whose modules have names."""
    return oracle_model(tmp_path_factory.mktemp("model"))


def part_of(file: str, is_kept: Callable[[str], bool], directory: Path) -> og.Adapter:
    """Return an adapter with some of the tensors of a file of the fixture `lora`."""
    tensors = read_tensors(ORACLE / file).tensors
    path = directory / file
    path.write_bytes(safetensors({key: np.ascontiguousarray(each) for key, each in tensors.items() if is_kept(key)}))
    return og.Adapter(str(path))


def load(model: Path, *adapters: og.Adapter) -> Any:
    """Return a pipeline with adapters whose weights each call sets."""
    config = og.AdapterConfig(og.AdapterConfig.Mode.MODE_DYNAMIC)
    for adapter in adapters:
        config.add(adapter)
    return og.Text2ImagePipeline(str(model), "CPU", adapters=config, **PROPERTIES)


def picture(pipeline: Any, *weights: Weighted) -> NDArray[np.uint8]:
    config = og.AdapterConfig()
    for adapter, weight in weights:
        config.add(adapter, weight)
    return np.array(pipeline.generate("a red cat", adapters=config, **OPTIONS).data[0])


def test_file_with_a_convolution_cannot_be_used(model: Path) -> None:
    adapter = og.Adapter(str(ORACLE / "a_kohya.safetensors"))
    with pytest.raises(RuntimeError, match="not pointwise Convolutional kernel"):
        picture(load(model, adapter), (adapter, 1.0))


def test_modules_with_underscores_in_kohyas_spelling_are_ignored_in_silence(model: Path, tmp_path: Path) -> None:
    effects = []
    for spelling in ("kohya", "peft"):
        adapter = part_of(f"a_{spelling}.safetensors", lambda key: "time_emb_proj" in key, tmp_path)
        pipeline = load(model, adapter)
        effects.append(not np.array_equal(picture(pipeline, (adapter, 1.0)), picture(pipeline)))
    assert effects == [False, True]


def test_text_encoder_in_pefts_spelling_is_ignored_in_silence(model: Path, tmp_path: Path) -> None:
    adapter = part_of("a_peft.safetensors", lambda key: key.startswith("text_encoder"), tmp_path)
    pipeline = load(model, adapter)
    assert np.array_equal(picture(pipeline, (adapter, 1.0)), picture(pipeline))


def test_spelling_of_diffusers_cannot_be_read() -> None:
    with pytest.raises(RuntimeError, match="Either A, B or both matrices are missing"):
        og.Adapter(str(ORACLE / "a_diffusers.safetensors"))


def test_z_image_ignores_adapters(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        f"transformer.layers.1.feed_forward.w2.lora_{side}.weight": rng.normal(0, 0.5, shape).astype(np.float32)
        for side, shape in (("A", (3, 85)), ("B", (32, 3)))
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(tensors))
    adapter = og.Adapter(str(path))
    pipeline = load(tiny_model("zimage"), adapter)
    assert np.array_equal(picture(pipeline, (adapter, 1.0)), picture(pipeline))


def test_a_change_of_any_weight_but_the_last_is_ignored_in_silence(model: Path, tmp_path: Path) -> None:
    first, second = (part_of(f"{name}_kohya.safetensors", lambda key: "conv" not in key, tmp_path) for name in "ab")
    pipeline = load(model, first, second)
    before = picture(pipeline, (first, 1.0), (second, 0.5))
    assert np.array_equal(picture(pipeline, (first, -1.0), (second, 0.5)), before)
    assert not np.array_equal(picture(pipeline, (first, -1.0), (second, 0.6)), before)


def test_layer_that_reads_an_input_of_the_model_gets_other_memory(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    directory = named_model("lcm", tmp_path / "model")
    zeros = {f"layers.0/.lora_{side}.weight": np.zeros((16, 16), np.float32) for side in "AB"}
    (tmp_path / "a.safetensors").write_bytes(safetensors(zeros))
    adapter = og.Adapter(str(tmp_path / "a.safetensors"))
    plain = og.Text2ImagePipeline(str(directory), "CPU", **PROPERTIES)
    adapted, config = load(directory, adapter), og.AdapterConfig(adapter, 1.0)

    def made(pipeline: Any, guidance_scale: float, **options: Any) -> bytes:
        options = {**OPTIONS, "guidance_scale": guidance_scale, **options}
        return np.array(pipeline.generate("a red cat", **options).data[0]).tobytes()

    # Matrices of zeros change no picture where the layer reads what it reads without them: the guidance scale.
    scales = [3.0, 6.0, 9.0, 4.0] * 3
    assert [made(adapted, scale, adapters=config) for scale in scales] != [made(plain, scale) for scale in scales]


def test_weights_of_several_adapters_act_together(model: Path, tmp_path: Path) -> None:
    adapters = [part_of(f"{name}_kohya.safetensors", lambda key: "conv" not in key, tmp_path) for name in "ab"]
    first, second = adapters
    pipeline = load(model, *adapters)
    choices: list[list[Weighted]] = [[(first, 1.0)], [(second, 1.0)], [(first, 1.0), (second, 1.0)], []]
    assert len({picture(pipeline, *choice).tobytes() for choice in choices}) == len(choices)
