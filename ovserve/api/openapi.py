"""The OpenAPI 3.1 document of this API, made from the table of fields and the table of routes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Protocol

from ovserve import __version__
from ovserve.api.parameters.fields import EDIT, ENDPOINTS, FIELDS, GENERATION, VARIATION, Field
from ovserve.api.sdapi.endpoints import SDAPI_PREFIX
from ovserve.api.sdapi.fields import ENDPOINTS as SDAPI_ENDPOINTS
from ovserve.api.sdapi.fields import fields_of

__all__ = ["openapi_document"]


class _Row(Protocol):
    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def prefixed(self) -> bool: ...
    @property
    def is_open(self) -> bool: ...


_PATHS = {"/images/edits": EDIT, "/images/generations": GENERATION, "/images/variations": VARIATION}
_SIZE = "^(auto|[1-9][0-9]{0,4}[xX*\u00d7][1-9][0-9]{0,4})$"


def _schema(field: Field, *, is_json: bool) -> dict[str, Any]:
    """Return one field's JSON schema. In a multipart form the value is the text of it."""
    schema: dict[str, Any]
    match field.kind:
        case "integer" | "number":
            schema = {"type": field.kind}
            if field.low is not None:
                schema["minimum"] = field.low
            if field.high is not None:
                schema["maximum"] = field.high
        case "boolean":
            schema = {"type": "boolean"}
        case "choice":
            schema = {"type": "string", "enum": list(field.choices)}
        case "size":
            schema = {"type": "string", "pattern": _SIZE}
        case "file" | "files" if is_json:
            schema = {"type": "object", "properties": {"image_url": {"type": "string", "description": "A data: URL."}}}
        case "file" | "files":
            schema = {"type": "string", "format": "binary"}
        case "object" if is_json:
            schema = {"type": "object", "additionalProperties": {"type": "number"}}
        case _:
            schema = {"type": "string"}
    default = f" Default: {field.shown_default}." if field.shown_default else ""
    return {**schema, "description": field.text + default}


def _body(endpoint: str) -> dict[str, Any]:
    """Return the request body object: the fields as multipart form and, except for variations, as JSON."""
    contents = {}
    kinds = (("multipart/form-data", False), ("application/json", True))
    for media_type, is_json in kinds if endpoint != VARIATION else kinds[:1]:
        accepted = [field for field in FIELDS.values() if field.served and endpoint in field.endpoints]
        properties = {field.name: _schema(field, is_json=is_json) for field in accepted}
        required = sorted(field.name for field in accepted if endpoint in field.required)
        if is_json and "image" in properties:
            properties["images"] = {"type": "array", "items": properties.pop("image"), "minItems": 1}
            required = ["images" if name == "image" else name for name in required]
        contents[media_type] = {"schema": {"type": "object", "properties": properties, "required": required}}
    return {"required": True, "content": contents}


_ERROR = {
    "description": "Error; `param` is the field at fault.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
_DETAIL = {
    "description": "Error; `detail` is the message, or a list with the fields at fault.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Detail"}}},
}
_SCHEMES = {
    "basic": {"type": "http", "scheme": "basic", "description": "The key is the password; any user name."},
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "api-key"},
}
_SD_STATUSES = (
    *("400", "403", "404", "408", "411", "413", "414", "415", "417", "421", "422"),
    *("429", "500", "503", "504"),
)
_STATUSES = ("400", "403", "404", "408", "411", "413", "414", "415", "417", "421", "429", "500", "503", "504")


def _picture_replies() -> dict[str, Any]:
    return {
        "200": {
            "description": "The pictures, or events if `stream` is true.",
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/ImagesResponse"}},
                "text/event-stream": {"schema": {"type": "string"}},
            },
        },
        **dict.fromkeys(_STATUSES, _ERROR),
    }


_SD_TYPES: dict[str, dict[str, Any]] = {
    "text": {"type": ["string", "null"]},
    "integer": {"type": ["integer", "string", "null"]},
    "number": {"type": ["number", "string", "null"]},
    "boolean": {"type": ["boolean", "integer", "string", "null"]},
    "list": {"type": ["array", "null"]},
    "object": {"type": ["object", "null"]},
    "picture": {"type": ["string", "null"], "description": "base64, or a data: URL."},
    "pictures": {"type": "array", "items": {"type": "string"}, "minItems": 1},
}


def _sdapi_operation(path: str, method: str) -> dict[str, Any]:
    """Return request body and responses of a path of AUTOMATIC1111's API."""
    name = path.removeprefix(SDAPI_PREFIX)
    required: list[str] = []
    properties: dict[str, Any] = {}
    result: dict[str, Any] = {}
    if name in SDAPI_ENDPOINTS:
        for field in fields_of(name).values():
            text = " ".join(filter(None, (f"{field.use.capitalize()}.", field.text)))
            properties[field.name] = {**_SD_TYPES[field.kind], "description": text}
        required = ["init_images"] if "init_images" in properties else []
        result = {"$ref": "#/components/schemas/SdImages"}
    elif name == "png-info":
        properties, required = {"image": {"type": "string"}}, ["image"]
    elif name == "options":
        properties = {"sd_model_checkpoint": {"type": ["string", "null"]}}
    reply = {"description": "See the summary.", "content": {"application/json": {"schema": result}}}
    operation: dict[str, Any] = {"responses": {"200": reply, **dict.fromkeys(_SD_STATUSES, _DETAIL)}}
    if properties and method == "POST":
        schema = {"type": "object", "properties": properties, "required": required}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _components() -> dict[str, Any]:
    text, nullable = {"type": "string"}, {"type": ["string", "null"]}
    error = {
        "type": "object",
        "properties": {"message": text, "type": text, "param": nullable, "code": nullable},
        "required": ["message", "type", "param", "code"],
    }
    picture = {
        "type": "object",
        "properties": {"b64_json": text, "url": text, "seed": {"type": "integer"}, "revised_prompt": text},
        "required": ["seed"],
    }
    images = {
        "type": "object",
        "properties": {
            "created": {"type": "integer"},
            "model": text,
            "size": text,
            "quality": {"type": "string", "enum": ["low", "medium", "high"]},
            "background": {"type": "string", "enum": ["opaque", "transparent"]},
            "output_format": {"type": "string", "enum": ["png", "jpeg", "webp"]},
            "data": {"type": "array", "items": picture},
            "ignored": {
                "type": "array",
                "items": text,
                "description": "Names of what the request contains and was not used.",
            },
            "usage": {"type": "object"},
        },
        "required": ["created", "data", "usage"],
    }
    return {
        "schemas": {
            "Error": {"type": "object", "properties": {"error": error}, "required": ["error"]},
            "Detail": {
                "type": "object",
                "properties": {"error": nullable, "detail": {"type": ["string", "array"]}, "errors": text},
                "required": ["error", "detail", "errors"],
            },
            "ImagesResponse": images,
            "SdImages": {
                "type": "object",
                "properties": {
                    "images": {"type": "array", "items": text},
                    "parameters": {"type": "object"},
                    "info": {"type": "string", "description": "JSON as text."},
                },
                "required": ["images", "parameters", "info"],
            },
        },
        "securitySchemes": _SCHEMES,
    }


def openapi_document(routes: Iterable[_Row]) -> dict[str, Any]:
    """Return the document. Paths are given under /v1; other prefixes work alike."""
    paths: dict[str, dict[str, Any]] = {}
    for row in routes:
        path = ("/v1" if row.prefixed else "") + row.path
        operation: dict[str, Any] = {"summary": row.text, "responses": {"200": {"description": "See the summary."}}}
        endpoint = next((kind for end, kind in _PATHS.items() if row.path.endswith(end)), None)
        if row.path.startswith(SDAPI_PREFIX):
            operation |= _sdapi_operation(row.path, row.method)
        elif endpoint in ENDPOINTS and row.method == "POST":
            operation |= {"requestBody": _body(str(endpoint)), "responses": _picture_replies()}
        else:
            operation["responses"] |= {
                **dict.fromkeys(("400", "403", "404", "414", "421"), _ERROR),
                "503": {"description": "Not ready."},
            }
            if row.path.startswith("/images/files/"):
                operation["responses"] |= {
                    "206": {"description": "The requested range."},
                    "304": {"description": "Not modified."},
                    "416": _ERROR,
                }
        if row.is_open:
            operation["security"] = []
        else:
            operation["responses"] |= {"401": _DETAIL if row.path.startswith(SDAPI_PREFIX) else _ERROR}
        names = re.findall(r"\{(\w+)\}", row.path)
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        paths.setdefault(path, {})[row.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ovserve",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "security": [{scheme: []} for scheme in _SCHEMES] + [{}],  # {}: a server without keys requires none
        "components": _components(),
    }
