"""The table of pipeline classes: the exact class name in model_index.json to its family, and what each engine serves.

A class is served if its name is in the table; no name is matched by its beginning, because `FluxPipeline`,
`FluxFillPipeline`, `FluxKontextPipeline` and `Flux2KleinPipeline` have nothing but letters in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ovserve.errors import ModelError

__all__ = ["CLASSES", "ENGINES", "PipelineClass", "Serving", "class_named", "describe_images", "plan_engine"]

ENGINES = ("genai", "stepwise")

TEXT2IMAGE, IMAGE2IMAGE, INPAINTING = "text2image", "image2image", "inpainting"
_ALL = frozenset({TEXT2IMAGE, IMAGE2IMAGE, INPAINTING})
_UNMASKED = frozenset({TEXT2IMAGE, IMAGE2IMAGE})
_MASKED = frozenset({INPAINTING})

MAX_REFERENCES = 16  # images of one request, as OpenAI's API takes them


@dataclass(frozen=True, slots=True)
class Serving:
    """What an engine does with models of a class, as far as the model's directory has the components.

    Attributes:
        tasks: those of text2image, image2image, inpainting.
        references: the most reference images of one request; 0 where an edit takes one image and starts from it.
        negative_prompt: whether it takes a negative prompt, if the model has classifier-free guidance.
        adapters: whether it applies LoRA adapters.
    """

    tasks: frozenset[str]
    references: int = 0
    negative_prompt: bool = True
    adapters: bool = True


@dataclass(frozen=True, slots=True)
class PipelineClass:
    """One row of the table.

    Attributes:
        family: name of the class's row in `families.FAMILIES`.
        genai, stepwise: what these engines do with it; None where they cannot serve it.
    """

    family: str
    genai: Serving | None = None
    stepwise: Serving | None = None

    def serving(self, engine: str) -> Serving | None:
        """Return what an engine of ENGINES does with this class, or None."""
        return self.genai if engine == "genai" else self.stepwise

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that serve this class."""
        return tuple(engine for engine in ENGINES if self.serving(engine) is not None)


_EVERY = Serving(_ALL)
# OpenVINO GenAI applies adapters right to one UNet with one text encoder only: tests/e2e/test_lora_traps.py.
_PLAIN = Serving(_ALL, adapters=False)

CLASSES: Mapping[str, PipelineClass] = {
    "StableDiffusionPipeline": PipelineClass("stable-diffusion", _EVERY, _EVERY),
    "StableDiffusionInpaintPipeline": PipelineClass("stable-diffusion", _EVERY, _EVERY),
    "StableDiffusionImg2ImgPipeline": PipelineClass("stable-diffusion", None, _EVERY),
    "StableDiffusionInstructPix2PixPipeline": PipelineClass(
        "instruct-pix2pix", None, Serving(frozenset({IMAGE2IMAGE}), references=1)
    ),
    "LatentConsistencyModelPipeline": PipelineClass("lcm", _EVERY, _EVERY),
    "LatentConsistencyModelImg2ImgPipeline": PipelineClass("lcm", None, _EVERY),
    "StableDiffusionXLPipeline": PipelineClass("sdxl", _PLAIN, _EVERY),
    "StableDiffusionXLInpaintPipeline": PipelineClass("sdxl", _PLAIN, _EVERY),
    "StableDiffusionXLImg2ImgPipeline": PipelineClass("sdxl", None, _EVERY),
    "StableDiffusion3Pipeline": PipelineClass("sd3", _PLAIN, _EVERY),
    "StableDiffusion3InpaintPipeline": PipelineClass("sd3", Serving(_MASKED, adapters=False), _EVERY),
    "FluxPipeline": PipelineClass("flux", _PLAIN, _EVERY),
    "FluxInpaintPipeline": PipelineClass("flux", Serving(_MASKED, adapters=False), _EVERY),
    "FluxFillPipeline": PipelineClass("flux-fill", Serving(_MASKED, adapters=False), Serving(_MASKED)),
    "FluxKontextPipeline": PipelineClass(
        "flux-kontext", None, Serving(_ALL, references=MAX_REFERENCES, negative_prompt=False)
    ),
    "Flux2KleinPipeline": PipelineClass(
        "flux2-klein",
        Serving(_UNMASKED, references=1, negative_prompt=False, adapters=False),
        Serving(_ALL, references=MAX_REFERENCES, negative_prompt=False),
    ),
    "ZImagePipeline": PipelineClass("z-image", Serving(_UNMASKED, adapters=False), _EVERY),
    "QwenImagePipeline": PipelineClass("qwen-image", Serving(_UNMASKED, adapters=False), _EVERY),
}


def describe_images(references: int) -> str:
    """Return how many images an edit takes, in words, from the number of reference images."""
    if not references:
        return "one image and no reference images"
    return "1 reference image" if references == 1 else f"at most {references} reference images"


def class_named(name: str, directory: Path) -> PipelineClass:
    """Return the row of a pipeline class. Raises ModelError for a class that no engine serves, and for a refiner."""
    found = CLASSES.get(name)
    if name == "StableDiffusionXLImg2ImgPipeline" and not (directory / "text_encoder").is_dir():
        raise ModelError(
            f"{directory}: this is an SDXL refiner, which has no first text encoder and only finishes pictures of a "
            "base model; it is not served. Set model_path to the base model"
        )
    if found is None or not found.engines:
        served = ", ".join(served for served, row in CLASSES.items() if row.engines)
        raise ModelError(f"{directory}: model_index.json has _class_name {name!r}; served are {served}")
    return found


def plan_engine(name: str, engine: str, device: str, directory: Path) -> tuple[str, str]:
    """Return the engine for a class of CLASSES, and the reason for the log.

    Args:
        name: the class.
        engine: the option `engine`: auto, or one of ENGINES.
        device: the option `device`.
        directory: the model's directory, for the error.

    Raises:
        ModelError: the engine of the option does not serve the class.
    """
    engines = CLASSES[name].engines
    if engine != "auto":
        if engine not in engines:
            raise ModelError(
                f"{directory}: engine {engine} does not serve class {name}; set engine to auto or {engines[0]}"
            )
        return engine, "configured"
    if "stepwise" not in engines:
        return "genai", f"stepwise does not serve class {name}"
    if "genai" in engines and "NPU" in device:
        return "genai", "an NPU requires static shapes"
    if "genai" not in engines:
        return "stepwise", f"genai does not serve class {name}"
    return "stepwise", "same bits as genai for this family, and pictures share its calls"
