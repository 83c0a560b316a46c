"""LoRA adapters in the engine `stepwise`: pictures with different adapters share calls and equal those made alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovserve.engines.protocol import Work
from ovserve.engines.stepwise.engine import Call, StepwiseEngine
from ovserve.engines.stepwise.slots import Finished
from ovserve.errors import InvalidValue
from ovserve.models.profile import read_profile
from ovserve.settings.loras import LoraSettings
from ovserve.wire.request import ImageRequest
from tests.loras import ORACLE, oracle_model
from tests.pictures import drive, pixels_of, settings_of, work_of

LORAS = (
    LoraSettings(alias="a", path=ORACLE / "a_peft.safetensors"),
    LoraSettings(alias="b", path=ORACLE / "b_kohya.safetensors"),
)
CALLS: list[Finished[Call]] = []
Chosen = tuple[tuple[str, float], ...]


def load(directory: Path, **options: Any) -> StepwiseEngine:
    settings = settings_of(directory, **options)
    engine = StepwiseEngine(read_profile(settings), settings, CALLS.append)
    engine.load(lambda _phase: None)
    return engine


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[StepwiseEngine]:
    engine = load(directory, lora=LORAS)
    yield engine
    engine.close()


def work(directory: Path, adapters: Chosen = (), place: int = 0, **options: Any) -> Work:
    profile = read_profile(settings_of(directory))
    request = ImageRequest(task="generation", prompt="", adapters=adapters)
    return work_of(profile, "text2image", place, request=request, **options)


CHOICES: tuple[Chosen, ...] = (
    (("a", 1.0),), (("b", 0.5),), (("a", 0.8), ("b", -0.5)), (), (("a", 0.25),), (("b", 1.0),), (("a", 0.0),),
    (("a", 1.0), ("b", 1.0)),
)  # fmt: skip


def test_eight_pictures_with_different_adapters_share_calls_and_equal_those_made_alone(
    engine: StepwiseEngine, directory: Path
) -> None:
    alone = [pixels_of(drive(engine, [work(directory, chosen, 1)]))[0] for chosen in CHOICES]
    CALLS.clear()
    together = pixels_of(drive(engine, [work(directory, chosen, 1) for chosen in CHOICES]))
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)
    different = {picture.tobytes() for picture in alone}
    assert len(different) == len(CHOICES) - 1  # a weight of 0 is no adapter
    assert np.array_equal(alone[3], alone[6])
    shared = [
        {row.picture.work.request.adapters for row in call.subject.rows}
        for call in CALLS
        if call.subject.kind == "denoise"
    ]
    assert any(len(adapters) > 2 for adapters in shared)


@pytest.mark.parametrize("mode", ["auto", "shared"])
def test_pictures_without_adapters_keep_their_bytes(directory: Path, mode: str) -> None:
    plain, adapted = load(directory), load(directory, lora=LORAS, lora_denoiser=mode)
    works = [work(directory, (), place) for place in range(3)]
    expected = pixels_of(drive(plain, works))
    found = pixels_of(drive(adapted, [work(directory, (), place) for place in range(3)]))
    # Beside the branches of adapters, some processors compute a layer in another order: the last bits may differ.
    limit = 1 if mode == "shared" else 0
    assert all(np.abs(one.astype(int) - other).max() <= limit for one, other in zip(expected, found, strict=True))
    CALLS.clear()
    drive(adapted, [work(directory, (("a", 1.0),) if place % 2 else (), place) for place in range(8)])
    mixed = [
        call
        for call in CALLS
        if call.subject.kind == "denoise"
        and len({bool(row.picture.work.request.adapters) for row in call.subject.rows}) > 1
    ]
    assert bool(mixed) == (mode == "shared")
    plain.close()
    adapted.close()


def test_the_prompt_cache_tells_weights_apart(engine: StepwiseEngine, directory: Path) -> None:
    # One prompt with other weights of the text encoder's adapter: the second picture must not get the first embedding.
    first = pixels_of(drive(engine, [work(directory, (("a", 1.0),), 2)]))[0]
    pixels_of(drive(engine, [work(directory, (("a", 0.5),), 2)]))
    pixels_of(drive(engine, [work(directory, (), 2)]))
    again = pixels_of(drive(engine, [work(directory, (("a", 1.0),), 2)]))[0]
    assert np.array_equal(first, again)
    CALLS.clear()
    drive(engine, [work(directory, (("b", 1.0),), 2)])  # b does not change the text encoder: the embedding is cached
    assert [call.subject.kind for call in CALLS].count("encode") == 1


def test_an_adapter_that_the_model_does_not_have_is_refused(engine: StepwiseEngine) -> None:
    with pytest.raises(InvalidValue, match="'c' is not an adapter of this model; it has: a, b"):
        engine.check(ImageRequest(task="generation", prompt="", adapters=(("c", 1.0),)))
