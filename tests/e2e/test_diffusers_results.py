"""Pictures of engine `stepwise` against pictures that diffusers made with the same weights and noise.

`scripts/fixtures/make_pictures.py` made `data/diffusers_pictures.npz` with diffusers 0.39.0, transformers 5.5.4 and
torch 2.13.0 on a CPU, in float32, with the pipelines of which the models in `fixtures/packed` are exports, the weights
of these, and noise from `openvino_genai.CppStdGenerator`. Made again on another machine, one value in 700 differed by
one level. A pixel may differ by one of 255 levels, because the library cuts levels to integers and Pillow rounds them.
The models' float16 also rounds the exporter's own constants, of which the sines of FLUX.1's timesteps and guidance
depend most; with the exports in float32 the largest difference was 1. A wrong rule differs by far more: FLUX.2's
schedule for FLUX.1 by 158 levels, 11.6 in the mean.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovserve.engines.protocol import Pixels, Work
from ovserve.wire.request import ImageRequest
from tests.pictures import drive, image_of, load_stepwise, pixels_of
from tests.tinymodels import tiny_model

PICTURES = Path(__file__).parents[1] / "data" / "diffusers_pictures.npz"
REFERENCES = (image_of(64, 96, 0), image_of(64, 64, 5), image_of(96, 64, 7))
EQUAL_TO_LIBRARY = ("klein", "fluxdev", "sd35", "qwen")  # compared with it in test_transformer_equality.py
LEVELS = (5, 0.6)  # of 255: the largest difference of a pixel, and the mean
LEVELS_OF = {"kontext": (8, 0.7), "fluxdev": (20, 1.6), "kleinbase": (10, 0.8)}  # guidance multiplies differences


def work(prompt: str, steps: int, guidance_scale: float, references: tuple[Pixels, ...] = (), **options: Any) -> Work:
    values: dict[str, Any] = {"width": 64, "height": 96, "negative_prompt": "", **options}
    return Work(
        job=repr((prompt, len(references), guidance_scale)),
        picture=0,
        mode="image2image" if references else "text2image",
        prompt=prompt,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        strength=1.0,
        seed=7,
        initial_image=references[0] if references else None,
        reference_images=references,
        **values,
    )


def edits(scale: float, count: int) -> dict[str, Work]:
    """Return a picture from text and edits with up to `count` references."""
    found = {"text": work("make it blue", 4, scale)}
    return found | {f"ref{n}": work("make it blue", 4, scale, REFERENCES[:n]) for n in range(1, count + 1)}


def pix2pix(scale: float, image_scale: float, negative_prompt: str = "") -> Work:
    request = ImageRequest(task="edit", prompt="", image_guidance_scale=image_scale)
    options: dict[str, Any] = {"width": 64, "height": 64, "request": request, "negative_prompt": negative_prompt}
    return work("make it blue", 5, scale, (image_of(64, 64, 0),), **options)


CASES: dict[str, dict[str, Work]] = {
    "klein": edits(1.0, 3),
    "kleinbase": edits(3.0, 3),
    "kontext": {"ref1": work("make it blue", 4, 2.5, REFERENCES[:1])},
    "fluxdev": {"text": work("a red cat", 4, 3.5)},
    "sd35": {"text": work("a red cat", 5, 4.0)},
    # The scale of diffusers is smaller by one: preparation adds it.
    "zimage": {"g0": work("a red cat", 5, 0.0), "g4": work("a red cat", 5, 5.0, negative_prompt="the red sky")},
    "qwen": {"g1": work("a red cat", 4, 1.0), "g4": work("a red cat", 4, 4.0, negative_prompt="bad")},
    "ip2p": {"g7": pix2pix(7.5, 1.5), "neg": pix2pix(5.0, 1.2, "a dog"), "g1": pix2pix(1.0, 1.5)},
}


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=pytest.mark.heavy if model in EQUAL_TO_LIBRARY else ()) for model in CASES]
)
def test_pictures_are_those_of_diffusers(model: str) -> None:
    engine = load_stepwise(tiny_model(model), streams=1)
    works = CASES[model]
    pictures = dict(zip(works, pixels_of(drive(engine, works.values())), strict=True))
    engine.close()
    most, mean = LEVELS_OF.get(model, LEVELS)
    with np.load(PICTURES) as expected:
        for name, pixels in pictures.items():
            difference = np.abs(pixels.astype(int) - expected[f"{model}-{name}"])
            found = (difference.max(), difference.mean())
            assert found[0] <= most, (name, found)
            assert found[1] <= mean, (name, found)
    changed = list(pictures.values())
    assert all((a != b).mean() > 0.02 for a, b in itertools.pairwise(changed)), "each input has an effect"
