"""LoRA adapters of transformers in the engine `stepwise`: each family's rows share calls and equal those made alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovserve.engines.protocol import Work
from ovserve.engines.stepwise.engine import Call, StepwiseEngine
from ovserve.engines.stepwise.slots import Finished
from ovserve.models.profile import read_profile
from ovserve.settings.loras import LoraSettings
from ovserve.wire.request import ImageRequest
from tests.loras import safetensors
from tests.pictures import drive, pixels_of, settings_of, work_of
from tests.tinymodels import tiny_model

# Modules of the tiny models by the names of common trainers: outputs and inputs.
MODULES: dict[str, dict[str, tuple[int, int]]] = {
    "klein": {
        "diffusion_model.double_blocks.0.img_attn.qkv": (96, 32),
        "diffusion_model.double_blocks.0.txt_mlp.0": (192, 32),
        "diffusion_model.single_blocks.0.linear1": (288, 32),
        "transformer.transformer_blocks.0.attn.to_out.0": (32, 32),  # a file of which GenAI cannot load a pipeline
    },
    "fluxdev": {
        "lora_unet_double_blocks_0_txt_attn_qkv": (96, 32),
        "lora_unet_single_blocks_0_linear1": (224, 32),
        "lora_unet_final_layer_adaLN_modulation_1": (64, 32),
    },
    "sd35": {
        "lora_unet_joint_blocks_0_x_block_attn_qkv": (48, 16),
        "transformer.transformer_blocks.1.ff.net.2": (16, 64),
    },
    "zimage": {
        "diffusion_model.layers.0.attention.qkv": (96, 32),
        "diffusion_model.layers.1.feed_forward.w2": (32, 85),
    },
    "qwen": {"transformer.transformer_blocks.0.attn.add_q_proj": (48, 48)},
}


def write(path: Path, modules: dict[str, tuple[int, int]], seed: int) -> LoraSettings:
    rng, tensors = np.random.default_rng(seed), {}
    for name, (outputs, inputs) in modules.items():
        tensors[f"{name}.lora_A.weight"] = rng.normal(0, 0.5, (3, inputs)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(0, 0.5, (outputs, 3)).astype(np.float32)
    path.write_bytes(safetensors(tensors))
    return LoraSettings(alias=path.stem, path=path)


HEAVY = ("sd35", "zimage", "qwen")


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=pytest.mark.heavy if name in HEAVY else ()) for name in MODULES]
)
def test_rows_with_other_adapters_share_calls_and_equal_those_made_alone(tmp_path: Path, model: str) -> None:
    loras = tuple(write(tmp_path / f"{name}.safetensors", MODULES[model], seed) for seed, name in enumerate("ab"))
    settings = settings_of(tiny_model(model), lora=loras)
    profile, calls = read_profile(settings), list[Finished[Call]]()

    def work(*adapters: tuple[str, float]) -> Work:
        request = ImageRequest(task="generation", prompt="", adapters=adapters)
        options: dict[str, Any] = {"guidance_scale": profile.defaults.guidance_scale, "num_inference_steps": 3}
        return work_of(profile, "text2image", 0, request=request, **options)

    choices: tuple[tuple[tuple[str, float], ...], ...] = ((), (("a", 1.0),), (("b", 1.0),), (("a", 0.5), ("b", -1.0)))
    engine = StepwiseEngine(profile, settings, calls.append)
    engine.load(lambda _phase: None)
    alone = [pixels_of(drive(engine, [work(*chosen)]))[0] for chosen in choices]
    calls.clear()
    together = pixels_of(drive(engine, [work(*chosen) for chosen in choices]))
    engine.close()
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
    assert len({picture.tobytes() for picture in alone}) == len(choices)
    assert any(len(call.subject.pictures) > 1 for call in calls if call.subject.kind == "denoise")
    plain = StepwiseEngine(profile, settings_of(tiny_model(model)))
    plain.load(lambda _phase: None)
    assert np.array_equal(pixels_of(drive(plain, [work()]))[0], alone[0])
    plain.close()
