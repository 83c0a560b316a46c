"""The paths of AUTOMATIC1111's API, and what serves each of them.

    body ──translate──▶ our form ──parameters──▶ Parameters ──Images.admit──▶ job ──events──▶ LiveJobs
                                                                               └──▶ images, parameters, info

Runs in: handler threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ovserve.api.exchange import Exchange, Form, JsonReply
from ovserve.api.images import Images, check_done, client_of, job_backstop, overrun_error
from ovserve.api.parameters.params import parse_parameters
from ovserve.api.parameters.values import shown
from ovserve.api.replies import json_reply
from ovserve.api.sdapi.details import as_detail_error
from ovserve.api.sdapi.embedded import PARAMETERS, parse_infotext, read_texts
from ovserve.api.sdapi.fields import IMG2IMG, TXT2IMG
from ovserve.api.sdapi.live import LiveJob, LiveJobs
from ovserve.api.sdapi.replies import models_document, options_document, pictures_reply, progress_reply
from ovserve.api.sdapi.samplers import samplers_document, schedulers_document
from ovserve.api.sdapi.translate import checkpoint_name, translate
from ovserve.dispatch.jobs import State
from ovserve.errors import ApiError, InvalidType, InvalidValue, ModelNotFound, Unprocessable, UnsupportedMediaType

__all__ = ["SDAPI", "SDAPI_PREFIX", "Endpoint", "SdApi"]

SDAPI_PREFIX = "/sdapi/v1/"
_CHECKPOINT = "sd_model_checkpoint"


class SdApi:
    """Serves the paths. Thread-safe: yes; LiveJobs is the only state."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self._live = LiveJobs()

    def serve(self, endpoint: Endpoint, exchange: Exchange) -> JsonReply:
        """Serve one request. Raises ApiError, with this API's status and names, and ClientGone."""
        try:
            return endpoint.handle(self, exchange)
        except ApiError as error:
            raise as_detail_error(error) from None

    # --- pictures -----------------------------------------------------------------------------------------------------

    def txt2img(self, exchange: Exchange) -> JsonReply:
        """Generate pictures from a prompt."""
        return self._make(exchange, TXT2IMG)

    def img2img(self, exchange: Exchange) -> JsonReply:
        """Edit a picture, or the part of it that a mask selects."""
        return self._make(exchange, IMG2IMG)

    def _make(self, exchange: Exchange, task: str) -> JsonReply:
        images = self._images
        form = _check_json(images.read_form(exchange))
        catalog, settings = images.catalog, images.settings
        translation = translate(form, task, catalog, settings)
        parameters = parse_parameters(
            translation.form, translation.endpoint, None, catalog, settings, requires_prompt=False
        )
        unused = (name.replace("image[", "init_images[") for name in parameters.ignored)
        parameters = replace(parameters, ignored=(*unused, *translation.ignored))
        job = images.admit(exchange, parameters)
        live = LiveJob(job, task)
        try:
            self._live.add(live)
            try:
                self._await(exchange, live)
            finally:
                self._live.remove(live)
            is_interrupted = live.is_interrupted and job.state is State.CANCELLED
            if not is_interrupted:  # else the pictures that are finished are the reply
                check_done(job)
            reply = pictures_reply(job, parameters, translation, is_interrupted=is_interrupted)
            images.end_job(exchange, job)
        except BaseException:
            images.end_job(exchange, job)
            job.close()
            raise
        return reply

    def _await(self, exchange: Exchange, live: LiveJob) -> None:
        """Wait until the job is settled, and keep its progress. Raises DeadlineExceeded and ClientGone."""
        job = live.job
        backstop = job_backstop(job)
        while True:
            events, is_settled = job.take_with_state()
            self._live.note(live, events)
            if is_settled:
                return
            if not exchange.wait(job.wakeup, backstop):
                raise overrun_error()

    # --- the caller's jobs --------------------------------------------------------------------------------------------

    def progress(self, exchange: Exchange) -> JsonReply:
        """Return the progress of the caller's jobs."""
        skips = exchange.query.get("skip_current_image", "false").lower() in ("true", "1")
        return progress_reply(self._live.snapshot(client_of(exchange)), with_image=not skips)

    def interrupt(self, exchange: Exchange) -> JsonReply:
        """End the caller's jobs; their requests are answered with the pictures that are finished."""
        for job in self._live.interrupt(client_of(exchange)):
            self._images.cancel(job)
        return json_reply({})

    # --- what the server has ------------------------------------------------------------------------------------------

    def models(self, _: Exchange) -> JsonReply:
        """Return the models."""
        return json_reply(models_document(self._images.catalog))

    def samplers(self, _: Exchange) -> JsonReply:
        """Return the samplers."""
        return json_reply(samplers_document())

    def schedulers(self, _: Exchange) -> JsonReply:
        """Return the schedulers."""
        return json_reply(schedulers_document())

    def options(self, _: Exchange) -> JsonReply:
        """Return the options."""
        return json_reply(options_document(self._images.catalog))

    def set_options(self, exchange: Exchange) -> JsonReply:
        """Accept the model that is served already; change nothing.

        Raises:
            ModelNotFound: no model has this name.
            InvalidValue: it is another model than that of requests that name none.
        """
        form, catalog = _check_json(exchange.read_form()), self._images.catalog
        name = next((value for key, value in form.fields if key == _CHECKPOINT), None)
        if name in (None, ""):
            return json_reply(None)
        if not isinstance(name, str):
            raise InvalidType(f"{_CHECKPOINT} is {shown(name)}; expected a string.", param=_CHECKPOINT)
        try:
            model = catalog.find(checkpoint_name(name, catalog))
        except ModelNotFound as error:
            raise ModelNotFound(error.message, param=_CHECKPOINT) from None
        if model.name != catalog.default_name:
            raise InvalidValue(
                f"{_CHECKPOINT} is {shown(name)}, and requests that name no model use {catalog.default_name!r}. A "
                f"client cannot change this for the others: send override_settings.{_CHECKPOINT} with each request.",
                param=_CHECKPOINT,
            )
        return json_reply(None)

    def png_info(self, exchange: Exchange) -> JsonReply:
        """Return the text in an image file, and its fields. Raises Unprocessable without an image."""
        form = _check_json(exchange.read_form())
        upload = next((upload for upload in form.uploads if upload.name == "image"), None)
        if upload is None:
            # Not InvalidType, in which `image` would be our field of that name: their `init_images`.
            message = "image is missing or no image; expected base64 or a data URL."
            raise Unprocessable(message, param="image", kind=str(InvalidType.code))
        with upload.view() as view:
            texts = read_texts(view)
        info = texts.pop(PARAMETERS, "")
        return json_reply({"info": info, "items": texts, "parameters": parse_infotext(info) if info else {}})


def _check_json(form: Form) -> Form:
    if not form.is_json:
        raise UnsupportedMediaType("The body is a multipart form; expected application/json.")
    return form


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path: method, name after SDAPI_PREFIX, description, handler."""

    method: str
    name: str
    text: str
    handle: Callable[[SdApi, Exchange], JsonReply]

    @property
    def path(self) -> str:
        """The whole path."""
        return SDAPI_PREFIX + self.name


SDAPI = (
    Endpoint("POST", "txt2img", "AUTOMATIC1111's API: generate pictures from a prompt.", SdApi.txt2img),
    Endpoint("POST", "img2img", "AUTOMATIC1111's API: edit a picture, or inpaint with a mask.", SdApi.img2img),
    Endpoint(
        "GET",
        "progress",
        "Progress of the caller's txt2img and img2img, with the newest preview unless `skip_current_image`. The caller "
        "is the API key, or without one the address.",
        SdApi.progress,
    ),
    Endpoint(
        "POST",
        "interrupt",
        "End the caller's txt2img and img2img; they are answered with the pictures that are finished.",
        SdApi.interrupt,
    ),
    Endpoint("GET", "sd-models", "The models, with their aliases.", SdApi.models),
    Endpoint("GET", "samplers", "The samplers.", SdApi.samplers),
    Endpoint("GET", "schedulers", "The schedulers.", SdApi.schedulers),
    Endpoint("GET", "options", "The model of requests that name none, and the file format.", SdApi.options),
    Endpoint(
        "POST",
        "options",
        "Accepts the model that `GET options` shows. Changes nothing; other options are ignored.",
        SdApi.set_options,
    ),
    Endpoint("POST", "png-info", "The parameters in an image file.", SdApi.png_info),
)
