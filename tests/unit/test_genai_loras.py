"""LoRA adapters in the engine `genai`: the pictures of engine `stepwise`, or a refusal when the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ovserve.engines.genai import GenaiEngine
from ovserve.engines.protocol import Engine
from ovserve.engines.stepwise.engine import StepwiseEngine
from ovserve.errors import InvalidValue, ModelError
from ovserve.models.profile import read_profile
from ovserve.settings.loras import LoraSettings
from ovserve.settings.options import Resolution
from ovserve.wire.request import ImageRequest
from tests.loras import ORACLE, named_model, oracle_model, safetensors, without_convolutions, write_named_adapter
from tests.pictures import directory_of, drive, pixels_of, settings_of, work_of
from tests.tinymodels import tiny_model

pytestmark = pytest.mark.engine

Chosen = tuple[tuple[str, float], ...]
# Weights in consecutive requests: none, one adapter, both, only the first changed, the same again, the other.
CHOICES: tuple[Chosen, ...] = (
    (), (("a", 1.0),), (("a", 0.5), ("b", -0.5)), (("a", -0.3), ("b", -0.5)), (("a", -0.3), ("b", -0.5)),
    (("b", 1.0),), (("a", 0.0),), (("a", 1.0),),
)  # fmt: skip
SIZES = (Resolution(64, 64), Resolution(96, 64), Resolution(64, 128))
GUIDANCE = (3.0, 1.0, 6.0)
CONDITION = "unet.layers.0"  # the linear layer of the fixture `lcm` that reads an input of its own


def loaded(engine: type[GenaiEngine | StepwiseEngine], directory: Path, **options: Any) -> Any:
    settings = settings_of(directory, **options)
    made = engine(read_profile(settings), settings)
    made.load(lambda _phase: None)
    return made


class Model:
    """A model, two adapters, and both engines with them."""

    def __init__(self, directory: Path, *files: Path) -> None:
        self.profile = read_profile(settings_of(directory))
        self.directory = directory
        self.loras = tuple(LoraSettings(alias=alias, path=file) for alias, file in zip("ab", files, strict=True))
        self.genai: GenaiEngine = loaded(GenaiEngine, directory, lora=self.loras)
        options: dict[str, Any] = {"streams": 1, "max_batch": 2, "lora_denoiser": "shared"}
        self.stepwise: StepwiseEngine = loaded(StepwiseEngine, directory, lora=self.loras, **options)

    def picture(self, engine: Engine, mode: str, chosen: Chosen, place: int = 0) -> NDArray[np.int16]:
        request = ImageRequest(task="generation", prompt="", adapters=chosen)
        options: dict[str, Any] = {"size": SIZES[place % 3], "guidance_scale": GUIDANCE[place % 3]}
        work = work_of(self.profile, mode, place, request=request, num_inference_steps=3, **options)
        return pixels_of(drive(engine, [work]))[0].astype(np.int16)


def make_sd(folder: Path) -> Model:
    (folder / "model").mkdir()
    files = (without_convolutions(f"{name}.safetensors", folder) for name in ("a_peft", "b_kohya"))
    return Model(oracle_model(folder / "model"), *files)


def make_named(name: str) -> Callable[[Path], Model]:
    def make(folder: Path) -> Model:
        (folder / "model").mkdir()
        model = named_model(name, folder / "model")
        left = (CONDITION,) if name == "lcm" else ()
        files = (write_named_adapter(folder / f"{seed}.safetensors", model, seed, leave_out=left) for seed in (1, 4))
        return Model(model, *files)

    return make


MODELS = {"sd": make_sd, "lcm": make_named("lcm"), "inpaint": make_named("inpaint")}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    made = MODELS[request.param](tmp_path_factory.mktemp("model"))
    yield made
    made.genai.close()
    made.stepwise.close()


def test_pictures_are_those_of_stepwise_in_every_mode_and_order(model: Model) -> None:
    for mode in sorted(model.profile.tasks):
        plain = model.picture(model.stepwise, mode, ())
        for place, chosen in enumerate(CHOICES):
            expected = model.picture(model.stepwise, mode, chosen, place)
            found = model.picture(model.genai, mode, chosen, place)
            assert np.abs(found - expected).max() <= 1, (mode, place, chosen)
        assert np.abs(model.picture(model.genai, mode, (("a", 1.0),)) - plain).mean() > 0.2, mode


def test_requests_without_adapters_keep_their_bytes(model: Model) -> None:
    bare = loaded(GenaiEngine, model.directory)
    mode = min(model.profile.tasks)
    model.picture(model.genai, mode, (("b", 1.0),))
    for place in range(2):
        assert np.array_equal(model.picture(model.genai, mode, (), place), model.picture(bare, mode, (), place))
    bare.close()


def test_one_copy_of_the_model_makes_all_pictures_where_that_is_configured(
    model: Model, capfd: pytest.CaptureFixture[str]
) -> None:
    if model.profile.inpainting_unet:
        pytest.skip("two classes are enough")
    shared = loaded(GenaiEngine, model.directory, lora=model.loras, lora_denoiser="shared")
    for chosen in ((), CHOICES[2], ()):  # in float32 weights of zero change no bits
        expected = model.picture(model.genai, "text2image", chosen)
        assert np.array_equal(model.picture(shared, "text2image", chosen), expected)
    shared.close()
    assert "Unused LoRA tensor" not in capfd.readouterr().err  # of the library, at each load and call


def test_an_adapter_that_the_model_does_not_have_is_refused(model: Model) -> None:
    with pytest.raises(InvalidValue, match="'c' is not an adapter of this model; it has: a, b"):
        model.genai.check(ImageRequest(task="generation", prompt="", adapters=(("c", 1.0),)))


def refusal(directory: Path, path: Path, **options: Any) -> str:
    """Return the message with which a model with one adapter is refused."""
    with pytest.raises(ModelError) as caught:
        loaded(GenaiEngine, directory, lora=(LoraSettings(alias="a", path=path),), **options)
    return str(caught.value)


def test_file_with_a_convolution_is_refused_by_name(tmp_path: Path) -> None:
    message = refusal(oracle_model(tmp_path), ORACLE / "a_diffusers.safetensors")
    assert "a_diffusers.safetensors: engine genai cannot apply 3 of its modules for the denoiser" in message
    assert "convolutions above 1 x 1" in message
    assert "unet.mid_block.resnets.0.conv1" in message


def test_layer_of_an_input_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = named_model("lcm", tmp_path / "model")
    message = refusal(model, write_named_adapter(tmp_path / "a.safetensors", model, 1))
    assert "cannot apply 1 of its modules for the denoiser" in message
    assert message.endswith(f"{CONDITION}.lora_A")


def test_file_of_which_not_all_modules_match_is_refused(tmp_path: Path) -> None:
    tensors = {f"unet.ghost.lora_{side}.weight": np.zeros((4, 4), np.float32) for side in "AB"}
    (tmp_path / "a.safetensors").write_bytes(safetensors(tensors))
    (tmp_path / "model").mkdir()
    message = refusal(oracle_model(tmp_path / "model"), tmp_path / "a.safetensors")
    assert "1 of its 1 modules are not in this model's denoiser" in message


@pytest.mark.parametrize(("name", "label"), [("sdxl", "StableDiffusionXLPipeline"), ("zimage", "ZImagePipeline")])
def test_classes_that_the_library_adapts_wrongly_or_not_at_all_are_refused(name: str, label: str) -> None:
    directory = directory_of(name) if name == "sdxl" else tiny_model(name)
    message = refusal(directory, ORACLE / "a_peft.safetensors")
    assert f"engine genai does not apply LoRA adapters to class {label} reliably; use stepwise" in message


def test_static_shapes_are_refused() -> None:
    message = refusal(directory_of("sd"), ORACLE / "a_peft.safetensors", resolution=(Resolution(64, 64),))
    assert "engine genai does not apply LoRA adapters with static shapes" in message
