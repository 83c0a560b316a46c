"""The exception tree. Each class has its HTTP status and public error code.

    OvserveError
    ├── StartupError                  the process cannot start: one line on standard error, an exit code of cli.commands
    │   ├── SettingsError             an option, the environment or the configuration file is wrong
    │   ├── ModelError                a model directory is wrong or incomplete
    │   ├── HubError                  a model hub refuses, sends something wrong, or cannot be reached
    │   └── ModelsFailed              no model could be loaded
    ├── ClientGone                    the client closed its connection: no response is sent
    ├── BlobGone                      a worker opens a blob whose exchange has ended
    ├── LaunchError                   a worker cannot be started now: no descriptors, memory, process ids or places left
    │   └── ClusterLost               another cluster has come in the place of the one that was connected
    ├── LinkClosed                    the other side of a link is gone: end-of-file or a broken pipe
    ├── LinkGarbage                   the other side of a link broke the protocol
    └── ApiError                      becomes a response: OpenAI's error object with `status`
        ├── BadRequest                400 and its kinds: MalformedRequest, MissingParameter, InvalidValue, ...
        ├── 401 .. 431                Unauthorized, NotFound, MethodNotAllowed, RequestTimeout, ContentTooLarge, ...
        └── ServerError               500 and its kinds: WorkerCrashed, NotReady, SpoolFull, DeadlineExceeded, ...

An error is raised where it is found and becomes a response in one place, `front.handler`. A worker sends an error over
its link as class name and arguments (`to_wire`); `from_wire` restores it. Messages are never compared.

The official OpenAI clients retry 408, 409, 429 and every 5xx twice. A client's own mistake therefore never gets one of
these statuses.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = [
    "ApiError",
    "BadRequest",
    "BlobGone",
    "ClientGone",
    "ClusterLost",
    "ContentTooLarge",
    "DeadlineExceeded",
    "Draining",
    "ExpectationFailed",
    "FieldsTooLarge",
    "Forbidden",
    "HttpVersionNotSupported",
    "HubError",
    "ImageError",
    "InternalError",
    "InvalidType",
    "InvalidValue",
    "LaunchError",
    "LengthRequired",
    "LinkClosed",
    "LinkGarbage",
    "MalformedRequest",
    "MethodNotAllowed",
    "MisdirectedRequest",
    "MissingParameter",
    "ModelError",
    "ModelFailed",
    "ModelNotFound",
    "ModelsFailed",
    "NotFound",
    "NotImplementedMethod",
    "NotReady",
    "OvserveError",
    "PartTooLarge",
    "PromptTooLong",
    "QueueFull",
    "RangeNotSatisfiable",
    "RateLimited",
    "RequestTimeout",
    "ServerError",
    "SettingsError",
    "SpoolFull",
    "SpoolUnusable",
    "StartupError",
    "StoreFull",
    "StoreUnusable",
    "TargetTooLong",
    "TooManyConnections",
    "TooManyParts",
    "Unauthorized",
    "UnknownParameter",
    "Unprocessable",
    "UnsupportedMediaType",
    "UnsupportedParameter",
    "WorkerCrashed",
    "from_wire",
    "may_pass",
]

MESSAGE_LIMIT_CHARS = 1000  # an error crosses a link in one message of at most 4096 bytes; no reader wants more
RETRY_AFTER_RANGE_S = (1, 60)  # official clients ignore, or sleep out, anything beyond a minute


class OvserveError(Exception):
    """The root of everything ovserve raises on purpose."""


class StartupError(OvserveError):
    """The process cannot start. The message is one line for the operator.

    Attributes:
        is_transient: a later start may succeed with the same configuration, e.g. when a port is free again.
    """

    def __init__(self, message: str, *, is_transient: bool = False) -> None:
        super().__init__(message)
        self.is_transient = is_transient


class SettingsError(StartupError):
    """An option, an environment variable or the configuration file is wrong."""


class ModelError(StartupError):
    """A model directory is wrong or incomplete."""


class HubError(StartupError):
    """A model hub refuses, sends something wrong, or cannot be reached; or what it holds cannot be used.

    Attributes:
        retry_after_s: the time after which the hub asks to try again; None: it names none.
        status: the status code of its response; 0: there was none.
    """

    def __init__(self, message: str, *, is_transient: bool = False) -> None:
        super().__init__(message, is_transient=is_transient)
        self.retry_after_s: float | None = None
        self.status = 0


class ModelsFailed(StartupError):
    """No model could be loaded and warmed up."""


_PASSING_ERRNOS = frozenset({
    errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO,
    errno.ETIMEDOUT,  # a file system or device that is not there yet
    errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBUSY, errno.ENOBUFS,
    errno.EADDRINUSE, errno.EADDRNOTAVAIL,  # an interface that has no address yet
})  # fmt: skip


def may_pass(error: OSError) -> bool:
    """Return whether an error of a system call may be gone at a later start, with the same configuration."""
    if isinstance(error, socket.gaierror):  # its errno is an EAI number
        return error.errno == socket.EAI_AGAIN
    return error.errno in _PASSING_ERRNOS


class ClientGone(OvserveError):
    """The client closed its connection while its request was in flight. Logged as status 499; no response is sent."""


class BlobGone(OvserveError):
    """A worker opens a blob whose exchange has ended, so that its storage was released."""


class LaunchError(OvserveError):
    """A launcher cannot start a worker now. The message is the reason for the log; a later attempt may succeed."""


class ClusterLost(LaunchError):
    """The cluster is no longer the one that the connection was made to."""


class LinkClosed(OvserveError):
    """The other side of a link is gone: end-of-file or a broken pipe."""


class LinkGarbage(OvserveError):
    """The other side of a link broke the protocol: a line that is not a message, or one that does not fit the state."""


class ApiError(OvserveError):
    """An error that becomes an HTTP response.

    Args:
        message: what is wrong, for a person; it names the field when there is one.
        param: the field at fault, as the client spelled it.
        retry_after_s: seconds for the Retry-After field, clamped to 1..60; None: no such field.
        headers: further response fields, e.g. Allow.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    should_retry: ClassVar[bool | None] = None  # the x-should-retry field; None: the client decides by status
    closes_connection: ClassVar[bool] = False  # the following bytes cannot be trusted to begin a request

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
        """Return the text for a person."""
        return str(self.args[0])

    def to_wire(self) -> dict[str, Any]:
        """Return the class name and its arguments as plain data for one link message."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "param": self.param,
            "retry_after_s": self.retry_after_s,
        }

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object. It always has all four keys."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


def clamp_retry_after(seconds: float) -> int:
    """Round the seconds to a whole number within 1..60."""
    low, high = RETRY_AFTER_RANGE_S
    return max(low, min(high, round(seconds)))


# --- 4xx: the client's fault ------------------------------------------------------------------------------------------


class BadRequest(ApiError):
    """400: the request cannot be served as it stands."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class MalformedRequest(BadRequest):
    """400: the message framing or its syntax is wrong (RFC 9112); the connection is closed."""

    code = "malformed_request"
    closes_connection = True


class MissingParameter(BadRequest):
    """400: a required field is absent or empty."""

    code = "missing_required_parameter"


class InvalidValue(BadRequest):
    """400: a field's value is outside its range or its choices."""

    code = "invalid_value"


class InvalidType(BadRequest):
    """400: a field's value has the wrong type."""

    code = "invalid_type"


class UnknownParameter(BadRequest):
    """400: no field has this name."""

    code = "unknown_parameter"


class UnsupportedParameter(BadRequest):
    """400: the field is known, but this endpoint or model does not take it."""

    code = "unsupported_parameter"


class ImageError(BadRequest):
    """400: an upload cannot be read as an image."""

    code = "invalid_image_file"


class PromptTooLong(BadRequest):
    """400: the prompt has more tokens than the model's window."""

    code = "prompt_too_long"


class TooManyParts(BadRequest):
    """400: the form has more parts or fields than the limit."""

    code = "too_many_parts"
    closes_connection = True


class PartTooLarge(BadRequest):
    """413: one field or part is over its limit."""

    status = 413
    code = "part_too_large"
    closes_connection = True


class Unprocessable(BadRequest):
    """422: like 400, on the paths of AUTOMATIC1111's API, whose clients expect this status for a wrong field.

    Attributes:
        kind: the code of the error that it stands for.
    """

    status = 422
    code = "unprocessable"

    def __init__(self, message: str, *, param: str | None = None, kind: str = "invalid_request", **others: Any) -> None:
        super().__init__(message, param=param, **others)
        self.kind = kind


class Unauthorized(ApiError):
    """401: the API key is missing or unknown."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(ApiError):
    """403: the request needs an admin key or the admin listener, or comes from a web page of a foreign origin."""

    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class NotFound(ApiError):
    """404: unknown path."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """404: unknown model."""

    code = "model_not_found"


class MethodNotAllowed(ApiError):
    """405: the path exists, the method does not; carries Allow."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(ApiError):
    """408: the head or the body arrived too slowly."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
    closes_connection = True


class LengthRequired(ApiError):
    """411: a request with a body has neither Content-Length nor Transfer-Encoding."""

    status = 411
    type = "invalid_request_error"
    code = "length_required"
    closes_connection = True


class ContentTooLarge(ApiError):
    """413: the body is over the limit, or the request and its results are larger than the spool."""

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
    """415: this path does not take this Content-Type or Content-Encoding."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_content_type"


class RangeNotSatisfiable(ApiError):
    """416: the Range lies outside the file; carries Content-Range."""

    status = 416
    type = "invalid_request_error"
    code = "range_not_satisfiable"


class MisdirectedRequest(ApiError):
    """421: the Host field names a host that this server does not serve."""

    status = 421
    type = "invalid_request_error"
    code = "misdirected_request"


class ExpectationFailed(ApiError):
    """417: the Expect field is not 100-continue."""

    status = 417
    type = "invalid_request_error"
    code = "expectation_failed"
    closes_connection = True


class QueueFull(ApiError):
    """429: the model's queue is at its limit; Retry-After estimates when there is space."""

    status = 429
    type = "requests"
    code = "queue_full"
    should_retry = True


class RateLimited(ApiError):
    """429: the API key has reached one of its limits; Retry-After is when it has room again."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"
    should_retry = True


class FieldsTooLarge(ApiError):
    """431: one field line, or all together, are over the limit."""

    status = 431
    type = "invalid_request_error"
    code = "request_header_fields_too_large"
    closes_connection = True


# --- 5xx: the server's fault
# -------------------------------------------------------------------------------------------------


class ServerError(ApiError):
    """500: a fault of the server."""

    status = 500
    type = "server_error"
    code = "internal_error"


class InternalError(ServerError):
    """500: a bug in the server. The log has the traceback with the request id."""


class WorkerCrashed(ServerError):
    """500: two workers died while they ran this job; it is not tried again."""

    code = "worker_crashed"
    should_retry = False


class ReloadFailed(ServerError):
    """500: the workers of a reload have failed; the old ones stay. The message has the reason."""

    code = "reload_failed"
    should_retry = False


class NotImplementedMethod(ServerError):
    """501: the server does not implement this method for any path (RFC 9110 section 15.6.2)."""

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
    """503: the model has failed; the message has the reason."""

    code = "model_failed"


class Draining(NotReady):
    """503: the server is shutting down and accepts no new jobs."""

    code = "draining"


class TooManyConnections(ServerError):
    """503: the maximum number of connections is reached."""

    status = 503
    code = "too_many_connections"
    closes_connection = True


class SpoolFull(ServerError):
    """503: no space in the spool for the upload or the result, or no file descriptor left for one of them."""

    status = 503
    code = "spool_full"


class SpoolUnusable(ServerError):
    """503: no file can be created in the spool directory; the message and the health replies have the reason."""

    status = 503
    code = "spool_unusable"


class StoreFull(ServerError):
    """503: no space in `store_dir` for a picture of response_format=url."""

    status = 503
    code = "store_full"


class StoreUnusable(ServerError):
    """503: `store_dir` cannot be written; the message has the reason."""

    status = 503
    code = "store_unusable"


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
    """Restore an error from the record of `to_wire`; an unknown class becomes InternalError."""
    kind = _tree(ApiError).get(str(record.get("error")), InternalError)
    param = record.get("param")
    retry = record.get("retry_after_s")
    return kind(
        str(record.get("message", "")),
        param=param if isinstance(param, str) else None,
        retry_after_s=retry if isinstance(retry, int | float) else None,
    )
