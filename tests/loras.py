"""LoRA files for tests: a writer of safetensors, random adapters for the built-in model, and the fixture `lora`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ovserve.engines.lora.tensors import read_tensors
from tests.pictures import MODELS, directory_of

Tensors = Mapping[str, np.ndarray[Any, np.dtype[Any]]]
DTYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "uint16": "BF16"}
ORACLE = MODELS / "lora"  # a UNet and a text encoder with named modules, adapters, and what torch computes

# Modules of the built-in model: outputs, inputs, and the kernel of a convolution.
UNET_MODULES: dict[str, tuple[int, ...]] = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (80, 80),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": (80, 128),
    "down_blocks.0.attentions.0.proj_out": (80, 80),  # a convolution of 1 x 1
    "down_blocks.0.resnets.0.conv1": (80, 80, 3, 3),
    "down_blocks.0.resnets.0.time_emb_proj": (160, 320),
}
TEXT_MODULES: dict[str, tuple[int, ...]] = {
    "text_model.encoder.layers.0.self_attn.q_proj": (128, 128),
    "text_model.encoder.layers.1.mlp.fc1": (256, 128),
}


def safetensors(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a file; uint16 arrays are written as BF16."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def kohya_tensors(seed: int, *, text: bool = False, rank: int = 4, spread: float = 0.1) -> dict[str, Any]:
    """Return random matrices for modules of the built-in model in kohya's spelling; `text`: of its text encoder too."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for prefix, modules in (("lora_unet_", UNET_MODULES), ("lora_te_", TEXT_MODULES if text else {})):
        for path, (outputs, inputs, *kernel) in modules.items():
            name = prefix + path.replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = rng.normal(0, spread, (rank, inputs, *kernel)).astype(np.float16)
            tensors[f"{name}.lora_up.weight"] = rng.normal(0, spread, (outputs, rank)).astype(np.float16)
            tensors[f"{name}.alpha"] = np.array(2.0 * rank, np.float32)
    return tensors


def write_adapter(path: Path, seed: int, *, text: bool = False, rank: int = 4, spread: float = 0.1) -> Path:
    """Write a random adapter for the built-in model; see `kohya_tensors`."""
    path.write_bytes(safetensors(kohya_tensors(seed, text=text, rank=rank, spread=spread)))
    return path


def oracle_model(directory: Path) -> Path:
    """Return the fixture model `sd` with the UNet and the text encoder of the fixture `lora`, by links."""
    source = directory_of("sd")
    for part in source.iterdir():
        own = ORACLE / part.name
        (directory / part.name).symlink_to(own if own.exists() else part)
    return directory


def without_convolutions(file: str, directory: Path) -> Path:
    """Return a copy of an adapter of the fixture `lora` without its convolutions of 3 x 3."""
    source = read_tensors(ORACLE / file)
    tensors = {key: np.ascontiguousarray(each) for key, each in source.tensors.items() if "conv1" not in key}
    path = directory / file
    path.write_bytes(safetensors(tensors, source.metadata))
    return path


def named_model(model: str, directory: Path) -> Path:
    """Return a copy of a fixture model whose linear layers have the names `layers.0`, `layers.1`, ..."""
    for part in directory_of(model).iterdir():
        if part.name != "unet" and not part.name.startswith("text_encoder"):
            (directory / part.name).symlink_to(part)
            continue
        graph = ov.Core().read_model(part / "openvino_model.xml")
        layers = [each for each in graph.get_ordered_ops() if each.get_type_name() == "MatMul" and _is_linear(each)]
        for number, layer in enumerate(layers):
            layer.set_friendly_name(f"__module.layers.{number}/aten::linear/MatMul")
        (directory / part.name).mkdir()
        (directory / part.name / "config.json").symlink_to(part / "config.json")
        ov.save_model(graph, directory / part.name / "openvino_model.xml", compress_to_fp16=False)
    return directory


def _is_linear(operation: Any) -> bool:
    weights = operation.input_value(1)
    while weights.get_node().get_type_name() in ("Convert", "Reshape") and weights.get_node().get_input_size():
        weights = weights.get_node().input_value(0)
    return weights.get_node().get_type_name() == "Constant" and len(operation.get_input_partial_shape(1)) == 2


def write_named_adapter(path: Path, model: Path, seed: int, *, leave_out: Collection[str] = ()) -> Path:
    """Write a random adapter for all layers of a `named_model`, but those of `leave_out`, such as `unet.layers.0`."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for component in sorted(part.name for part in model.iterdir() if part.is_dir() and not part.is_symlink()):
        graph = ov.Core().read_model(model / component / "openvino_model.xml")
        for layer in graph.get_ordered_ops():
            name = layer.get_friendly_name()
            key = f"{component}.{name.removeprefix('__module.').partition('/')[0]}"
            if not name.startswith("__module.layers.") or key in leave_out:
                continue
            weights = [int(size) for size in layer.input_value(1).get_shape()]
            outputs, inputs = weights if layer.get_attributes()["transpose_b"] else weights[::-1]
            tensors[f"{key}.lora_A.weight"] = rng.normal(0, 0.1, (2 + seed, inputs)).astype(np.float32)
            tensors[f"{key}.lora_B.weight"] = rng.normal(0, 0.1, (outputs, 2 + seed)).astype(np.float32)
    path.write_bytes(safetensors(tensors))
    return path
