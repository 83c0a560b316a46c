"""Engine `stepwise` makes the same bytes as OpenVINO GenAI, alone and in mixed batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ovserve.engines.protocol import Work
from ovserve.engines.schedulers.noise import read_scheduler_config
from ovserve.engines.stepwise.engine import Call, StepwiseEngine
from ovserve.engines.stepwise.slots import Finished
from ovserve.models.profile import ModelProfile, read_profile
from ovserve.settings.options import Resolution
from tests.pictures import (
    COMPILED,
    TYPES,
    Library,
    directory_of,
    drive,
    load_stepwise,
    pixels_of,
    settings_of,
    with_scheduler,
    work_of,
)

# Steps, strength and guidance scale that differ within one batch: many timesteps, and one or two rows for a picture.
SCHEDULES = ((5, 1.0, 3.0), (9, 0.6, 1.0), (4, 1.0, 1.0), (7, 0.85, 6.5), (2, 0.99, 3.0), (1, 1.0, 2.0))


class Bench:
    """The engine and the library with the same model.

    Args:
        directory: the model.
        precision: of the computation.
        cache_dir: of compiled networks; None: both compile them.
    """

    def __init__(self, directory: Path, precision: str, cache_dir: Path | None = None) -> None:
        self.calls: list[Finished[Call]] = []
        self.profile: ModelProfile = read_profile(settings_of(directory))
        self.engine: StepwiseEngine = load_stepwise(directory, precision, self.calls.append, cache_dir=cache_dir)
        self.library = Library(directory, precision, cache_dir)

    def check(self, works: list[Work]) -> None:
        """Assert that every picture has the library's bytes."""
        self.calls.clear()
        for work, pixels in zip(works, pixels_of(drive(self.engine, works)), strict=True):
            values = (work.mode, work.scheduler, work.num_inference_steps, work.strength, work.guidance_scale)
            assert pixels.std() > 5, values
            np.testing.assert_array_equal(pixels, self.library.picture(work), err_msg=str(values))

    @property
    def modes(self) -> list[str]:
        return sorted(self.profile.tasks)

    @property
    def schedulers(self) -> list[str]:
        """The schedulers that the library runs: LCM with a v-prediction model ends its process."""
        document = read_scheduler_config(self.profile.directory)
        crashing = {"lcm"} if document["prediction_type"] == "v_prediction" else set()
        return ["", *sorted((self.engine.schedulers & set(TYPES)) - crashing)]


@pytest.fixture(
    scope="module",
    params=[("sd", "f32"), ("sd", "bf16"), ("lcm", "f32"), ("sdxl", "f32"), ("inpaint", "f32"), ("builtin", "bf16")],
    ids="-".join,
)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    model, precision = request.param
    made = Bench(directory_of(model), precision)
    yield made
    made.engine.close()


def works_of(bench: Bench, mode: str, scheduler: str, start: int = 0) -> list[Work]:
    """Return one picture for each of SCHEDULES."""
    is_lcm = bench.profile.family == "lcm"
    made = []
    for place, (steps, strength, guidance_scale) in enumerate(SCHEDULES):
        made.append(
            work_of(
                bench.profile,
                mode,
                start + place,
                scheduler=scheduler,
                num_inference_steps=steps,
                strength=1.0 if mode == "text2image" else strength,
                guidance_scale=guidance_scale + 2.5 * is_lcm,
            )
        )
    return made


def test_mixed_batch_has_the_librarys_bytes(bench: Bench) -> None:
    columns = [
        works_of(bench, mode, scheduler, place)
        for place, scheduler in enumerate(bench.schedulers)
        for mode in bench.modes
    ]
    bench.check([work for row in zip(*columns, strict=True) for work in row])
    denoising = [call.subject for call in bench.calls if call.subject.kind == "denoise"]
    assert any(len({row.index for row in call.rows}) > 1 and len(call.pictures) > 2 for call in denoising)


def test_single_pictures_have_the_librarys_bytes(bench: Bench) -> None:
    for place, scheduler in enumerate(bench.schedulers):
        for mode in bench.modes:
            bench.check([works_of(bench, mode, scheduler, place)[place % len(SCHEDULES)]])


def test_pictures_of_one_masked_edit_equal_those_of_single_calls(bench: Bench) -> None:
    # The library rejects more than one for most models; picture k equals a single picture with seed + k.
    first = work_of(bench.profile, "inpainting", 3, guidance_scale=4.0)
    bench.check([replace(first, picture=k, seed=first.seed + k) for k in range(4)])


def test_pictures_of_different_sizes_share_no_call(bench: Bench) -> None:
    native = bench.profile.native
    wide, tall = Resolution(native.width, native.height // 2), Resolution(native.width // 2, native.height + 64)
    mode = bench.modes[0]
    works = [work_of(bench.profile, mode, place, size=(native, wide, tall)[place % 3]) for place in range(9)]
    bench.check(works)
    for call in bench.calls:
        assert len({(picture.work.width, picture.work.height) for picture in call.subject.pictures}) == 1


def test_seed_is_used_modulo_2_to_the_32(bench: Bench) -> None:
    mode = bench.modes[0]
    works = [work_of(bench.profile, mode, 1, seed=seed) for seed in (7, 2**32 + 7)]
    first, second = pixels_of(drive(bench.engine, works))
    np.testing.assert_array_equal(first, second)


VARIANTS = {
    "v-prediction": {"prediction_type": "v_prediction"},
    "zero-snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "linear": {"beta_schedule": "linear", "set_alpha_to_one": True, "steps_offset": 0},
    "sigma-min": {"final_sigmas_type": "sigma_min", "beta_start": 0.0001, "beta_end": 0.02},
    "clipped": {
        "_class_name": "LCMScheduler",
        "original_inference_steps": 40,
        "clip_sample": True,
        "timestep_scaling": 5.0,
    },
}


# A configuration changes the plan of a scheduler, not what a mode does with it: each plan is compared in one mode, and
# in the heavy tier in all.
@pytest.mark.parametrize(
    "has_all_modes", [pytest.param(False, id="one mode"), pytest.param(True, id="all modes", marks=pytest.mark.heavy)]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_scheduler_configurations_have_the_librarys_bytes(
    variant: str, has_all_modes: bool, tmp_path: Path
) -> None:
    changes = VARIANTS[variant]
    directory = with_scheduler("sd", tmp_path, **changes)
    made = Bench(directory, "f32", COMPILED)  # the networks of all variants are the same
    schedulers = {"lcm"} if variant == "clipped" else {"ddim", "pndm", "euler", "euler_ancestral"}
    works = []
    for place, scheduler in enumerate(sorted(schedulers)):
        for number, mode in enumerate(made.modes):
            works += [
                work
                for schedule, work in enumerate(works_of(made, mode, scheduler, place))
                if has_all_modes or (place + schedule) % len(made.modes) == number
                if variant != "trailing" or work.num_inference_steps != 9
            ]
    made.check(works)
    made.engine.close()


def test_step_count_for_which_the_library_runs_an_extra_step_is_served(tmp_path: Path) -> None:
    # With trailing spacing the library runs a thirteenth step at timestep -1, and its picture is noise.
    engine = load_stepwise(with_scheduler("builtin", tmp_path, timestep_spacing="trailing"), "bf16")
    steps: list[tuple[int, int]] = []
    profile = read_profile(settings_of(tmp_path))
    work = work_of(profile, "text2image", num_inference_steps=12, on_step=lambda *step: steps.append(step))
    near = work_of(profile, "text2image", num_inference_steps=13)
    served, longer = pixels_of(drive(engine, [work, near]))
    engine.close()
    assert steps == [(step, 12) for step in range(1, 13)]
    assert np.abs(served.astype(int) - longer).mean() < 8


def test_sdxl_uses_the_second_prompts() -> None:
    made = Bench(directory_of("sdxl"), "f32")
    first = work_of(made.profile, "text2image", 1)
    works = [
        first,
        replace(first, prompt_2="photo of a house"),
        replace(first, negative_prompt_2="a dog"),
        replace(first, negative_prompt="", prompt_2="a dog"),
    ]
    made.check(works)
    pictures = pixels_of(drive(made.engine, works))
    made.engine.close()
    assert len({picture.tobytes() for picture in pictures}) == 4
