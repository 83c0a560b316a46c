"""Which files of a repository are downloaded: those that the server or the conversion reads, and no others.

Formats that can run code when they are read (pickle: .bin, .pt, .ckpt) and Python files are never selected. OpenVINO's
own `.bin` files hold plain arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ovserve.errors import HubError
from ovserve.hub.listing import Listing, RemoteFile

__all__ = ["INDEX", "is_openvino", "select_adapter", "select_model", "select_source"]

INDEX = "model_index.json"
SAFETENSORS = ".safetensors"
_IR = re.compile(r"openvino_[A-Za-z0-9_]+\.(?:xml|bin)")
_SMALL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.(?:json|txt|model|jinja)")
_VARIANT = re.compile(r"\.(?:fp16|bf16|fp32|non_ema|ema)[.-]")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_SMALL_BYTES = 64 * 1024 * 1024  # a tokenizer's vocabulary takes a few


def is_openvino(listing: Listing) -> bool:
    """Return whether a repository is an image pipeline exported for OpenVINO. Raises HubError if it is no pipeline."""
    if INDEX not in listing.files:
        raise HubError(
            f"{listing.repository} has no {INDEX}: it is not an image pipeline in diffusers layout"
            + ("; to download an adapter, use --lora" if any(map(_is_weights, listing.files)) else "")
        )
    return any(path.endswith("/openvino_model.xml") for path in listing.files)


def _is_weights(path: str) -> bool:
    return path.endswith(SAFETENSORS)


def _components(listing: Listing) -> Iterable[tuple[str, str, RemoteFile]]:
    """Yield component, file name and file for each file of a component."""
    for path, file in listing.files.items():
        component, slash, name = path.partition("/")
        if slash and "/" not in name and not component.startswith("."):
            yield component, name, file


def _with_sums(files: list[RemoteFile], listing: Listing) -> list[RemoteFile]:
    """Return the files, largest first. Raises HubError for one without a sum."""
    for file in files:
        if not file.sha256 and not file.blob_id:
            raise HubError(f"{listing.repository}: the hub lists {file.path!r} without a sum to check it by")
    return sorted(files, key=lambda file: (-file.size, file.path))


def _small_files(listing: Listing) -> list[RemoteFile]:
    found = [listing.files[INDEX]]
    found += [file for _, name, file in _components(listing) if _SMALL.fullmatch(name) and file.size <= MAX_SMALL_BYTES]
    return found


def select_model(listing: Listing) -> list[RemoteFile]:
    """Return the files of an OpenVINO export. Raises HubError."""
    own = [listing.files["ovserve.json"]] if "ovserve.json" in listing.files else []
    weights = [file for _, name, file in _components(listing) if _IR.fullmatch(name)]
    return _with_sums([*own, *_small_files(listing), *weights], listing)


def select_source(listing: Listing) -> list[RemoteFile]:
    """Return the files of a PyTorch pipeline that the conversion reads: configurations, and weights as safetensors.

    Raises:
        HubError: a component has its weights only in a format that can run code, or only as a variant.
    """
    weights: dict[str, list[RemoteFile]] = {}
    others: dict[str, str] = {}  # component to a file that cannot be used
    for component, name, file in _components(listing):
        if name.endswith(SAFETENSORS) and not _VARIANT.search(name):
            weights.setdefault(component, []).append(file)
        elif name.endswith((SAFETENSORS, *_PICKLED)) and not name.startswith("openvino_"):
            others.setdefault(component, file.path)
    skipped = ("safety_checker", "feature_extractor")  # the conversion leaves them out
    for component, path in others.items():
        if component not in weights and component not in skipped:
            why = "a format that can run code" if path.endswith(_PICKLED) else "a variant of the weights"
            raise HubError(
                f"{listing.repository}: component {component!r} has no plain safetensors file, only {path} ({why}); "
                "convert it by hand, or use another repository"
            )
    if not weights:
        raise HubError(f"{listing.repository} has no weights as safetensors")
    files = [file for component, found in weights.items() if component not in skipped for file in found]
    return _with_sums([*_small_files(listing), *files], listing)


def select_adapter(listing: Listing, name: str) -> RemoteFile:
    """Return the file of an adapter: the named one, or the only safetensors file. Raises HubError."""
    found = [path for path in listing.files if _is_weights(path)]
    if name:
        if not _is_weights(name):
            raise HubError(f"{listing.repository}: {name!r} is no .safetensors file; other formats can run code")
        if name not in found:
            raise HubError(f"{listing.repository} has no {name!r}; it has {_listed(found)}")
        return _with_sums([listing.files[name]], listing)[0]
    if len(found) != 1:
        raise HubError(
            f"{listing.repository} has {_listed(found)}; choose one: {listing.repository}@FILE"
            if found
            else f"{listing.repository} has no .safetensors file"
        )
    return _with_sums([listing.files[found[0]]], listing)[0]


def _listed(paths: list[str]) -> str:
    """Return paths for a message."""
    return (", ".join(sorted(paths)[:10]) + (f" and {len(paths) - 10} more" if len(paths) > 10 else "")) or "none"
