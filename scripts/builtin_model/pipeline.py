"""Train a built-in model from scratch: tokenizer, autoencoder, scenes, denoiser, decoder, export, report.

To continue after an interruption, run the same command again: finished stages are skipped, and an interrupted stage
resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from scripts.builtin_model.tokenizer import write_tokenizer_files
from scripts.builtin_model.worlds import SPRITES_FILE, WORLD_NAMES, model_sizes

PACKAGE = __package__ or "scripts.builtin_model"
# Work for each budget: autoencoder steps, batch; scenes; denoiser steps, batch; cases of each test. "tiny" only checks
# that every stage runs, "cpu" takes a night on two cores, "gpu" about 20 minutes on a large GPU (estimated).
BUDGETS = {
    "tiny": ((10, 4), 1024, (10, 4), 1),
    "cpu": ((12_000, 8), 48_000, (60_000, 32), 200),
    "gpu": ((20_000, 64), 200_000, (30_000, 512), 200),
}

# Modules of stages whose name is not that of their module.
MODULES = {"train_decoder": "train_autoencoder", "draw_things": "thing_pictures"}
FREE_OPTIONS = ("folder", "threads", "icons")  # these may change when a training is continued


def main() -> None:
    """Parse the command line, and run the stages that are not finished."""
    parser = argparse.ArgumentParser(
        prog="train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="folder for checkpoints, contact sheets, the model and its report; outside the repository",
    )
    parser.add_argument("--world", choices=WORLD_NAMES, default="shapes", help="what the model draws (%(default)s)")
    parser.add_argument(
        "--icons", type=Path, help="icons.json of @iconify-json/fluent-emoji-flat, for the world things"
    )
    parser.add_argument("--budget", choices=list(BUDGETS), default="cpu", help="amount of work (%(default)s)")
    parser.add_argument(
        "--patch", type=int, choices=(1, 2), help="patch size of the UNet; default: 1 with budget gpu, else 2"
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="0: the library's default")
    parser.add_argument("--autoencoder-from", type=Path, help="checkpoint to start the autoencoder from")
    parser.add_argument(
        "--fix-encoder", action="store_true", help="train only the decoder, so that existing denoisers stay valid"
    )
    parser.add_argument("--denoiser-from", type=Path, help="checkpoint to start the denoiser from")
    options = parser.parse_args()
    if options.world == "things" and not options.icons:
        parser.error("--world things needs --icons")
    options.folder.mkdir(parents=True, exist_ok=True)
    check_options(options)
    for name, arguments in stages(options).items():
        run(name, arguments, options.folder, options.world)


def stages(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the stages in order, as a mapping of names to arguments."""
    (autoencoder_steps, autoencoder_batch), scenes, (denoiser_steps, denoiser_batch), cases = BUDGETS[options.budget]
    folder, threads, seed = str(options.folder), ["--threads", str(options.threads)], ["--seed", str(options.seed)]
    patch = options.patch or (1 if options.budget == "gpu" else 2)
    here = ["--folder", folder, *threads, *seed, "--world", options.world]
    autoencoder = [*here, "--steps", str(autoencoder_steps), "--batch", str(autoencoder_batch)]
    if options.autoencoder_from:
        autoencoder += ["--start-from", str(options.autoencoder_from)]
    if options.fix_encoder:
        autoencoder += ["--fix-encoder"]
    denoiser = [*here, "--steps", str(denoiser_steps), "--batch", str(denoiser_batch), "--patch", str(patch)]
    if options.denoiser_from:
        denoiser += ["--start-from", str(options.denoiser_from)]
    model = options.folder / "model"
    report = ["--sheets", str(options.folder / "sheets"), "--report", str(options.folder / "report.json")]
    drawings = ["--icons", str(options.icons), "--out", str(options.folder / SPRITES_FILE)]
    return {
        **({"draw_things": drawings} if options.world == "things" else {}),
        "tokenizer": [],
        "train_autoencoder": autoencoder,
        "encode_scenes": [*here, "--scenes", str(scenes)],
        "train_denoiser": denoiser,
        "sample_scenes": [*here, "--scenes", str(max(64, scenes // 12))],
        "train_decoder": [
            *[*here, "--steps", str(autoencoder_steps // 3), "--batch", str(autoencoder_batch), "--fix-encoder"],
            *["--start-from", str(options.folder / "autoencoder.pt"), "--sampled", str(options.folder / "sampled.pt")],
            *["--name", "decoder"],
        ],
        "export": ["--folder", folder, "--autoencoder", "decoder.pt", "--out", str(model)],
        **evaluation(options, [str(model), "--cases", str(cases), *threads, *report]),
    }


def evaluation(options: argparse.Namespace, arguments: list[str]) -> dict[str, list[str]]:
    """Return the last stage: the tests of the world."""
    if options.world == "things":
        return {"evaluate_things": [*arguments, "--drawings", str(options.folder / SPRITES_FILE)]}
    return {"evaluate": arguments}


def check_options(options: argparse.Namespace) -> None:
    """Exit if the folder holds a training with other options; otherwise record the options in it."""
    path = options.folder / "options.json"
    current = json.dumps(
        {name: str(value) for name, value in sorted(vars(options).items()) if name not in FREE_OPTIONS}
    )
    if not path.exists():
        path.write_text(current, "utf-8")
    elif path.read_text("utf-8") != current:
        sys.exit(f"the training in {options.folder} has other options; use those in {path.name}, or another folder")


def run(name: str, arguments: list[str], folder: Path, world: str) -> None:
    """Run one stage in a separate process, unless it is finished."""
    mark = folder / f"{name}.done"
    if mark.exists():
        print(f"{name}: already finished", flush=True)
        return
    print(f"{name}: started", flush=True)
    began = time.monotonic()
    if name == "tokenizer":
        sizes = model_sizes(world)
        write_tokenizer_files(folder / "tokenizer", sizes.words, sizes.window)
    else:
        ended = subprocess.run([sys.executable, "-m", f"{PACKAGE}.{MODULES.get(name, name)}", *arguments], check=False)
        if ended.returncode:
            sys.exit(f"{name} failed with exit code {ended.returncode}; run the same command to resume")
    mark.touch()
    print(f"{name}: finished in {(time.monotonic() - began) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
