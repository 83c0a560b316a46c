"""The exceptions a caller can meet, each of which knows its HTTP status and public code.

    OvserveError
    ├── StartupError                  the process cannot start: one line for the operator, exit code 2
    │   ├── SettingsError             an option, the environment or the configuration file is wrong
    │   └── ModelError                a model directory is wrong or incomplete
    ├── ClientGone                    the client closed its connection: nothing is answered
    ├── LinkClosed                    the other side of a link is gone: end-of-file or a broken pipe
    ├── LinkGarbage                   the other side of a link sent something that is no message
    └── ApiError                      becomes an answer: OpenAI's error object with `status`
        ├── BadRequest                400 and its kinds: MalformedRequest, MissingParameter, InvalidValue, ...
        ├── 401 .. 431                Unauthorized, NotFound, MethodNotAllowed, RequestTimeout, ContentTooLarge, ...
        └── ServerError               500 and its kinds: WorkerCrashed, NotReady, SpoolFull, DeadlineExceeded, ...

An error is raised deep and turned into a response in one place, `front.handler`. A worker sends an error over its link as the
class name and its arguments (`to_wire`); `from_wire` makes it an object again. Nothing is ever compared by message.

Statuses follow what the official OpenAI clients do with them: 408, 409, 429 and every 5xx are retried twice, so a client's own
mistake never gets one of those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = [
    "ApiError",
    "BadRequest",
    "ClientGone",
    "ContentTooLarge",
    "DeadlineExceeded",
    "Draining",
    "ExpectationFailed",
    "FieldsTooLarge",
    "Forbidden",
    "HttpVersionNotSupported",
    "ImageError",
    "InternalError",
    "InvalidType",
    "InvalidValue",
    "LengthRequired",
    "LinkClosed",
    "LinkGarbage",
    "MalformedRequest",
    "MethodNotAllowed",
    "MissingParameter",
    "ModelError",
    "ModelFailed",
    "ModelNotFound",
    "NotFound",
    "NotImplementedMethod",
    "NotReady",
    "OvserveError",
    "PartTooLarge",
    "PromptTooLong",
    "QueueFull",
    "RangeNotSatisfiable",
    "RequestTimeout",
    "ServerError",
    "SettingsError",
    "SpoolFull",
    "SpoolUnusable",
    "StartupError",
    "TargetTooLong",
    "TooManyConnections",
    "TooManyParts",
    "Unauthorized",
    "UnknownParameter",
    "UnsupportedMediaType",
    "UnsupportedParameter",
    "WorkerCrashed",
    "from_wire",
]

MESSAGE_LIMIT_CHARS = 1000  # an error crosses a link in one message of at most 4096 bytes; no reader wants more
RETRY_AFTER_RANGE_S = (1, 60)  # official clients ignore, or sleep out, anything beyond a minute


class OvserveError(Exception):
    """The root of everything ovserve raises on purpose."""


class StartupError(OvserveError):
    """The process cannot start. The message is one line for the operator."""


class SettingsError(StartupError):
    """An option, an environment variable or the configuration file is wrong."""


class ModelError(StartupError):
    """A model directory is wrong or incomplete."""


class ClientGone(OvserveError):
    """The client closed its connection while its request was in flight. Logged as 499, never answered."""


class LinkClosed(OvserveError):
    """The other side of a link is gone: end-of-file or a broken pipe."""


class LinkGarbage(OvserveError):
    """The other side of a link sent something that is no message."""


class ApiError(OvserveError):
    """An error that becomes an HTTP answer.

    Args:
        message: what is wrong, for a person; names the field when there is one.
        param: the field at fault, as the client spelled it.
        retry_after_s: seconds for the Retry-After field, clamped to 1..60; None sends no such field.
        headers: further response fields, e.g. Allow.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    should_retry: ClassVar[bool | None] = None  # the x-should-retry field; None leaves it to the client's own rule
    closes_connection: ClassVar[bool] = False  # the rest of the connection cannot be trusted to be a request

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message[:MESSAGE_LIMIT_CHARS])
        self.param = param
        self.retry_after_s = None if retry_after_s is None else clamp_retry_after(retry_after_s)
        self.headers: dict[str, str] = dict(headers or {})

    @property
    def message(self) -> str:
        """The text for a person."""
        return str(self.args[0])

    def to_wire(self) -> dict[str, Any]:
        """The class name and its arguments, as plain data for one link message."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "param": self.param,
            "retry_after_s": self.retry_after_s,
        }

    def body(self) -> dict[str, Any]:
        """OpenAI's error object: all four keys, always."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


def clamp_retry_after(seconds: float) -> int:
    """Seconds as a whole number within 1..60."""
    low, high = RETRY_AFTER_RANGE_S
    return max(low, min(high, round(seconds)))


# --- 4xx: the client's side -------------------------------------------------------------------------------------------


class BadRequest(ApiError):
    """400: the request cannot be served as it stands."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class MalformedRequest(BadRequest):
    """400: the message framing or its syntax is wrong (RFC 9112), and the connection with it."""

    code = "malformed_request"
    closes_connection = True


class MissingParameter(BadRequest):
    """400: a required field is absent or empty."""

    code = "missing_required_parameter"


class InvalidValue(BadRequest):
    """400: a field's value is outside its range or its choices."""

    code = "invalid_value"


class InvalidType(BadRequest):
    """400: a field's value is of another type than the field."""

    code = "invalid_type"


class UnknownParameter(BadRequest):
    """400: no field has this name."""

    code = "unknown_parameter"


class UnsupportedParameter(BadRequest):
    """400: the field is known, and this endpoint or model does not take it."""

    code = "unsupported_parameter"


class ImageError(BadRequest):
    """400: an upload is not an image that can be read."""

    code = "invalid_image_file"


class PromptTooLong(BadRequest):
    """400: the prompt has more tokens than the model's window."""

    code = "prompt_too_long"


class TooManyParts(BadRequest):
    """400: the form has more parts or fields than the limit."""

    code = "too_many_parts"
    closes_connection = True


class PartTooLarge(BadRequest):
    """413: one field or part is over its own limit."""

    status = 413
    code = "part_too_large"
    closes_connection = True


class Unauthorized(ApiError):
    """401: no key, or a wrong one."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(ApiError):
    """403: only the machine itself may do this."""

    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class NotFound(ApiError):
    """404: no such path."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """404: no such model."""

    code = "model_not_found"


class MethodNotAllowed(ApiError):
    """405: the path exists, the method does not; carries Allow."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(ApiError):
    """408: the head or the body came too slowly."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
    closes_connection = True


class LengthRequired(ApiError):
    """411: a body without any framing."""

    status = 411
    type = "invalid_request_error"
    code = "length_required"
    closes_connection = True


class ContentTooLarge(ApiError):
    """413: the body is over the limit, or the request with its results over what the spool can hold."""

    status = 413
    type = "invalid_request_error"
    code = "content_too_large"
    closes_connection = True


class TargetTooLong(ApiError):
    """414: the request line is over the limit."""

    status = 414
    type = "invalid_request_error"
    code = "uri_too_long"
    closes_connection = True


class UnsupportedMediaType(ApiError):
    """415: a Content-Type (or Content-Encoding) that this path does not take."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_content_type"


class RangeNotSatisfiable(ApiError):
    """416: a Range that lies outside the file; carries Content-Range."""

    status = 416
    type = "invalid_request_error"
    code = "range_not_satisfiable"


class ExpectationFailed(ApiError):
    """417: an Expect field that is not 100-continue."""

    status = 417
    type = "invalid_request_error"
    code = "expectation_failed"
    closes_connection = True


class QueueFull(ApiError):
    """429: the model's queue is at its limit; Retry-After tells when a place is likely."""

    status = 429
    type = "requests"
    code = "queue_full"
    should_retry = True


class FieldsTooLarge(ApiError):
    """431: field lines over the limit, one or all together."""

    status = 431
    type = "invalid_request_error"
    code = "request_header_fields_too_large"
    closes_connection = True


# --- 5xx: our side ----------------------------------------------------------------------------------------------------


class ServerError(ApiError):
    """500: the fault is ours."""

    status = 500
    type = "server_error"
    code = "internal_error"


class InternalError(ServerError):
    """500: a bug. The log has the traceback under the request id."""


class WorkerCrashed(ServerError):
    """500: two workers died with this job; a third try would take another one down."""

    code = "worker_crashed"
    should_retry = False


class NotImplementedMethod(ServerError):
    """501: a method this server does not know at all (RFC 9110 section 15.6.2)."""

    status = 501
    type = "invalid_request_error"
    code = "method_not_implemented"
    should_retry = False
    closes_connection = True


class NotReady(ServerError):
    """503: the model is loading or restarting."""

    status = 503
    code = "model_not_ready"


class ModelFailed(NotReady):
    """503: the model was declared failed; the message has the reason."""

    code = "model_failed"


class Draining(NotReady):
    """503: the server is going down and takes no new jobs."""

    code = "draining"


class TooManyConnections(ServerError):
    """503: every connection place is taken."""

    status = 503
    code = "too_many_connections"
    closes_connection = True


class SpoolFull(ServerError):
    """503: no room in the spool directory for the upload or the result, or no descriptor left for one of them."""

    status = 503
    code = "spool_full"


class SpoolUnusable(ServerError):
    """503: no file can be made in the spool directory, whatever its room; the message, and the health documents, say why."""

    status = 503
    code = "spool_unusable"


class DeadlineExceeded(ServerError):
    """504: the job's deadline passed in the queue or on the device."""

    status = 504
    code = "deadline_exceeded"
    should_retry = False


class HttpVersionNotSupported(ServerError):
    """505: an HTTP major version other than 1."""

    status = 505
    type = "invalid_request_error"
    code = "http_version_not_supported"
    should_retry = False
    closes_connection = True


def _tree(root: type[ApiError]) -> dict[str, type[ApiError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def from_wire(record: Mapping[str, Any]) -> ApiError:
    """Make an error again from what `to_wire` gave; an unknown class becomes InternalError."""
    kind = _tree(ApiError).get(str(record.get("error")), InternalError)
    param = record.get("param")
    retry = record.get("retry_after_s")
    return kind(
        str(record.get("message", "")),
        param=param if isinstance(param, str) else None,
        retry_after_s=retry if isinstance(retry, int | float) else None,
    )
