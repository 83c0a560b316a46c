"""Make training checkpoints from an exported model, because the packaged model's checkpoints are too large to keep.

A model of the same shape but with random weights is exported too. Both graphs then contain the same constants in the
same order, and in the random one the values of a constant identify the weight it comes from.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
import torch
from torch import Tensor

from scripts.builtin_model.autoencoder import Autoencoder
from scripts.builtin_model.denoiser import Denoiser, schedule
from scripts.builtin_model.export import export
from scripts.builtin_model.tokenizer import build_vocabulary, write_tokenizer_files
from scripts.builtin_model.training import save_checkpoint
from scripts.builtin_model.worlds import WORLD_NAMES, model_sizes

PARTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
# The export merges the latents' mean and the encoder's last bias into one constant: see `_weight_names`.
SHIFTED_BIAS = "shifted bias"
Weights = dict[str, Tensor]


def main() -> None:
    """Parse the command line, and write both checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of the exported model")
    parser.add_argument("folder", type=Path, help="autoencoder.pt and denoiser.pt are written there")
    parser.add_argument("--world", choices=WORLD_NAMES, default="shapes", help="what the model draws (%(default)s)")
    options = parser.parse_args()
    recover(options.model, options.folder, options.world)


def recover(model: Path, folder: Path, world: str = "shapes") -> None:
    """Write `folder`/autoencoder.pt and denoiser.pt, for --start-from of the trainings.

    Raises:
        ValueError: the model's shape differs from that of the model that this code builds.
    """
    sizes = model_sizes(world)
    vocabulary, _ = build_vocabulary(sizes.words)
    autoencoder = Autoencoder(latent_channels=sizes.latent_channels)
    denoiser = Denoiser(
        len(vocabulary),
        latent_channels=sizes.latent_channels,
        window=sizes.window,
        time_scale=sizes.time_scale,
    )
    latents: Weights = {name: torch.empty(1, sizes.latent_channels, 1, 1) for name in ("mean", "scale")}
    modules = {"autoencoder": autoencoder, "denoiser": denoiser}
    _randomise([*autoencoder.parameters(), *denoiser.parameters(), *latents.values()])
    with tempfile.TemporaryDirectory() as scratch:
        write_tokenizer_files(Path(scratch) / "tokenizer", sizes.words, sizes.window)
        _write(Path(scratch), modules, latents)
        export(Path(scratch), Path(scratch) / "model")
        found: Weights = {}
        known = _weight_names(autoencoder, denoiser, latents)
        for part in PARTS:
            found |= _read(_constants(Path(scratch) / "model" / part), _constants(model / part), known)
    last = _last_bias(autoencoder)
    found[f"autoencoder.{last}"] = found.pop(SHIFTED_BIAS).flatten() + found["mean"].flatten()
    for name, module in modules.items():
        own = module.state_dict()
        prefix = f"{name}."
        given = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
        missing = {key for key, _ in module.named_parameters()} - given.keys()
        if missing:
            raise ValueError(f"weights are missing in the model: {', '.join(sorted(missing))}")
        module.load_state_dict({**own, **{key: value.reshape(own[key].shape) for key, value in given.items()}})
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, modules, {name: found[name].reshape(1, sizes.latent_channels, 1, 1) for name in latents})


@torch.no_grad()
def _randomise(weights: list[Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        # Small, positive and not close to zero: every value survives 16 bits, and division by the scale is possible.
        weight.uniform_(0.01, 0.1, generator=generator)


def _weight_names(autoencoder: Autoencoder, denoiser: Denoiser, latents: Weights) -> dict[bytes, str]:
    """Return the name of each weight by its values as 16-bit floats."""
    weights = {f"autoencoder.{name}": weight for name, weight in autoencoder.named_parameters()}
    last = f"autoencoder.{_last_bias(autoencoder)}"
    weights[SHIFTED_BIAS] = weights.pop(last) - latents["mean"].flatten()
    weights |= {f"denoiser.{name}": weight for name, weight in denoiser.named_parameters()}
    return {_key(weight.detach().numpy()): name for name, weight in (weights | latents).items()}


def _last_bias(autoencoder: Autoencoder) -> str:
    """Return the name of the encoder's last bias, from which the export subtracts the latents' mean."""
    return [name for name, _ in autoencoder.named_parameters() if name.startswith("encoder.")][-1]


def _key(values: npt.NDArray[Any]) -> bytes:
    return values.astype(np.float16).tobytes()


def _constants(part: Path) -> list[npt.NDArray[np.float16]]:
    """Return the 16-bit constants of a graph, in the order of the graph."""
    graph = openvino.Core().read_model(part / "openvino_model.xml")
    constants = (node for node in graph.get_ordered_ops() if node.get_type_name() == "Constant")
    return [np.array(node.data) for node in constants if node.get_element_type() == openvino.Type.f16]


def _read(
    random: list[npt.NDArray[np.float16]], wanted: list[npt.NDArray[np.float16]], known: dict[bytes, str]
) -> Weights:
    if [constant.shape for constant in random] != [constant.shape for constant in wanted]:
        raise ValueError("the constants of the model's graph differ from those of this code's export")
    found: Weights = {}
    for like, constant in zip(random, wanted, strict=True):
        name = known.get(_key(like))
        if name is not None:
            found[name] = torch.from_numpy(constant.astype(np.float32))
        elif not np.array_equal(like, constant):
            raise ValueError(f"a constant of shape {like.shape} does not come from a single weight")
    return found


def _write(folder: Path, modules: dict[str, Any], latents: Weights) -> None:
    """Write both checkpoints as the trainings do, without the state that a resumed run needs."""
    for name, module in modules.items():
        content = {"step": 0, "settings": module.settings, "weights": module.state_dict()}
        if name == "denoiser":
            content |= {"schedule": schedule(module.time_scale), **latents}
        save_checkpoint(folder / f"{name}.pt", content)


if __name__ == "__main__":
    main()
