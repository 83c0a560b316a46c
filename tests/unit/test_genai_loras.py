"""Engine `genai` refuses LoRA adapters, which the library would ignore in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovserve.engines.genai import GenaiEngine
from ovserve.errors import ModelError
from ovserve.models.profile import read_profile
from ovserve.settings.loras import LoraSettings
from tests.pictures import directory_of, settings_of

pytestmark = pytest.mark.engine


def test_model_with_adapters_is_refused() -> None:
    settings = settings_of(directory_of("sd"), lora=(LoraSettings(alias="a", path=Path(__file__)),))
    engine = GenaiEngine(read_profile(settings), settings)
    with pytest.raises(ModelError, match="engine genai does not apply LoRA adapters reliably; use stepwise"):
        engine.load(lambda _phase: None)
