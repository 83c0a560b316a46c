"""A file that is being walked, and the limits that apply to every format."""

from __future__ import annotations

import struct

__all__ = [
    "MAX_EXIF_BYTES",
    "MAX_PLAIN_PROFILE_BYTES",
    "FileWalk",
    "TooMuch",
    "check_count",
    "is_plain_profile",
]

# Bytes that the first image needs. An animation or a document of several pages is one file.
MIN_FILE_BYTES, MAX_FILE_BYTES_PER_PIXEL = 28 << 20, 16
MAX_METADATA_BYTES = 16 << 20  # a photograph with a depth map has 10 MB
MAX_EXIF_BYTES = 256 << 10  # a segment of a JPEG holds 64 kB; Pillow makes an object of each rational number

MAX_PLAIN_PROFILE_BYTES = 1 << 20  # as colour.MAX_KEPT_PROFILE_BYTES


class TooMuch(ValueError):
    """A count is over its limit."""


def check_count(found: int, limit: int, what: str) -> None:
    """Raise TooMuch if a count is over its limit; `what` names what was counted."""
    if found > limit:
        raise TooMuch(f"{found} {what}; this server allows at most {limit}")


class FileWalk:
    """A file that is being walked, and what was found so far."""

    def __init__(self, data: memoryview, form: str) -> None:
        self.data = data
        self.format = form
        self.width = self.height = 0
        self.end = len(data)
        self.is_baseline = False
        self.metadata_bytes = 0

    def unpack(self, form: str, at: int) -> tuple[int, ...]:
        """Return the values of a `struct` format at an offset. Raises struct.error beyond the end of the file."""
        if at > len(self.data):  # an offset of 64 bits may be too large for unpack_from
            raise struct.error
        return struct.unpack_from(form, self.data, at)

    def check_size(self, size: int) -> None:
        """Check the bytes that the first image needs, or those of it that were walked."""
        limit = MIN_FILE_BYTES + MAX_FILE_BYTES_PER_PIXEL * self.width * self.height
        check_count(size, limit, f"or more bytes for {self.width}x{self.height} pixels")

    def add_metadata(self, size: int) -> None:
        """Count bytes of metadata."""
        self.metadata_bytes += size
        check_count(self.metadata_bytes, MAX_METADATA_BYTES, "bytes of metadata")


def is_plain_profile(profile: bytes) -> bool:
    """Return whether a profile is for RGB and of ordinary size: then no native code reads it to convert samples."""
    return len(profile) <= MAX_PLAIN_PROFILE_BYTES and profile[16:20] == b"RGB "
