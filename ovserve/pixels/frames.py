"""Fits an image to the frame of the result, the frame to the model's canvas, and the painted canvas back to the frame.

    image ──resize_mode──▶ frame (the size of the result) ──scale, shape kept──▶ canvas (a size the model was made for)
                           frame ◀──crop, scale──────────────────────────────── canvas, repainted

Where the canvas has another shape than the frame, the frame is centred on it and its edges are repeated outwards; that
border is dropped on the way back. Masks take the same ways by another rule: a target pixel is set when it covers any
part of a set source pixel, so that no thin mask vanishes. Runs in: worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ovserve.pixels.images import Pixels
from ovserve.settings.options import Resolution

__all__ = ["Fitting", "Placement", "fit_into", "scale_mask", "size_of"]

# When shrinking a picture far, Pillow first averages blocks to an intermediate picture of at least this many times the
# target size: a sixth of the time, and by Pillow's documentation of Image.resize nearly indistinguishable.
REDUCING_GAP = 3.0
_LARGEST_BLOCK = 10_000  # pixels; Pillow divides by a rounded factor, which darkens larger blocks


def size_of(pixels: Pixels) -> Resolution:
    """Return width and height of an array of pixels or of a mask."""
    return Resolution(pixels.shape[1], pixels.shape[0])


def fit_into(size: Resolution, limit: Resolution) -> Resolution:
    """Return the size itself, or the largest size of the same shape that fits into `limit`."""
    scale = min(1.0, limit.width / size.width, limit.height / size.height)
    return Resolution(max(1, round(size.width * scale)), max(1, round(size.height * scale)))


def _resize(pixels: Pixels, size: Resolution, box: tuple[float, float, float, float]) -> Pixels:
    if size_of(pixels) == size and box == (0.0, 0.0, float(size.width), float(size.height)):
        return pixels
    shrinking = (box[2] - box[0]) * (box[3] - box[1]) / (size.width * size.height)
    gap = REDUCING_GAP if shrinking <= _LARGEST_BLOCK * REDUCING_GAP**2 else None
    resized = Image.fromarray(pixels).resize((size.width, size.height), Image.Resampling.LANCZOS, box, gap)
    return np.asarray(resized)


def scale_mask(mask: Pixels, size: Resolution, box: tuple[float, float, float, float] | None = None) -> Pixels:
    """Scale a mask; a target pixel is set when it covers any part of a set source pixel.

    Args:
        mask: uint8 (H, W), 0 or 255.
        size: the target size.
        box: left, top, right, bottom of the part of the mask to use; None: all of it.
    """
    left, top, right, bottom = box or (0, 0, mask.shape[1], mask.shape[0])
    for axis, low, high, count in ((0, top, bottom, size.height), (1, left, right, size.width)):
        edges = low + np.arange(count + 1) * ((high - low) / count)
        first = np.floor(edges[:-1].round(6)).astype(np.intp)
        last = np.ceil(edges[1:].round(6)).astype(np.intp) - 1
        # reduceat takes [first[j], first[j + 1]), which leaves out `last`, a pixel that two targets share.
        mask = np.maximum(
            np.maximum.reduceat(mask.take(np.arange(last[-1] + 1), axis), first, axis), mask.take(last, axis)
        )
    return mask


@dataclass(frozen=True, slots=True)
class Fitting:
    """How an image fills the frame.

    Attributes:
        source: size of the image.
        frame: size of the frame.
        box: the part of the image that is used: left, top, right, bottom in pixels.
        inner: where that part is in the frame: left, top, width, height in pixels; the rest are bars (`pad` only).
    """

    source: Resolution
    frame: Resolution
    box: tuple[float, float, float, float]
    inner: tuple[int, int, int, int]

    @classmethod
    def plan(cls, source: Resolution, frame: Resolution, resize_mode: str) -> Fitting:
        """Return the fitting for a resize mode.

        Args:
            source: size of the image.
            frame: size of the frame.
            resize_mode: crop (fill the frame, cut off the rest), pad (show all of the image, with bars), stretch.
        """
        box: tuple[float, float, float, float] = (0, 0, source.width, source.height)
        inner = (0, 0, frame.width, frame.height)
        if resize_mode == "crop":
            scale = max(frame.width / source.width, frame.height / source.height)
            width, height = min(source.width, frame.width / scale), min(source.height, frame.height / scale)
            # Whole pixels: a shift of half a pixel would blur an image that is only cut.
            left, top = int((source.width - width) / 2), int((source.height - height) / 2)
            box = (left, top, left + width, top + height)
        elif resize_mode == "pad":
            scale = min(frame.width / source.width, frame.height / source.height)
            width, height = max(1, round(source.width * scale)), max(1, round(source.height * scale))
            inner = ((frame.width - width) // 2, (frame.height - height) // 2, width, height)
        return cls(source, frame, box, inner)

    @property
    def is_identity(self) -> bool:
        """Whether the frame has the size of the image, so that pixels are not changed."""
        return self.source == self.frame

    def fit_image(self, pixels: Pixels) -> Pixels:
        """Return the image in the frame; bars repeat its edges, and are transparent if it has alpha."""
        filled = _pad_edges(_resize(pixels, Resolution(*self.inner[2:]), self.box), self.inner, self.frame)
        if filled.shape[2] == 4 and self.inner[2:] != (self.frame.width, self.frame.height):
            left, top, width, height = self.inner
            alpha = np.zeros_like(filled[..., 3])
            alpha[top : top + height, left : left + width] = filled[top : top + height, left : left + width, 3]
            filled[..., 3] = alpha
        return filled

    def fit_mask(self, mask: Pixels) -> Pixels:
        """Return the mask in the frame; bars are repainted, because they hold nothing of the caller's image."""
        left, top, width, height = self.inner
        filled = np.full((self.frame.height, self.frame.width), 255, np.uint8)
        filled[top : top + height, left : left + width] = scale_mask(mask, Resolution(width, height), self.box)
        return filled


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the frame is on the canvas.

    Attributes:
        frame: size of the frame.
        canvas: size of the canvas.
        inner: the frame on the canvas: left, top, width, height in pixels of the canvas.
    """

    frame: Resolution
    canvas: Resolution
    inner: tuple[int, int, int, int]

    @classmethod
    def plan(cls, frame: Resolution, canvas: Resolution, multiple_px: int) -> Placement:
        """Return the placement: unscaled if the canvas is the frame rounded up to `multiple_px`, else scaled to fit."""
        width, height = frame.width, frame.height
        if not (0 <= canvas.width - width < multiple_px and 0 <= canvas.height - height < multiple_px):
            scale = min(canvas.width / width, canvas.height / height)
            width = min(canvas.width, max(1, round(width * scale)))
            height = min(canvas.height, max(1, round(height * scale)))
        return cls(frame, canvas, ((canvas.width - width) // 2, (canvas.height - height) // 2, width, height))

    def place_image(self, pixels: Pixels) -> Pixels:
        """Return the frame's pixels on the canvas, their edges repeated outwards."""
        frame = self.frame
        return _pad_edges(
            _resize(pixels, Resolution(*self.inner[2:]), (0, 0, frame.width, frame.height)), self.inner, self.canvas
        )

    def place_mask(self, mask: Pixels) -> Pixels:
        """Return the frame's mask on the canvas, its edges repeated outwards.

        The border beside a repainted edge is repainted too: it is not context to keep.
        """
        return _pad_edges(scale_mask(mask, Resolution(*self.inner[2:])), self.inner, self.canvas)

    def extract_frame(self, pixels: Pixels) -> Pixels:
        """Return the frame from a painted canvas."""
        left, top, width, height = self.inner
        if (width, height) == (self.frame.width, self.frame.height):
            return pixels[top : top + height, left : left + width]
        return _resize(pixels, self.frame, (left, top, left + width, top + height))

    def extract_preview(self, pixels: Pixels, size: Resolution) -> Pixels:
        """Return the frame, scaled to `size`, from a canvas that was painted at any size."""
        across, down = pixels.shape[1] / self.canvas.width, pixels.shape[0] / self.canvas.height
        left, top, width, height = self.inner
        return _resize(pixels, size, (left * across, top * down, (left + width) * across, (top + height) * down))


def _pad_edges(pixels: Pixels, inner: tuple[int, int, int, int], size: Resolution) -> Pixels:
    """Return a picture of `size` with `pixels` at `inner` (left, top, width, height), their edges repeated outwards."""
    left, top, width, height = inner
    if (width, height) == (size.width, size.height):
        return pixels
    sides = ((top, size.height - height - top), (left, size.width - width - left), (0, 0))
    return np.pad(pixels, sides[: pixels.ndim], mode="edge")
