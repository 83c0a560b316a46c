"""What a request contains and a picture does not depend on: served by an option, and named in the reply."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovserve.api.parameters.params import MAX_IGNORED
from ovserve.api.replies import IGNORED_BYTES, ignored_headers
from ovserve.errors import UnknownParameter, UnsupportedParameter
from ovserve.models.classes import CLASSES, Serving
from ovserve.settings.options import Settings
from tests.forms import FakeUpload, edit, encoded
from tests.tinymodels import tiny_model

SECOND = FakeUpload("image[]", encoded(mode="L"))


def test_several_images_are_refused_and_the_message_names_the_option() -> None:
    with pytest.raises(UnsupportedParameter, match="extra_images = first"):
        edit(uploads=(FakeUpload("image[]", encoded()), SECOND))


@pytest.mark.parametrize(
    ("spelled", "ignored"),
    [("image", "image[1]"), ("image[]", "image[1]"), ("images[1]", "images[1]")],
)
def test_first_image_is_used_and_the_others_are_named(spelled: str, ignored: str) -> None:
    first = FakeUpload("image", encoded(200, 100))
    parameters = edit(uploads=(first, FakeUpload(spelled, b"no image")), extra_images="first")
    assert parameters.request.images == (first.blob,)
    assert parameters.ignored == (ignored,)
    assert edit(uploads=(first,), extra_images="first").ignored == ()


def test_unknown_fields_are_ignored_and_named_by_option() -> None:
    sent = (("clip_skip", "2"), ("zz[a]", ""), ("ž" * 200, "1"))
    upload = FakeUpload("depth_map", b"x")
    parameters = edit(*sent, uploads=(FakeUpload("image", encoded()), upload), unknown_fields="ignore")
    assert parameters.ignored == ("clip_skip", "zz[a]", "ž" * 100, "depth_map")
    with pytest.raises(UnknownParameter, match="'clip_skip'"):
        edit(*sent)


def test_fields_that_are_known_and_not_supported_are_never_ignored() -> None:
    with pytest.raises(UnsupportedParameter, match="markup"):
        edit(("markup", "x"), ("zz", "1"), unknown_fields="ignore")


def test_at_most_twenty_names_are_listed() -> None:
    assert Settings().max_images < MAX_IGNORED
    assert len(edit(*((f"z{n}", "1") for n in range(99)), unknown_fields="ignore").ignored) == MAX_IGNORED
    uploads = tuple(FakeUpload("image", encoded()) for _ in range(Settings().max_images))
    assert len(edit(uploads=uploads, extra_images="first").ignored) == len(uploads) - 1


@given(st.lists(st.text(min_size=1, max_size=100), max_size=20))
def test_field_is_short_ascii_and_can_be_decoded(names: list[str]) -> None:
    parameters = replace(edit(), ignored=tuple(names))
    line = ignored_headers(parameters).get("x-ovserve-ignored", "")
    assert len(line) <= IGNORED_BYTES
    assert all("!" <= char <= "~" or char == " " for char in line)
    decoded = [unquote(part, errors="strict") for part in line.split(", ")] if line else []
    assert set(decoded) <= set(names)
    assert len(decoded) == len(names) or len(line) > IGNORED_BYTES - 1200


KLEIN: dict[str, Any] = {"path": tiny_model("klein"), "engine": "genai"}


def test_model_that_takes_references_says_how_many() -> None:
    uploads = (FakeUpload("image[]", encoded()), SECOND)
    with pytest.raises(UnsupportedParameter, match=r"sent 2 times; model 'm' takes 1 reference image\. ") as caught:
        edit(uploads=uploads, **KLEIN)
    assert caught.value.param == SECOND.name
    assert edit(uploads=uploads[:1], **KLEIN).request.images == (uploads[0].blob,)
    first = edit(uploads=uploads, extra_images="first", **KLEIN)
    assert (first.request.images, first.ignored) == ((uploads[0].blob,), ("image[1]",))


def test_images_up_to_the_models_number_are_kept_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    row = CLASSES["Flux2KleinPipeline"]
    serving = replace(row.genai or Serving(frozenset()), references=3)
    monkeypatch.setitem(CLASSES, "Flux2KleinPipeline", replace(row, genai=serving))  # type: ignore[call-overload]
    uploads = tuple(FakeUpload(f"image[{k}]", encoded(64 + k)) for k in range(4))
    assert edit(uploads=uploads[:3], **KLEIN).request.images == tuple(upload.blob for upload in uploads[:3])
    with pytest.raises(UnsupportedParameter, match="at most 3 reference images"):
        edit(uploads=uploads, **KLEIN)
    found = edit(uploads=uploads, extra_images="first", **KLEIN)
    assert (len(found.request.images), found.ignored) == (3, ("image[3]",))


def test_guidance_scale_of_a_model_without_guidance_is_named_as_ignored() -> None:
    assert edit(("cfg_scale", "3"), **KLEIN).ignored == ("cfg_scale",)
    assert edit(("guidance_scale", "3")).ignored == ()
    assert edit(("input_fidelity", "high"), **KLEIN).ignored == ("input_fidelity",)
    assert edit(("input_fidelity", "high")).ignored == ()


def test_input_fidelity_of_a_model_that_takes_several_references_has_an_effect() -> None:
    assert edit(("input_fidelity", "high"), **{**KLEIN, "engine": "stepwise"}).ignored == ()


def test_strength_of_a_model_that_edits_by_reference_is_refused() -> None:
    for name in ("strength", "denoise"):
        with pytest.raises(UnsupportedParameter, match=f"{name} needs an edit that starts from the image") as caught:
            edit((name, "0.5"), **KLEIN)
        assert caught.value.param == name
