"""Uploads on their way to workers: read from the front end's segments, put into Ray's object store once.

A large upload becomes an object when a job is first sent with it, and stays one until its segment is released, so that
another worker gets the same object. Small ones travel inside the command.

Runs in: bridge. Thread-safe: yes, one lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ovserve.errors import BlobGone, LinkGarbage
from ovserve.wire.blobs import Blob
from ovserve.wire.local.blobs import SpoolBlobs
from ovserve.wire.messages import Grant, Run
from ovserve.wire.ray.host import INLINE_BYTES, Part
from ovserve.wire.request import ImageRequest

__all__ = ["Uploads"]


class Uploads:
    """What commands need besides their message.

    Args:
        blobs: access to the front end's segments.
        put: puts bytes into the object store; returns the reference. Its bytes are freed with the last reference.
    """

    def __init__(self, blobs: SpoolBlobs, put: Callable[[bytes], Any]) -> None:
        self._blobs = blobs
        self._put = put
        self._lock = threading.Lock()
        self._objects: dict[Blob, Any] = {}

    @property
    def blobs(self) -> SpoolBlobs:
        """The access to the front end's segments."""
        return self._blobs

    def __len__(self) -> int:
        return len(self._objects)

    def of_run(self, run: Run) -> tuple[list[Part], list[Any]]:
        """Return the parts that a Run needs, and for each its bytes or the reference of its object.

        What was released meanwhile is left out: the worker finds that it is gone.
        """
        parts: list[Part] = []
        data: list[Any] = []
        try:
            encoded = self._blobs.read(run.request)
            parts.append(Part(run.request, 0))
            data.append(encoded)
            request = ImageRequest.from_json(encoded)
            for blob in (*request.images, *([request.mask] if request.mask else [])):
                found = self._find(blob)
                parts.append(Part(blob.id, blob.offset))
                data.append(found)
        except (BlobGone, LinkGarbage):  # the worker finds out, and says what is wrong
            pass
        return parts, data

    def of_grant(self, grant: Grant) -> list[Part]:
        """Return the part that says that the segment of a Grant still exists, or none."""
        return [Part(grant.storage, 0)] if grant.storage and self._blobs.has(grant.storage) else []

    def sweep(self) -> None:
        """Drop the objects whose segments were released; nothing while an upload is being put. Never blocks."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            for blob in [blob for blob in self._objects if not self._blobs.has(blob.id)]:
                del self._objects[blob]
        finally:
            self._lock.release()

    def _find(self, blob: Blob) -> Any:
        """Return the bytes of a blob, or its object. Raises BlobGone."""
        if blob.size <= INLINE_BYTES:
            return self._blobs.read_blob(blob)
        with self._lock:
            if (known := self._objects.get(blob)) is not None:
                return known
            with self._blobs.open(blob) as view:
                data = bytes(view)
            made = self._objects[blob] = self._put(data)
            return made
