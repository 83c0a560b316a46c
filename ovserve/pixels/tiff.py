"""Correct or reject TIFF files whose samples Pillow would decode wrongly.

Pillow opens some kinds of samples without their scale, sign or meaning.
Runs in: worker.

References are to TIFF 6.0 (Adobe, 1992); tags above 700 to the TIFF/EP and DNG specifications.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImagePalette
from PIL.TiffImagePlugin import TiffImageFile

__all__ = ["gray_levels", "prepare_tiff"]

_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC, _COLOUR_MAP, _INK_SET = 254, 258, 259, 262, 320, 332
_SAMPLE_FORMAT, _SUBSAMPLING, _DNG_VERSION = 339, 530, 50706
_WHITE_IS_ZERO, _PALETTE, _SEPARATED, _YCBCR = 0, 3, 5, 6
_JPEG = (6, 7)  # compressions that convert YCbCr themselves
_SIGNED = 2
_CMYK_INKS = 1


def prepare_tiff(image: TiffImageFile) -> None:
    """Reject an opened file that cannot be decoded correctly, and repair an 8-bit palette.

    Raises:
        ValueError: the samples are signed, in unknown inks or subsampled, or belong to a preview.
    """
    tags: Any = image.tag_v2
    if tags.get(_SUBFILE, 0) & 1 or _DNG_VERSION in tags:
        raise ValueError("the first image of the file is a preview, as in raw photographs; send a developed picture")
    if _SIGNED in _values(tags.get(_SAMPLE_FORMAT, 1)) and _values(tags.get(_BITS, 1))[0] < 32:
        raise ValueError("signed samples have no defined black level; send unsigned ones")
    photometric = tags.get(_PHOTOMETRIC, 0)
    if photometric == _SEPARATED and tags.get(_INK_SET, _CMYK_INKS) != _CMYK_INKS:
        raise ValueError("the inks of the file are not those of CMYK; send RGB")
    is_subsampled = tuple(_values(tags.get(_SUBSAMPLING, (2, 2)))) != (1, 1)
    if photometric == _YCBCR and tags.get(_COMPRESSION, 1) not in _JPEG and is_subsampled and image.mode != "L":
        raise ValueError("subsampled YCbCr without JPEG compression is not supported; send RGB")
    entries = np.array(_values(tags.get(_COLOUR_MAP, ())))
    if photometric == _PALETTE and entries.size and entries.max() < 256:
        # Some writers store 8 bits for each entry, where section 5 has 16. libtiff makes the same guess.
        image.palette = ImagePalette.raw("RGB;L", entries.astype(np.uint8).tobytes())


def gray_levels(image: Image.Image, wide: NDArray[Any]) -> NDArray[Any]:
    """Convert gray samples of 9 to 16 bits to the range 0 (black) to 65535 (white); other formats already use it.

    Args:
        image: the file.
        wide: its samples, as Pillow reads them: neither scaled by BitsPerSample nor inverted for WhiteIsZero.
    """
    if not isinstance(image, TiffImageFile):
        return wide
    bits = int(_values(image.tag_v2.get(_BITS, 16))[0])
    scaled = wide if bits == 16 else (wide.astype(np.uint32) * 65_535 // ((1 << bits) - 1)).astype(np.uint16)
    return 65_535 - scaled if image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else scaled


def _values(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
