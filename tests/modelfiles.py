"""Model directories without weights: the configuration files of a pipeline class, and empty graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovserve.models.classes import CLASSES
from ovserve.models.families import FAMILIES

Document = Mapping[str, Any]

NOTHING: Document = {}
CLIP = {"max_position_embeddings": 77}
QWEN = {"max_position_embeddings": 40960}
VAE = {"block_out_channels": [128, 256, 512, 512]}
QWEN_VAE = {"dim_mult": [1, 2, 4, 4]}
EULER_TRAILING = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}


def write_model(
    directory: Path,
    class_name: str,
    *,
    index: Document = NOTHING,
    denoiser: Document = NOTHING,
    vae: Document = VAE,
    scheduler: Document = NOTHING,
    text: Document | None = None,
    has_encoder: bool = True,
) -> Path:
    """Write the files of a model of a class, served or not, and return the directory."""
    row = CLASSES.get(class_name)
    traits = FAMILIES[row.family] if row else FAMILIES["flux"]
    window = text if text is not None else QWEN if traits.window else CLIP
    components: dict[str, Document] = {traits.denoiser: denoiser, "vae_decoder": vae, "text_encoder": window}
    if has_encoder:
        components["vae_encoder"] = vae
    if traits.t5 is not None:
        components[traits.t5.encoder] = {}
    for name, config in components.items():
        (directory / name).mkdir(parents=True)
        (directory / name / "config.json").write_text(json.dumps(config))
        for suffix in ("xml", "bin"):
            (directory / name / f"openvino_model.{suffix}").touch()
    (directory / "tokenizer").mkdir()
    for suffix in ("xml", "bin"):
        (directory / "tokenizer" / f"openvino_tokenizer.{suffix}").touch()
    (directory / "scheduler").mkdir()
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (directory / "model_index.json").write_text(json.dumps({"_class_name": class_name, **index}))
    return directory
