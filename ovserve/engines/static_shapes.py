"""The one shape that engine `genai` compiles a model for, where the option `resolution` names one size.

An NPU has no other way. On a CPU or GPU the pictures are the same within the last bits. As in OpenVINO Model Server,
the guidance scale is fixed with the size: it decides how many rows the denoiser gets.
"""

from __future__ import annotations

from dataclasses import dataclass

from ovserve.errors import InternalError, ModelError
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import ModelSettings

__all__ = ["StaticShape"]


@dataclass(frozen=True, slots=True)
class StaticShape:
    """Working size in pixels, and the guidance scale in the engine's terms."""

    width: int
    height: int
    guidance_scale: float

    @classmethod
    def of(cls, profile: ModelProfile, settings: ModelSettings) -> StaticShape | None:
        """Return the shape of a model; None where its networks take every size.

        Raises:
            ModelError: an NPU has no shape to compile for.
        """
        is_npu = "NPU" in settings.device
        where = f"model {profile.name}"
        if len(settings.resolution) != 1:
            if is_npu:
                raise ModelError(f"{where}: an NPU requires static shapes; set `resolution` to exactly one size")
            return None
        if profile.traits.edits_by_reference:
            # The library compiles for the tokens of a reference, and then fails without one.
            if is_npu:
                raise ModelError(f"{where}: an NPU cannot serve a model that takes reference images; use CPU or GPU")
            return None
        [size] = settings.resolution
        working = profile.working_size(size.width, size.height)  # results are fitted back to the size
        fixed = settings.guidance_scale
        guidance = profile.defaults.guidance_scale if fixed is None else fixed
        return cls(working.width, working.height, profile.traits.engine_guidance(guidance))

    def check(self, width: int, height: int, guidance_scale: float) -> None:
        """Check the working size and the guidance of a picture; requests with others were refused before.

        Raises:
            InternalError: the networks have another shape.
        """
        if (width, height) != (self.width, self.height):
            raise InternalError(f"working size {width}x{height}; the model is compiled for {self.width}x{self.height}")
        if (guidance_scale > 1) != (self.guidance_scale > 1):
            raise InternalError(f"guidance {guidance_scale:g}; the model is compiled for {self.guidance_scale:g}")
