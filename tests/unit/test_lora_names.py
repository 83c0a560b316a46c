"""The names in LoRA files: the spellings of kohya, diffusers and peft, and files that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.engines.lora.adapters import Adapter, read_adapter
from ovserve.engines.lora.modules import targets
from ovserve.engines.lora.names import parse_key
from ovserve.errors import ModelError
from tests.loras import safetensors

UNET = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "text_model_encoder_layers_0_self_attn_q_proj"
DOTTED_TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("key", "component", "module", "role"),
    [
        (f"lora_unet_{UNET}.lora_down.weight", "denoiser", UNET, "down"),
        (f"lora_unet_{UNET}.alpha", "denoiser", UNET, "alpha"),
        (f"lora_te_{TEXT}.lora_up.weight", "text_encoder", TEXT, "up"),
        (f"lora_te1_{TEXT}.lora_up.weight", "text_encoder", TEXT, "up"),
        (f"lora_te2_{TEXT}.lora_up.weight", "text_encoder_2", TEXT, "up"),
        (f"lora_te3_{TEXT}.lora_up.weight", "text_encoder_3", TEXT, "up"),
        (f"unet.{DOTTED}.lora_A.weight", "denoiser", UNET, "down"),
        (f"unet.{DOTTED}.lora.down.weight", "denoiser", UNET, "down"),
        (f"{DOTTED}.lora_B.default.weight", "denoiser", UNET, "up"),
        (f"base_model.model.{DOTTED}.lora_B.weight", "denoiser", UNET, "up"),
        (f"base_model.model.unet.{DOTTED}.lora_B.weight", "denoiser", UNET, "up"),
        (f"diffusion_model.{DOTTED}.lora_B.weight", "denoiser", UNET, "up"),
        ("transformer.single.0.attn.to_q.lora_A.weight", "denoiser", "single_0_attn_to_q", "down"),
        ("transformer_blocks.0.attn.to_q.lora_A.weight", "denoiser", "transformer_blocks_0_attn_to_q", "down"),
        (f"text_encoder.{DOTTED_TEXT}.lora_linear_layer.up.weight", "text_encoder", TEXT, "up"),
        (f"text_encoder_2.{DOTTED_TEXT}.lora_A.weight", "text_encoder_2", TEXT, "down"),
        (f"unet.{DOTTED[:-5]}.processor.to_q_lora.down.weight", "denoiser", UNET, "down"),
        (f"{DOTTED[:-5]}.processor.to_out_lora.up.weight", "denoiser", UNET[:-4] + "to_out_0", "up"),
    ],
)  # fmt: skip
def test_key_says_component_module_and_matrix(key: str, component: str, module: str, role: str) -> None:
    parts = parse_key(key)
    assert parts is not None
    assert (parts.component, parts.module, parts.role) == (component, module, role)


@given(st.text(max_size=80))
def test_any_key_is_parsed_or_refused(key: str) -> None:
    parts = parse_key(key)
    assert parts is None or parts.role in ("down", "up", "alpha")


@pytest.mark.parametrize(
    ("original", "name"),
    [
        ("input_blocks_1_1_transformer_blocks_0_attn1_to_q", UNET),
        ("input_blocks_4_1_proj_in", "down_blocks_1_attentions_0_proj_in"),
        ("input_blocks_8_1_transformer_blocks_9_ff_net_2", "down_blocks_2_attentions_1_transformer_blocks_9_ff_net_2"),
        ("input_blocks_4_0_skip_connection", "down_blocks_1_resnets_0_conv_shortcut"),
        ("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv"),
        ("input_blocks_0_0", "conv_in"),
        ("middle_block_0_in_layers_2", "mid_block_resnets_0_conv1"),
        ("middle_block_1_transformer_blocks_3_attn2_to_v", "mid_block_attentions_0_transformer_blocks_3_attn2_to_v"),
        ("middle_block_2_emb_layers_1", "mid_block_resnets_1_time_emb_proj"),
        ("output_blocks_0_1_proj_out", "up_blocks_0_attentions_0_proj_out"),
        ("output_blocks_5_0_out_layers_3", "up_blocks_1_resnets_2_conv2"),
        ("output_blocks_2_2_conv", "up_blocks_0_upsamplers_0_conv"),
        ("output_blocks_2_1_conv", "up_blocks_0_upsamplers_0_conv"),
        ("time_embed_0", "time_embedding_linear_1"),
        ("label_emb_0_2", "add_embedding_linear_2"),
        ("out_2", "conv_out"),
        ("text_model_encoder_layers_0_mlp_fc1", "encoder_layers_0_mlp_fc1"),
        ("encoder_layers_0_mlp_fc1", "text_model_encoder_layers_0_mlp_fc1"),
    ],
)  # fmt: skip
def test_names_of_the_original_implementation_are_translated(original: str, name: str) -> None:
    assert getattr(targets(original, {name}), "modules", ()) == (name,)
    assert getattr(targets(original, {name, original}), "modules", ()) == (original,)
    assert targets(original, {"another"}) is None


CONVERTED = json.loads((Path(__file__).parents[1] / "data" / "lora_names.json").read_text("utf-8"))


@pytest.mark.parametrize("module", CONVERTED)
def test_names_of_the_original_flux_are_translated_as_diffusers_does(module: str) -> None:
    known = {name for entries in CONVERTED.values() for name, _, _ in entries}
    found = targets(module, known)
    assert found is not None
    assert list(found.modules) == [name for name, _, _ in CONVERTED[module]]


@given(
    st.from_regex(r"(input|output)_blocks_\d{1,2}_\d_[a-z_0-9]{0,12}|middle_block_\d_[a-z_0-9]{0,12}", fullmatch=True)
)
def test_any_name_has_a_translation_or_none(name: str) -> None:
    assert targets(name, ()) is None


def write(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Adapter:
    path.write_bytes(safetensors({key: np.asarray(value, np.float32) for key, value in tensors.items()}, metadata))
    return read_adapter(path)


PAIR = {f"unet.{DOTTED}.lora_A.weight": np.ones((4, 8)), f"unet.{DOTTED}.lora_B.weight": np.ones((6, 4))}


def scale_of(adapter: Adapter) -> float:
    return adapter.pairs["denoiser"][UNET].scale


def test_scale_is_alpha_by_rank_from_the_file_or_its_configuration(tmp_path: Path) -> None:
    assert scale_of(write(tmp_path / "a.safetensors", PAIR)) == 1
    assert scale_of(write(tmp_path / "b.safetensors", {**PAIR, f"unet.{DOTTED}.alpha": 2.0})) == 0.5

    def with_metadata(**values: Any) -> float:
        text = json.dumps({f"unet.{key}": value for key, value in values.items()})
        return scale_of(write(tmp_path / "c.safetensors", PAIR, {"lora_adapter_metadata": text}))

    assert with_metadata(lora_alpha=8, r=4) == 2
    assert with_metadata(lora_alpha=8, use_rslora=True) == 8 / math.sqrt(4)
    assert with_metadata(lora_alpha=8, alpha_pattern={"attn1.to_q": 12, "attn2.to_q": 1}) == 3
    with pytest.raises(ModelError, match="DoRA"):
        with_metadata(use_dora=True)
    for wrong in ({"lora_alpha": "8"}, {"alpha_pattern": [1]}, {"alpha_pattern": {"a": True}}):
        with pytest.raises(ModelError, match="lora_adapter_metadata"):
            with_metadata(**wrong)
    with pytest.raises(ModelError, match="is not JSON"):
        write(tmp_path / "d.safetensors", PAIR, {"lora_adapter_metadata": "["})


def test_peft_configuration_beside_a_file_with_pefts_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": 4}))
    assert scale_of(write(tmp_path / "adapter_model.safetensors", PAIR)) == 4
    assert scale_of(write(tmp_path / "another.safetensors", PAIR)) == 1
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelError, match="is not a JSON object"):
        read_adapter(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "contains no LoRA"),
        ({"lora_unet_x.hada_w1_a": np.ones((2, 2))}, "1 tensors are of a kind that is not supported.*hada_w1_a"),
        ({**PAIR, f"unet.{DOTTED}.dora_scale": np.ones(2)}, "dora_scale"),
        ({"lora_unet_x.lora_mid.weight": np.ones((2, 2))}, "lora_mid"),
        ({"lora_unet_x.lora_down.weight": np.ones((2, 2))}, "has no matrix 'up'"),
        ({"lora_unet_x.alpha": 1.0}, "has no matrix 'down'"),
        ({"x.lora_A.weight": np.ones((2, 4)), "x.lora_B.weight": np.ones((4, 3))}, "are no pair"),
        ({"x.lora_A.weight": np.ones(2), "x.lora_B.weight": np.ones((4, 2))}, "are no pair"),
        ({"x.lora_A.weight": np.ones((0, 4)), "x.lora_B.weight": np.ones((4, 0))}, "are no pair"),
        ({**PAIR, f"unet.{DOTTED}.alpha": np.ones(2)}, "has 2 values; expected 1"),
        ({**PAIR, f"lora_unet_{UNET}.lora_down.weight": np.ones((4, 8))}, "two names of the same matrix"),
    ],
)
def test_file_that_is_no_lora_is_refused_with_the_names(tmp_path: Path, tensors: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        write(tmp_path / "a.safetensors", tensors)


def test_message_names_only_the_first_of_many_tensors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"and 12 more$"):
        write(tmp_path / "a.safetensors", {f"m{number:02}.lokr_w1": np.ones(1) for number in range(20)})
