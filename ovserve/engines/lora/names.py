"""The names in LoRA files: which tensor is which matrix of which module, in the spellings of the common trainers.

    file                                                               component       module
    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight          denoiser        mid_block_attentions_0_proj_in
    unet.mid_block.attentions.0.proj_in.lora.down.weight               denoiser        mid_block_attentions_0_proj_in
    base_model.model.mid_block.attentions.0.proj_in.lora_A.weight      denoiser        mid_block_attentions_0_proj_in
    lora_te2_text_model_final_layer_norm.alpha                         text_encoder_2  text_model_final_layer_norm

kohya joins the parts of a module's name with `_`, so dots count as `_` in all spellings. Some trainers name the modules
of a model as the original implementation does (`input_blocks_4_1_...`); `modules.py` translates that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["DENOISER", "KeyParts", "parse_key"]

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
