"""Names of modules in other implementations, translated to those of diffusers, which the exports have.

Some trainers name modules as the original implementation of a model does. Where that one has a layer that diffusers
splits, such as `qkv`, the rows of its `up` are split too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

__all__ = ["Target", "targets"]


@dataclass(frozen=True, slots=True)
class Target:
    """Modules of the model that a module of the file changes.

    Attributes:
        modules: their names. More than one: the rows of `up` belong to them in this order.
        is_swapped: the halves of the rows of `up` are in the other order.
    """

    modules: tuple[str, ...]
    is_swapped: bool = False


def targets(module: str, known: Collection[str]) -> Target | None:
    """Return the modules of a model that a module of a file changes; None if the model has none of this name.

    Args:
        module: the name in the file, with `_` for dots.
        known: the names of the model's modules, with `_` for dots.
    """
    for candidate in _candidates(module):
        if all(name in known for name in candidate.modules):
            return candidate
    return None


def _candidates(module: str) -> Iterator[Target]:
    """Yield translations of a name, the likeliest first."""
    yield Target((module,))
    plain = module.removeprefix("text_model_")  # some versions of transformers have a model around it, others none
    yield Target((plain if plain != module else f"text_model_{module}",))
    original = _from_original_unet(module)
    if original:
        yield Target((original,))
    yield from _from_original_transformer(module)


# --- UNets: CompVis/stable-diffusion, ldm/modules/diffusionmodules/openaimodel.py ---

_BLOCK = re.compile(r"^(?P<kind>input_blocks|output_blocks)_(?P<block>\d{1,2})_(?P<part>\d)(?:_(?P<rest>.+))?$")
_MIDDLE = re.compile(r"^middle_block_(?P<part>[012])_(?P<rest>.+)$")
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTER = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
_BLOCKS_IN_LEVEL = 3  # two layers and a resampler going down; three layers going up


def _from_original_unet(module: str) -> str:
    """Return the name in diffusers; empty for another name."""
    if module in _OUTER:
        return _OUTER[module]
    match = _MIDDLE.match(module)
    if match:
        place, rest = int(match["part"]), match["rest"]
        if place == 1:
            return f"mid_block_attentions_0_{rest}"
        return f"mid_block_resnets_{place // 2}_{_RESNET[rest]}" if rest in _RESNET else ""
    match = _BLOCK.match(module)
    if not match:
        return ""
    block, part, rest = int(match["block"]), int(match["part"]), match["rest"] or ""
    if match["kind"] == "input_blocks":
        level, layer = divmod(block - 1, _BLOCKS_IN_LEVEL)
        side = f"down_blocks_{level}"
        if rest == "op":
            return f"{side}_downsamplers_0_conv"
    else:
        level, layer = divmod(block, _BLOCKS_IN_LEVEL)
        side = f"up_blocks_{level}"
        if rest == "conv":
            return f"{side}_upsamplers_0_conv"
    if part == 0:
        return f"{side}_resnets_{layer}_{_RESNET[rest]}" if rest in _RESNET else ""
    return f"{side}_attentions_{layer}_{rest}" if part == 1 and rest else ""


# --- transformers: FLUX.1 and FLUX.2 (black-forest-labs/flux), SD3 (Stability-AI/sd3.5), Z-Image ---

_TRANSFORMER_BLOCK = re.compile(
    r"^(?P<kind>double_blocks|single_blocks|joint_blocks|layers|noise_refiner|context_refiner)"
    r"_(?P<number>\d{1,3})_(?P<rest>.+)$"
)
_OF_IMAGE, _OF_TEXT = ("attn_to_q", "attn_to_k", "attn_to_v"), ("attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj")
# The rest of a name to the names in diffusers; several alternatives where models differ.
_DOUBLE: dict[str, tuple[tuple[str, ...], ...]] = {
    "img_attn_qkv": (_OF_IMAGE,),
    "txt_attn_qkv": (_OF_TEXT,),
    "img_attn_proj": (("attn_to_out_0",),),
    "txt_attn_proj": (("attn_to_add_out",),),
    "img_mlp_0": (("ff_net_0_proj",), ("ff_linear_in",)),
    "img_mlp_2": (("ff_net_2",), ("ff_linear_out",)),
    "txt_mlp_0": (("ff_context_net_0_proj",), ("ff_context_linear_in",)),
    "txt_mlp_2": (("ff_context_net_2",), ("ff_context_linear_out",)),
    "img_mod_lin": (("norm1_linear",),),
    "txt_mod_lin": (("norm1_context_linear",),),
}
_SINGLE: dict[str, tuple[tuple[str, ...], ...]] = {
    "linear1": ((*_OF_IMAGE, "proj_mlp"), ("attn_to_qkv_mlp_proj",)),
    "linear2": (("proj_out",), ("attn_to_out",)),
    "modulation_lin": (("norm_linear",),),
}
_JOINT: dict[str, tuple[tuple[str, ...], ...]] = {
    "x_block_attn_qkv": (_OF_IMAGE,),
    "x_block_attn2_qkv": (("attn2_to_q", "attn2_to_k", "attn2_to_v"),),
    "context_block_attn_qkv": (_OF_TEXT,),
    "x_block_attn_proj": (("attn_to_out_0",),),
    "x_block_attn2_proj": (("attn2_to_out_0",),),
    "context_block_attn_proj": (("attn_to_add_out",),),
    "x_block_mlp_fc1": (("ff_net_0_proj",),),
    "x_block_mlp_fc2": (("ff_net_2",),),
    "context_block_mlp_fc1": (("ff_context_net_0_proj",),),
    "context_block_mlp_fc2": (("ff_context_net_2",),),
    "x_block_adaLN_modulation_1": (("norm1_linear",),),
    "context_block_adaLN_modulation_1": (("norm1_context_linear",),),
}
_ATTENTION: dict[str, tuple[tuple[str, ...], ...]] = {
    "attention_qkv": (("attention_to_q", "attention_to_k", "attention_to_v"),),
    "attention_out": (("attention_to_out_0",),),
}
_KINDS = {
    "double_blocks": ("transformer_blocks", _DOUBLE),
    "single_blocks": ("single_transformer_blocks", _SINGLE),
    "joint_blocks": ("transformer_blocks", _JOINT),
    "layers": ("layers", _ATTENTION),
    "noise_refiner": ("noise_refiner", _ATTENTION),
    "context_refiner": ("context_refiner", _ATTENTION),
}
_AROUND = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in_in_layer": (
        "time_text_embed_timestep_embedder_linear_1",
        "time_guidance_embed_timestep_embedder_linear_1",
    ),
    "time_in_out_layer": (
        "time_text_embed_timestep_embedder_linear_2",
        "time_guidance_embed_timestep_embedder_linear_2",
    ),
    "vector_in_in_layer": ("time_text_embed_text_embedder_linear_1",),
    "vector_in_out_layer": ("time_text_embed_text_embedder_linear_2",),
    "guidance_in_in_layer": (
        "time_text_embed_guidance_embedder_linear_1",
        "time_guidance_embed_guidance_embedder_linear_1",
    ),
    "guidance_in_out_layer": (
        "time_text_embed_guidance_embedder_linear_2",
        "time_guidance_embed_guidance_embedder_linear_2",
    ),
    "double_stream_modulation_img_lin": ("double_stream_modulation_img_linear",),
    "double_stream_modulation_txt_lin": ("double_stream_modulation_txt_linear",),
    "single_stream_modulation_lin": ("single_stream_modulation_linear",),
    "final_layer_linear": ("proj_out",),
}


def _from_original_transformer(module: str) -> Iterator[Target]:
    for name in _AROUND.get(module, ()):
        yield Target((name,))
    if module == "final_layer_adaLN_modulation_1":  # shift and scale; diffusers has scale and shift
        yield Target(("norm_out_linear",), is_swapped=True)
    match = _TRANSFORMER_BLOCK.match(module)
    if not match:
        return
    blocks, names = _KINDS[match["kind"]]
    for alternative in names.get(match["rest"], ()):
        yield Target(tuple(f"{blocks}_{match['number']}_{name}" for name in alternative))
