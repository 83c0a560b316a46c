"""Turns the body of txt2img or img2img into a form with our fields, which is then validated like any other.

body ──table──▶ used, ignored, refused ──▶ Translation.form ──▶ api.parameters
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ovserve.api.exchange import Form, Upload
from ovserve.api.parameters.values import shown
from ovserve.api.sdapi.fields import (
    ENDPOINTS,
    FILLS,
    IGNORED,
    IMG2IMG,
    REFUSED,
    RESIZE_MODES,
    SETTINGS,
    SdField,
    fields_of,
)
from ovserve.api.sdapi.samplers import resolve_scheduler
from ovserve.errors import InvalidType, InvalidValue, NotFound, UnsupportedParameter
from ovserve.models.catalog import Catalog
from ovserve.models.profile import ModelProfile
from ovserve.settings.options import Settings
from ovserve.wire.blobs import Blob

__all__ = ["Translation", "checkpoint_name", "translate"]

MAX_IGNORED = 100  # names listed in a reply
MAX_IGNORED_CHARS = 100
OTHER_SIDE_PX = 512  # the default of that API for a side, used if only the other one is sent
MAX_DIGITS = 40  # of a number sent as text
_PICTURE_NAME = re.compile(r"(init_images|mask)(?:\[(\d+)\])?")
_INTEGER = re.compile(rf"\s*([+-]?\d{{1,{MAX_DIGITS}}})(?:\.0*)?\s*", re.ASCII)
_FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
_TRUE, _FALSE = ("true", "1", "on", "yes"), ("false", "0", "off", "no")
# The hash and the ending with which that API writes the name of a checkpoint.
_TITLE = re.compile(r"(.*?)(?:\.(?:safetensors|ckpt|gguf))?(?: \[[0-9a-f]{4,64}\])?", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Renamed:
    """An upload under the name of our field; implements `api.exchange.Upload`."""

    name: str
    upload: Upload

    @property
    def filename(self) -> str | None:
        """None: a JSON body has no filenames."""
        return self.upload.filename

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.upload.size

    @property
    def blob(self) -> Blob:
        """Reference to the content."""
        return self.upload.blob

    def view(self) -> memoryview:
        """Return the content."""
        return self.upload.view()


@dataclass(frozen=True, slots=True)
class _OurForm:
    """A form with our fields; implements `api.exchange.Form`."""

    fields: Sequence[tuple[str, Any]]
    uploads: Sequence[Upload]
    is_json: bool = True


@dataclass(frozen=True, slots=True)
class Translation:
    """A translated body.

    Attributes:
        form: the same request with our fields.
        endpoint: edit or generation.
        ignored: names of what was sent and has no effect, at most MAX_IGNORED.
        values: the value of every field of the API, without pictures, for `parameters`.
        batch_size: as sent, or 1.
        sends_images: whether the reply contains the pictures.
    """

    form: Form
    endpoint: str
    ignored: tuple[str, ...]
    values: Mapping[str, Any]
    batch_size: int
    sends_images: bool


def translate(form: Form, endpoint: str, catalog: Catalog, settings: Settings) -> Translation:
    """Translate a body.

    Args:
        form: the JSON body.
        endpoint: txt2img or img2img.
        catalog: the models served now.
        settings: the server's options.

    Raises:
        BadRequest: a subclass of it: a value has the wrong type, or cannot be served.
        NotFound: there is no image, no such sampler or no such model.
    """
    return _Translator(form, endpoint, catalog, settings).run()


def checkpoint_name(name: str, catalog: Catalog) -> str:
    """Return the model that the name or the title of a checkpoint means: without a hash and the ending of a file."""
    if catalog.name_of(name):
        return name
    match = _TITLE.fullmatch(name)
    return match[1] if match and catalog.name_of(match[1]) else name


class _Translator:
    """Translates one body."""

    def __init__(self, form: Form, endpoint: str, catalog: Catalog, settings: Settings) -> None:
        self._endpoint = endpoint
        self._catalog = catalog
        self._settings = settings
        self._known = fields_of(endpoint)
        self._form = form
        self._sent: dict[str, Any] = {}  # the values of known fields, null left out
        self._ignored: list[str] = []
        self._uploads: list[_Renamed] = []
        self._fields: list[tuple[str, Any]] = []

    def run(self) -> Translation:
        """Return the translated request. Raises InvalidValue for a field that cannot be served."""
        self._read_names()
        self._check_unused()
        self._read_pictures()
        batch_size, n_iter = self._integer("batch_size", 1), self._integer("n_iter", 1)
        for name, value in (("batch_size", batch_size), ("n_iter", n_iter)):
            if value < 1:
                raise InvalidValue(f"{name} is {shown(value)}; at least 1 is required.", param=name)
        self._put("n", batch_size * n_iter)
        self._put_settings()
        self._put_texts()
        self._put_numbers()
        scheduler = resolve_scheduler(
            self._text("sampler_name") or self._text("sampler_index"), self._text("scheduler")
        )
        if scheduler:
            self._put("scheduler", scheduler)
        if self._endpoint == IMG2IMG:
            self._put_mask()
        # Progress and previews, as for a stream: `GET progress` shows them.
        self._put("stream", True)
        self._put("partial_images", self._settings.sdapi_previews)
        return Translation(
            form=_OurForm(self._fields, self._uploads),
            endpoint=ENDPOINTS[self._endpoint],
            ignored=tuple(name[:MAX_IGNORED_CHARS] for name in self._ignored[:MAX_IGNORED]),
            values={name: self._sent.get(name, known.default) for name, known in self._known.items()},
            batch_size=batch_size,
            sends_images=self._boolean("send_images", default=True),
        )

    # --- what was sent ------------------------------------------------------------------------------------------------

    def _read_names(self) -> None:
        """Sort the fields into known and unknown ones."""
        for name, value in self._form.fields:
            if name in self._known:
                if value is not None:
                    self._sent[name] = value
            elif not self._is_picture(name):
                self._ignored.append(name)

    def _is_picture(self, name: str) -> bool:
        match = _PICTURE_NAME.fullmatch(name)
        return match is not None and match[1] in self._known

    def _check_unused(self) -> None:
        """List the ignored fields that ask for something. Raises UnsupportedParameter for a refused one."""
        for name, value in self._sent.items():
            known = self._known[name]
            if known.use == REFUSED and not known.is_neutral(value) and value != known.default:
                raise UnsupportedParameter(_refusal(known, value), param=name)
            if known.use == IGNORED and not known.is_neutral(value) and value != known.default:
                self._ignored.append(name)

    def _read_pictures(self) -> None:
        """Rename the pictures.

        Raises:
            NotFound: img2img without an image.
            InvalidValue, InvalidType: a picture is a URL, or no base64 of an image.
        """
        for upload in self._form.uploads:
            match = _PICTURE_NAME.fullmatch(upload.name)
            if match is None or match[1] not in self._known:
                self._ignored.append(upload.name)
            elif match[1] == "mask":
                self._uploads.append(_Renamed("mask", upload))
            else:
                self._uploads.append(_Renamed(f"image[{match[2] or 0}]", upload))
        for name, value in self._form.fields:
            if self._is_picture(name) and value not in (None, "", []):
                if isinstance(value, str) and value.startswith(("http://", "https://")):
                    raise InvalidValue(f"{name} is {shown(value)}; URLs are not fetched, send base64.", param=name)
                raise InvalidType(f"{name} is {shown(value)}; expected an image in base64 or a data URL.", param=name)
        if self._endpoint == IMG2IMG and not any(upload.name != "mask" for upload in self._uploads):
            raise NotFound("Init image not found: init_images is missing or empty.", param="init_images")
        self._sent = {name: value for name, value in self._sent.items() if name not in ("init_images", "mask")}

    # --- our fields ---------------------------------------------------------------------------------------------------

    def _put(self, name: str, value: Any) -> None:
        self._fields.append((name, value))

    def _find_profile(self) -> ModelProfile:
        """Return the profile of the request's model. Raises ModelNotFound and MissingParameter."""
        return self._catalog.find(next((value for name, value in self._fields if name == "model"), None)).profile

    def _put_settings(self) -> None:
        override = self._sent.get("override_settings", {})
        if not isinstance(override, dict):
            raise InvalidType(f"override_settings is {shown(override)}; expected an object.", param="override_settings")
        self._ignored += [f"override_settings.{name}" for name in override if name not in SETTINGS]
        if name := override.get("sd_model_checkpoint"):
            if not isinstance(name, str):
                param = "override_settings.sd_model_checkpoint"
                raise InvalidType(f"{param} is {shown(name)}; expected a string.", param=param)
            self._put("model", checkpoint_name(name, self._catalog))
        if wanted := override.get("samples_format"):
            known = _FORMATS.get(wanted) if isinstance(wanted, str) else None
            if known is None:
                param = "override_settings.samples_format"
                raise InvalidValue(f"{param} is {shown(wanted)}; choose one of: {', '.join(_FORMATS)}.", param=param)
            self._put("output_format", known)

    def _put_texts(self) -> None:
        self._put("prompt", self._text("prompt"))
        negative = self._text("negative_prompt")
        if not negative:
            return
        profile = self._find_profile()
        scale = self._number("cfg_scale", profile.preset("high").guidance_scale)
        if profile.takes_negative_prompt and scale > 1:
            self._put("negative_prompt", negative)
        else:
            self._ignored.append("negative_prompt")

    def _put_numbers(self) -> None:
        if self._sent.keys() & {"width", "height"}:
            for name in ("width", "height"):
                self._put(name, self._integer(name, OTHER_SIDE_PX))
        if "steps" in self._sent:
            self._put("steps", self._integer("steps", 0))
        seed = self._sent.get("seed")
        if seed not in (None, ""):
            self._put("seed", self._integer("seed", -1))
        if "cfg_scale" in self._sent:
            self._put("cfg_scale", self._number("cfg_scale", 0))
        if self._endpoint == IMG2IMG and "denoising_strength" in self._sent:
            strength = self._number("denoising_strength", 0)
            # Clients always send it, and cannot leave it out for a model that takes the image as a reference.
            if self._find_profile().takes_strength:
                self._put("denoising_strength", strength)
            else:
                self._ignored.append("denoising_strength")

    def _put_mask(self) -> None:
        """Put the fields of the image and the mask."""
        self._put("resize_mode", self._choice("resize_mode", RESIZE_MODES))
        fill = self._choice("inpainting_fill", FILLS)
        blur = self._integer("mask_blur", max(self._integer("mask_blur_x", 0), self._integer("mask_blur_y", 0)))
        if not self._sent.keys() & {"mask_blur", "mask_blur_x", "mask_blur_y"}:
            blur = self._known["mask_blur"].default
        if not any(upload.name == "mask" for upload in self._uploads):
            self._put("mask_mode", "none")
            return
        self._put("mask_mode", "stencil")
        self._put("mask_invert", self._boolean("inpainting_mask_invert", default=False))
        self._put("mask_fill", fill)
        self._put("mask_blur", blur)
        if self._boolean("inpaint_full_res", default=True):
            self._put("mask_area", "masked")
            self._put("mask_padding", self._integer("inpaint_full_res_padding", 0))

    # --- values, in the types that a client may send them in ----------------------------------------------------------

    def _text(self, name: str) -> str:
        value = self._sent.get(name, "")
        if not isinstance(value, str):
            raise InvalidType(f"{name} is {shown(value)}; expected a string.", param=name)
        return value

    def _integer(self, name: str, default: int) -> int:
        value = self._sent.get(name, default)
        match value:
            case int():
                return int(value)
            case float() if value.is_integer() and abs(value) < 10**MAX_DIGITS:
                return int(value)
            case str() if found := _INTEGER.fullmatch(value):
                return int(found[1])
        raise InvalidType(f"{name} is {shown(value)}; expected a whole number.", param=name)

    def _number(self, name: str, default: float) -> float:
        value = self._sent.get(name, default)
        if isinstance(value, str) and len(value) <= MAX_DIGITS:
            try:
                value = float(value)
            except ValueError:
                pass
            else:
                if math.isfinite(value):
                    return value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            return value
        raise InvalidType(f"{name} is {shown(value)}; expected a number.", param=name)

    def _boolean(self, name: str, *, default: bool) -> bool:
        value = self._sent.get(name, default)
        word = str(value).lower() if isinstance(value, str | bool | int) else ""
        if word not in (*_TRUE, *_FALSE):
            raise InvalidType(f"{name} is {shown(value)}; expected true or false.", param=name)
        return word in _TRUE

    def _choice(self, name: str, choices: Sequence[str]) -> str:
        number = self._integer(name, self._known[name].default)
        if not 0 <= number < len(choices):
            raise UnsupportedParameter(
                f"{name} is {shown(number)}; this server has 0 to {len(choices) - 1}.", param=name
            )
        return choices[number]


def _refusal(known: SdField, value: Any) -> str:
    """Return the message for a refused field, in the words of that API where it has some."""
    if known.name == "script_name":
        return f"Script {shown(value)} not found. {known.text}"
    if known.name == "alwayson_scripts" and isinstance(value, dict):
        names = ", ".join(str(name)[:MAX_IGNORED_CHARS] for name in list(value)[:5])
        return f"always on script {names} not found. {known.text}"
    return f"{known.name} is {shown(value)}, which is not supported. {known.text} Leave it out."
