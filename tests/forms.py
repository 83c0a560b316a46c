"""Forms, uploads and a catalog for tests of the API without a socket."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ovserve.api.parameters.fields import EDIT
from ovserve.api.parameters.params import Parameters, parse_parameters
from ovserve.models.catalog import Catalog, ServedModel
from ovserve.models.profile import read_profile
from ovserve.settings.options import ModelSettings, Settings
from ovserve.wire.blobs import Blob
from tests.live import BUILTIN_PATH

__all__ = ["IMAGE", "FakeForm", "FakeUpload", "catalog", "edit", "encoded"]


@dataclass(frozen=True)
class FakeUpload:
    """An upload in memory."""

    name: str
    data: bytes
    filename: str | None = "picture.png"

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)

    @property
    def blob(self) -> Blob:
        """A blob with no segment behind it."""
        return Blob("nowhere", 0, len(self.data))

    def view(self) -> memoryview:
        """The bytes."""
        return memoryview(self.data)


@dataclass(frozen=True)
class FakeForm:
    """A form in memory."""

    fields: Sequence[tuple[str, Any]] = ()
    uploads: Sequence[FakeUpload] = ()
    is_json: bool = False


def encoded(width: int = 128, height: int = 128, form: str = "PNG", mode: str = "RGB") -> bytes:
    """Return a blank picture as a file."""
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, form)
    return stream.getvalue()


def catalog(*models: ModelSettings, default: str = "") -> Catalog:
    """Return a catalog of the built-in model, or of models with these settings."""
    named = [
        dataclasses.replace(model, path=model.path or Path(BUILTIN_PATH))
        for model in models or [ModelSettings(name="m")]
    ]
    served = [ServedModel(read_profile(model), model) for model in named]
    aliases = {alias: model.name for model in named for alias in model.further_names}
    adapters = frozenset(name for model in named for name in model.adapter_names)
    return Catalog({model.name: model for model in served}, default, aliases, adapters)


IMAGE = FakeUpload("image", encoded())


def edit(
    *fields: tuple[str, Any], uploads: tuple[FakeUpload, ...] = (IMAGE,), endpoint: str = EDIT, **model: Any
) -> Parameters:
    """Validate a form with these fields and uploads for the built-in model, or for a model with these settings."""
    form = FakeForm([("prompt", "a green circle"), *fields], uploads)
    return parse_parameters(form, endpoint, None, catalog(ModelSettings(name="m", **model)), Settings())
