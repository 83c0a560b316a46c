"""Make a denoiser's checkpoint for one world from that of another, as a start for its training.

Weights of the same name and shape are copied, and the embeddings of the tokens that both vocabularies have: colours,
sizes, positions and filler words. The first and last convolutions are new if the number of latent channels differs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from scripts.builtin_model.denoiser import Denoiser, schedule
from scripts.builtin_model.tokenizer import build_vocabulary
from scripts.builtin_model.training import load_checkpoint, save_checkpoint
from scripts.builtin_model.worlds import WORLD_NAMES, model_sizes

_TOKENS = "text_encoder.embeddings.token_embedding.weight"
_POSITIONS = "text_encoder.embeddings.position_embedding.weight"


def main() -> None:
    """Parse the command line, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="denoiser.pt of the other world; recover.py makes one")
    parser.add_argument("--from-world", choices=WORLD_NAMES, default="shapes", help="its world (%(default)s)")
    parser.add_argument("--world", choices=WORLD_NAMES, default="things", help="the new world (%(default)s)")
    parser.add_argument("--folder", type=Path, required=True, help="contains scenes.pt; start.pt is written there")
    adapt(parser.parse_args())


def adapt(options: argparse.Namespace) -> None:
    """Write start.pt, for --start-from of the denoiser's training."""
    source = load_checkpoint(options.source)["weights"]
    sizes = model_sizes(options.world)
    known = {token: row for row, token in enumerate(build_vocabulary(model_sizes(options.from_world).words)[0])}
    vocabulary, _ = build_vocabulary(sizes.words)
    torch.manual_seed(0)
    model = Denoiser(
        len(vocabulary), latent_channels=sizes.latent_channels, window=sizes.window, time_scale=sizes.time_scale
    )
    weights = model.state_dict()
    for name, own in weights.items():
        if name == _TOKENS:
            for row, token in enumerate(vocabulary):
                if token in known:
                    own[row] = source[name][known[token]]
        elif name == _POSITIONS:
            shared = min(len(own), len(source[name]))
            own[:shared], own[shared:] = source[name][:shared], source[name][-1]
        elif own.shape == source[name].shape:
            own.copy_(source[name])
        else:
            print("new:", name)
    latents = load_checkpoint(options.folder / "scenes.pt")["after"].float()
    content = {
        "step": 0,
        "settings": model.settings,
        "weights": weights,
        "schedule": schedule(model.time_scale),
        "mean": latents.mean((0, 2, 3), keepdim=True),
        "scale": latents.std((0, 2, 3), keepdim=True),
    }
    save_checkpoint(options.folder / "start.pt", content)


if __name__ == "__main__":
    main()
