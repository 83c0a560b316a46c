"""Small random models of today's families: archives in `fixtures/packed`, unpacked once for each test process.

`scripts/fixtures/make_packed.py` makes the archives.

Weights are float16. Parts that two models share are in one archive only. A variant is a model whose files differ in a
few values.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["TINY_MODELS", "copy_model", "tiny_model"]

PACKED = Path(__file__).parent / "fixtures" / "packed"
_FLUX_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae_encoder", "vae_decoder", "scheduler")
# Name of an archive to the model and the parts of it that the archive leaves out.
_SHARED = {"fluxfill": ("kontext", _FLUX_PARTS), "sd35": ("kontext", ("vae_encoder", "vae_decoder"))}
# Name of a variant to its model and what differs in model_index.json.
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "kleinbase": ("klein", {"is_distilled": False}),
    "fluxdev": ("kontext", {"_class_name": "FluxPipeline"}),
}
TINY_MODELS = ("klein", "kleinbase", "zimage", "qwen", "kontext", "fluxdev", "fluxfill", "sd35", "ip2p")


@functools.cache
def tiny_model(name: str) -> Path:
    """Return the directory of a model of TINY_MODELS; tests must not write to it."""
    directory = _root() / name
    if name in _VARIANTS:
        base, changes = _VARIANTS[name]
        return copy_model(tiny_model(base), directory, {"model_index.json": changes})
    with tarfile.open(PACKED / f"{name}.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    base, parts = _SHARED.get(name, ("", ()))
    for part in parts:
        (directory / part).symlink_to(tiny_model(base) / part)
    return directory


def copy_model(source: Path, directory: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """Return a copy of a model, by links where nothing differs.

    Args:
        source: the model.
        directory: where to create the copy.
        changes: path of a JSON file in the model to the values that differ in the copy; None removes a key.
    """
    directory.mkdir(parents=True)
    changed = {Path(name).parts[0] for name in changes}
    for part in source.iterdir():
        if part.name not in changed:
            (directory / part.name).symlink_to(part)
        elif part.is_dir():
            (directory / part.name).mkdir()
            for file in part.iterdir():
                (directory / part.name / file.name).symlink_to(file)
    for name, values in changes.items():
        document = json.loads((source / name).read_text("utf-8")) if (source / name).is_file() else {}
        kept = {key: value for key, value in {**document, **values}.items() if value is not None}
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_text(json.dumps(kept), "utf-8")
    return directory


@functools.cache
def _root() -> Path:
    """Return a new folder that the end of the process removes."""
    folder = Path(tempfile.mkdtemp(prefix="ovserve-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
