"""Pictures of every shape on models whose UNet takes few shapes: each is edited, on every family, by both engines."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from ovserve.engines.families.lookup import DRIVEN_FAMILIES
from ovserve.engines.protocol import Engine, Outcome
from ovserve.engines.stepwise.sizes import find_denoiser_multiple
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.settings.worker import WorkerSettings
from ovserve.wire.memory.blobs import MemoryBlobs
from ovserve.wire.request import ImageRequest
from ovserve.worker.main import create_engine
from ovserve.worker.prepare import prepare
from tests.pictures import MODELS

FAMILIES = ("sd", "sdxl", "lcm", "inpaint", "sd3", "flux")
SHAPES = [
    *((100, 60), (60, 100), (64, 48), (48, 64), (72, 48), (96, 54), (54, 96), (97, 61), (128, 72)),
    *((131, 77), (33, 128), (128, 33), (65, 65), (80, 64), (120, 90), (90, 120), (300, 211)),
]
Loaded = tuple[Engine, ModelProfile, ModelSettings]


@pytest.fixture(
    scope="module", params=[(name, engine) for name in FAMILIES for engine in ("stepwise", "genai")], ids=str
)
def loaded(request: pytest.FixtureRequest) -> Iterator[Loaded]:
    name, engine_name = request.param
    model = ModelSettings(name=name, path=MODELS / name, engine=engine_name, threads=1, streams=1, max_batch=1)
    profile = find_denoiser_multiple(read_profile(model))
    if engine_name == "stepwise" and profile.family not in DRIVEN_FAMILIES:
        pytest.skip(f"engine stepwise does not serve family {profile.family}")
    engine, _ = create_engine(profile, model)
    engine.load(lambda _: None)
    yield engine, profile, model
    engine.close()


def test_pictures_of_every_shape_are_edited(loaded: Loaded) -> None:
    engine, profile, model = loaded
    blobs = MemoryBlobs()
    for width, height in SHAPES if engine.name == "stepwise" else SHAPES[::4]:  # genai compiles for each size
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 4), np.uint8)
        pixels[..., 3] = 255
        pixels[: height // 2, :, 3] = 0 if "inpainting" in profile.tasks else 255
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        segment = blobs.put(stream.getvalue())
        request = ImageRequest(
            task="edit",
            prompt="a cat",
            num_inference_steps=2 if profile.family != "lcm" else 4,
            guidance_scale=3.0 if profile.takes_negative_prompt else 0.0,
            strength=1.0,
            seed=1,
            images=(segment.blob(0, len(stream.getvalue())),),
        )
        prepared = prepare(request, profile, model, WorkerSettings.of(Settings()), engine, blobs=blobs)
        engine.admit(prepared.work("job", 0))
        outcomes: list[Outcome] = []
        while not outcomes:
            outcomes.extend(engine.turn())
        assert outcomes[0].error is None, (width, height)
        assert outcomes[0].pixels is not None
        assert prepared.assemble(outcomes[0].pixels).shape == (height, width, 3)
        segment.release()
