"""The table of model families: what the front end and the engines know of one without reading a model's files.

No other module compares a family's name: what depends on the family is a field of its row here, or a method of its
module in `engines.families`. Which class of diffusers belongs to which family is in `classes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "CLASSIFIER_FREE",
    "EMBEDDED",
    "FAMILIES",
    "LCM_SCHEDULER",
    "NO_GUIDANCE",
    "Defaults",
    "FamilyTraits",
    "T5Encoder",
]

LCM_SCHEDULER = "lcm"  # the scheduler that models of the family LCM are distilled for; others can name it too

# How the guidance scale acts: by a second prediction without the prompt, as an input of the denoiser, or not at all.
CLASSIFIER_FREE, EMBEDDED, NO_GUIDANCE = "classifier-free", "embedded", "none"


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values for the request fields that a client leaves out."""

    num_inference_steps: int
    guidance_scale: float
    strength: float  # image-to-image
    strength_inpainting: float
    strength_variation: float


@dataclass(frozen=True, slots=True)
class T5Encoder:
    """A family's last text encoder if it is a T5: it reads the whole prompt, CLIP's encoders only its beginning.

    Attributes:
        number: which text encoder it is, from 1.
        tokens: the number of tokens that OpenVINO GenAI passes to it.
    """

    number: int
    tokens: int

    @property
    def encoder(self) -> str:
        """Directory of the encoder."""
        return f"text_encoder_{self.number}"

    @property
    def tokenizer(self) -> str:
        """Directory of its tokenizer."""
        return f"tokenizer_{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyTraits:
    """One row of the table.

    Attributes:
        denoiser: directory of the denoiser; a transformer takes latents in patches of two by two.
        defaults: the values of diffusers, or those that OpenVINO GenAI uses for omitted options (measured); a model's
            files can say more (`variants`).
        guidance: how the guidance scale acts: CLASSIFIER_FREE, EMBEDDED or NO_GUIDANCE; files can say more.
        is_distilled: made for a few steps; half of them would give half a picture.
        takes_schedulers: whether other schedulers than the model's own can run it.
        t5: the T5 encoder, or None.
        window: tokens of the text encoder, those of the chat template included; 0: its configuration says.
        has_chat_template: the prompt is put into the tokenizer's chat template, whose tokens count.
        prompt_template: the family's own template instead, with {} for the prompt; empty for none.
        dropped_tokens: tokens at the template's beginning that the denoiser does not get, and that do not count.
        guidance_offset: how much the published guidance scale is smaller than that of equation 6 in Ho and Salimans
            2022, arXiv:2207.12598, which engines and other families use; 0 is off in both.
        empty_negative_prompt: what stands for a negative prompt that was not given, where there is guidance.
        edits_by_reference: an edit starts from noise and sees the image as a condition, so it has no strength.
        has_image_guidance: a second guidance scale says how closely the result follows the image.
        rounds_steps_up: an edit runs its steps times its strength rounded up. Flow matching cuts the number of steps
            that are left out to an integer; the other families cut the number that runs.
        fixes_guidance: OpenVINO GenAI fixes with a model's first picture whether there is guidance.
        generates_by_edit: OpenVINO GenAI derives no text-to-image pipeline from the image-to-image one, which gives the
            same bits at strength 1; the other pipeline would hold the weights a second time.
        misreads_time_shift: OpenVINO GenAI takes the key `time_shift_type` of a scheduler configuration for the rule
            of FLUX.2, and computes a wrong schedule.
    """

    denoiser: str
    defaults: Defaults
    guidance: str = CLASSIFIER_FREE
    is_distilled: bool = False
    takes_schedulers: bool = False
    t5: T5Encoder | None = None
    window: int = 0
    has_chat_template: bool = False
    prompt_template: str = ""
    dropped_tokens: int = 0
    guidance_offset: float = 0.0
    empty_negative_prompt: str = ""
    edits_by_reference: bool = False
    has_image_guidance: bool = False
    rounds_steps_up: bool = False
    fixes_guidance: bool = False
    generates_by_edit: bool = False
    misreads_time_shift: bool = False

    @property
    def is_transformer(self) -> bool:
        """Whether the denoiser is a transformer, not a UNet."""
        return self.denoiser == "transformer"

    @property
    def is_templated(self) -> bool:
        """Whether the prompt is put into a chat template."""
        return self.has_chat_template or bool(self.prompt_template)

    def engine_guidance(self, guidance_scale: float) -> float:
        """Return a request's guidance scale in terms of equation 6: 1 or less is no guidance."""
        return guidance_scale + self.guidance_offset if guidance_scale > 0 else 0.0


_QWEN_WINDOW = 512  # tokens that OpenVINO GenAI passes to a Qwen text encoder, and diffusers for FLUX.2 and Z-Image

# Wu et al. 2025, arXiv:2508.02324, figure 7. Its beginning, up to the user's message, has 34 tokens.
_QWEN_IMAGE_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)

FAMILIES: Mapping[str, FamilyTraits] = {
    "stable-diffusion": FamilyTraits(
        denoiser="unet",
        defaults=Defaults(50, 7.5, 0.8, 1.0, 0.6),
        takes_schedulers=True,
    ),
    "lcm": FamilyTraits(
        denoiser="unet",
        defaults=Defaults(4, 8.5, 0.8, 1.0, 0.6),
        guidance=EMBEDDED,
        is_distilled=True,
    ),
    "instruct-pix2pix": FamilyTraits(
        denoiser="unet",
        defaults=Defaults(100, 7.5, 1.0, 1.0, 1.0),
        takes_schedulers=True,
        edits_by_reference=True,
        has_image_guidance=True,
    ),
    "sdxl": FamilyTraits(
        denoiser="unet",
        defaults=Defaults(50, 5.0, 0.5, 0.9999, 0.5),
        takes_schedulers=True,
    ),
    "sd3": FamilyTraits(
        denoiser="transformer",
        defaults=Defaults(28, 7.0, 0.6, 0.6, 0.6),
        t5=T5Encoder(3, 256),
        rounds_steps_up=True,
        fixes_guidance=True,
    ),
    "flux": FamilyTraits(
        denoiser="transformer",
        defaults=Defaults(28, 3.5, 0.6, 0.6, 0.6),
        guidance=EMBEDDED,
        t5=T5Encoder(2, 512),
        misreads_time_shift=True,
        rounds_steps_up=True,
    ),
    "flux-fill": FamilyTraits(
        denoiser="transformer",
        defaults=Defaults(50, 30.0, 1.0, 1.0, 1.0),
        guidance=EMBEDDED,
        t5=T5Encoder(2, 512),
        misreads_time_shift=True,
        rounds_steps_up=True,
    ),
    "flux-kontext": FamilyTraits(
        denoiser="transformer",
        defaults=Defaults(28, 3.5, 1.0, 1.0, 1.0),
        guidance=EMBEDDED,
        t5=T5Encoder(2, 512),
        misreads_time_shift=True,
        edits_by_reference=True,
        rounds_steps_up=True,
    ),
    "flux2-klein": FamilyTraits(
        denoiser="transformer",
        defaults=Defaults(50, 4.0, 1.0, 1.0, 1.0),
        window=_QWEN_WINDOW,
        has_chat_template=True,
        edits_by_reference=True,
        rounds_steps_up=True,
    ),
    "z-image": FamilyTraits(
        denoiser="transformer",
        defaults=Defaults(50, 4.0, 0.6, 0.6, 0.6),
        window=_QWEN_WINDOW,
        has_chat_template=True,
        guidance_offset=1.0,
        rounds_steps_up=True,
        generates_by_edit=True,
    ),
    "qwen-image": FamilyTraits(
        denoiser="transformer",
        defaults=Defaults(50, 4.0, 0.6, 0.6, 0.6),
        window=_QWEN_WINDOW,
        prompt_template=_QWEN_IMAGE_TEMPLATE,
        dropped_tokens=34,
        empty_negative_prompt=" ",  # without one, diffusers and OpenVINO GenAI have no guidance
        rounds_steps_up=True,
    ),
}
