"""Which families have a module, and the one of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ovserve.engines.families.flux import Flux, FluxFill, FluxKontext
from ovserve.engines.families.flux2 import Flux2Klein
from ovserve.engines.families.instruct_pix2pix import InstructPix2Pix
from ovserve.engines.families.protocol import Family
from ovserve.engines.families.qwen_image import QwenImage
from ovserve.engines.families.sd3 import StableDiffusion3
from ovserve.engines.families.sdxl import Sdxl
from ovserve.engines.families.stable_diffusion import StableDiffusion
from ovserve.engines.families.z_image import ZImage
from ovserve.errors import ModelError
from ovserve.models.profile import ModelProfile

__all__ = ["DRIVEN_FAMILIES", "check_driven", "family_for"]

_FAMILIES: Mapping[str, Callable[[ModelProfile], Family]] = {
    "stable-diffusion": StableDiffusion,
    "lcm": StableDiffusion,  # its UNet says that guidance is an input; see `lcm`
    "instruct-pix2pix": InstructPix2Pix,
    "sdxl": Sdxl,
    "sd3": StableDiffusion3,
    "flux": Flux,
    "flux-fill": FluxFill,
    "flux-kontext": FluxKontext,
    "flux2-klein": Flux2Klein,
    "z-image": ZImage,
    "qwen-image": QwenImage,
}
DRIVEN_FAMILIES = frozenset(_FAMILIES)  # those that engine stepwise drives


def check_driven(profile: ModelProfile) -> None:
    """Check that the model's family has a module.

    Raises:
        ModelError: it has none.
    """
    if profile.family not in _FAMILIES:
        raise ModelError(
            f"model {profile.name}: engine stepwise does not serve family {profile.family}, "
            f"only {', '.join(sorted(DRIVEN_FAMILIES))}; set engine to genai or auto"
        )


def family_for(profile: ModelProfile) -> Family:
    """Return the family of a model.

    Raises:
        ModelError: its family has no module, or a configuration file cannot be read.
    """
    check_driven(profile)
    return _FAMILIES[profile.family](profile)
