"""The names in LoRA files: which tensor is which matrix of which module, in the spellings of the common trainers.

    file                                                               component       module
    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight          denoiser        mid_block_attentions_0_proj_in
    unet.mid_block.attentions.0.proj_in.lora.down.weight               denoiser        mid_block_attentions_0_proj_in
    base_model.model.mid_block.attentions.0.proj_in.lora_A.weight      denoiser        mid_block_attentions_0_proj_in
    lora_te2_text_model_final_layer_norm.alpha                         text_encoder_2  text_model_final_layer_norm

kohya joins the parts of a module's name with `_`, so dots count as `_` in all spellings. Some trainers name the modules
of a UNet as the original implementation does (`input_blocks_4_1_...`); `targets` translates that when no module of the
model has the name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

__all__ = ["DENOISER", "KeyParts", "Target", "component_directories", "parse_key", "targets"]

DENOISER = "denoiser"

# The endings of the two matrices' names: `down` maps to the rank, `up` from it.
_ROLES = {
    "down": (
        ".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight",
        ".lora_linear_layer.down.weight", "_lora.down.weight",
    ),
    "up": (
        ".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight",
        ".lora_linear_layer.up.weight", "_lora.up.weight",
    ),
    "alpha": (".alpha",),
}  # fmt: skip
# Beginnings of names that say which component a module belongs to; without one it is the denoiser's.
_COMPONENTS = (
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("lora_unet_", DENOISER),
    ("lora_transformer_", DENOISER),
    ("unet.", DENOISER),
    ("transformer.", DENOISER),
    ("diffusion_model.", DENOISER),
    ("model.diffusion_model.", DENOISER),
)
_PEFT_PREFIX = "base_model.model."
_PROCESSOR = re.compile(r"^(?P<attention>.+)\.processor\.(?P<layer>to_q|to_k|to_v|to_out)$")  # diffusers before 0.22


@dataclass(frozen=True, slots=True)
class KeyParts:
    """What the name of a tensor says.

    Attributes:
        component: denoiser, or the directory of a text encoder.
        module: name of the module, with `_` for dots.
        path: the same name as it is spelled in the file, without the component.
        role: down, up or alpha.
    """

    component: str
    module: str
    path: str
    role: str


@dataclass(frozen=True, slots=True)
class Target:
    """A module of the model that a module of the file changes.

    Attributes:
        module: its name.
        part, parts: it gets part `part` of `parts` equal parts of the rows of `up`; all of them by default.
    """

    module: str
    part: int = 0
    parts: int = 1


def parse_key(key: str) -> KeyParts | None:
    """Return the parts of a tensor's name; None for a tensor that is no matrix of a LoRA."""
    role, stem = _split_role(key)
    if not stem:
        return None
    stem = stem.removeprefix(_PEFT_PREFIX)
    component = DENOISER
    for prefix, found in _COMPONENTS:
        if stem.startswith(prefix):
            component, stem = found, stem.removeprefix(prefix)
            break
    stem = stem.removeprefix(_PEFT_PREFIX)
    match = _PROCESSOR.match(stem)
    if match:
        stem = f"{match['attention']}.{match['layer']}" + (".0" if match["layer"] == "to_out" else "")
    return KeyParts(component, stem.replace(".", "_"), stem, role)


def _split_role(key: str) -> tuple[str, str]:
    """Return the role of a tensor and the rest of its name; the rest is empty for an unknown ending."""
    for role, endings in _ROLES.items():
        for ending in endings:
            if key.endswith(ending):
                return role, key.removesuffix(ending)
    return "", ""


def component_directories(component: str, denoiser: str) -> str:
    """Return the directory of a component; `denoiser` is the directory of the model's denoiser."""
    return denoiser if component == DENOISER else component


def targets(module: str, known: Collection[str]) -> tuple[Target, ...]:
    """Return the modules of a model that a module of a file changes; empty if the model has none of this name.

    Args:
        module: the name in the file, with `_` for dots.
        known: the names of the model's modules, with `_` for dots.
    """
    for candidate in _candidates(module):
        if all(target.module in known for target in candidate):
            return candidate
    return ()


def _candidates(module: str) -> Iterator[tuple[Target, ...]]:
    """Yield translations of a name, the likeliest first."""
    yield (Target(module),)
    plain = module.removeprefix("text_model_")  # some versions of transformers have a model around it, others none
    if plain != module:
        yield (Target(plain),)
    else:
        yield (Target(f"text_model_{module}"),)
    original = _from_original_unet(module)
    if original:
        yield (Target(original),)


# --- names of the original Stable Diffusion UNet ---

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
    """Return the name in diffusers of a module named as in the original implementation; empty for another name.

    Rombach et al. 2022, repository CompVis/stable-diffusion, ldm/modules/diffusionmodules/openaimodel.py.
    """
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
