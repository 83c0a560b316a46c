"""Reads masks, and pastes repainted pixels into the caller's image along a hard or soft seam.

A mask here is `uint8 (H, W)`: 255 = repaint, 0 = keep, no values between. Runs in: worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovserve.errors import InvalidValue
from ovserve.pixels.frames import scale_mask, size_of
from ovserve.pixels.holes import HOLE_ALPHA
from ovserve.pixels.images import Pixels, has_alpha
from ovserve.settings.options import Resolution

__all__ = [
    "Seam",
    "check_not_empty",
    "feather",
    "mask_from_image",
    "match_mask",
    "pool",
]

MAX_EROSIONS = 32  # seams up to this width in pixels are faster by one erosion per pixel of width (measured)
STRIP_ROWS = 256  # rows blended at a time: the intermediate arrays take many times the bytes of the picture


def mask_from_image(pixels: Pixels, mask_mode: str) -> Pixels:
    """Return the mask that a mask image stands for.

    Args:
        pixels: the decoded mask image, RGB or RGBA.
        mask_mode: `alpha`: transparent = repaint (OpenAI's rule); `luminance`: white = repaint, where transparent
            pixels count as black; `auto`: alpha if a pixel has alpha below HOLE_ALPHA (lossy editors leave 250 to 254
            in an opaque mask), else luminance; `stencil`: opaque = repaint if a pixel is not opaque, else luminance
            (the rule of AUTOMATIC1111). Intermediate values go to the nearer end.
    """
    if mask_mode == "stencil" and has_alpha(pixels) and pixels[..., 3].min() < 255:
        return np.where(pixels[..., 3] >= HOLE_ALPHA, 255, 0).astype(np.uint8)
    if mask_mode == "auto":
        mask_mode = "alpha" if has_alpha(pixels) and pixels[..., 3].min() < HOLE_ALPHA else "luminance"
    if mask_mode == "alpha":
        if not has_alpha(pixels):
            return np.zeros(pixels.shape[:2], np.uint8)
        return np.where(pixels[..., 3] < HOLE_ALPHA, 255, 0).astype(np.uint8)
    # ITU-R BT.601 luma in integers, as image tools compute it.
    light = pixels[..., :3].astype(np.uint32) @ np.array([299, 587, 114], np.uint32)
    if has_alpha(pixels):
        light = light * pixels[..., 3] // 255
    return np.where(light >= 128_000, 255, 0).astype(np.uint8)


def match_mask(mask: Pixels, image: Resolution) -> Pixels:
    """Return the mask scaled to the size of the image.

    Raises:
        InvalidValue: mask and image differ in shape by more than rounding.
    """
    size = size_of(mask)
    if size == image:
        return mask
    # Equal shape: after scaling to the other's width (or height), the other side is right to within a pixel.
    skew = abs(size.width * image.height - size.height * image.width)
    if skew > max(min(size.width, image.width), min(size.height, image.height)):
        raise InvalidValue(
            f"mask: its size {size} does not match the image's {image}; send a mask of the same size or aspect ratio",
            param="mask",
        )
    return scale_mask(mask, image)


def check_not_empty(mask: Pixels, where: str = "") -> None:
    """Raise InvalidValue for a mask that repaints nothing, as an inverted mask may.

    Args:
        mask: the mask.
        where: appended to the error's statement, for the part of the image that was checked.
    """
    if not mask.any():
        raise InvalidValue(
            f"mask: it selects nothing to repaint{where}; mark the pixels to repaint as transparent, or as white in a "
            "mask without transparency",
            param="mask",
        )


def pool(mask: Pixels, cell_px: int) -> Pixels:
    """Set every cell of the latent grid that has any set pixel. Both sides of `mask` are multiples of `cell_px`."""
    height, width = mask.shape
    cells: Pixels = mask.reshape(height // cell_px, cell_px, width // cell_px, cell_px).max((1, 3))
    return np.repeat(np.repeat(cells, cell_px, 0), cell_px, 1)


def feather(mask: Pixels, blur_px: int) -> NDArray[np.uint16]:
    """Return the weight of the repainted picture at each pixel: 0 (none of it) to the array's maximum (all of it).

    The ramp lies inside the mask, from its edge inwards, `blur_px` wide, or as wide as the widest part of a mask that
    is narrower than that; the border of the picture is not an edge. Outside the mask the weight is 0.
    """
    inside = mask > 0
    if blur_px > MAX_EROSIONS:
        return _depth(inside, blur_px + 1)
    weight = inside.astype(np.uint16)
    for erosion in range(blur_px):
        if not inside.any():
            break
        inside = _erode(inside, diagonals=bool(erosion % 2))
        weight += inside
    return weight


def _erode(inside: NDArray[np.bool_], *, diagonals: bool) -> NDArray[np.bool_]:
    """Erode by one pixel. Alternately with and without diagonals, repeated erosion follows an octagon, not a square."""
    bordered = np.pad(inside, 1, mode="edge")
    rows = bordered[:-2, 1:-1] & bordered[1:-1, 1:-1] & bordered[2:, 1:-1]
    if not diagonals:
        return rows & bordered[1:-1, :-2] & bordered[1:-1, 2:]
    tall = bordered[:-2] & bordered[1:-1] & bordered[2:]
    return tall[:, :-2] & tall[:, 1:-1] & tall[:, 2:]


def _depth(inside: NDArray[np.bool_], limit: int) -> NDArray[np.uint16]:
    """Return the number of the erosion that removes each pixel, counted from 1, at most `limit`; 0 outside.

    The time does not grow with `limit`. Erosion alternating with and without diagonals reaches an offset of (dx, dy)
    after max(dx, dy, ceil(2 (dx + dy) / 3)) rounds. That is the chamfer distance with costs of 3 for a side step, 4 for
    a diagonal step and 6 for a knight's move, divided by 3 and rounded up. Two passes over the rows compute it
    (Borgefors 1986, Distance transformations in digital images, section 3).
    """
    height, width = inside.shape
    # A border of 2 pixels at the largest distance: the border of the picture is not an edge of the mask.
    distance = np.full((height + 4, width + 4), 3 * limit, np.int32)
    distance[2:-2, 2:-2][~inside] = 0
    if not inside.all():
        ramp, buffer = 3 * np.arange(width, dtype=np.int32), np.empty(width, np.int32)
        for step, rows in ((1, range(2, height + 2)), (-1, range(height + 1, 1, -1))):
            for y in rows:
                _relax_row(distance[y, 2:-2], distance[y - step], distance[y - 2 * step], ramp, buffer)
    return np.asarray((distance[2:-2, 2:-2] + 2) // 3, np.uint16)


def _relax_row(
    row: NDArray[np.int32],
    previous: NDArray[np.int32],
    before_previous: NDArray[np.int32],
    ramp: NDArray[np.int32],
    buffer: NDArray[np.int32],
) -> None:
    """Lower the distances of a row, in place, to those by way of the two rows before it and along the row itself.

    Args:
        row: int32 (W), in thirds of a pixel.
        previous: the row before it, int32 (W + 4): two more at each end.
        before_previous: the row before that, int32 (W + 4).
        ramp: 3 * x for each x of the row.
        buffer: int32 (W), overwritten.
    """
    np.minimum(previous[:-4], previous[4:], out=buffer)
    np.minimum(buffer, before_previous[1:-3], out=buffer)
    np.minimum(buffer, before_previous[3:-1], out=buffer)
    np.minimum(row, np.add(buffer, 6, out=buffer), out=row)
    np.minimum(previous[1:-3], previous[3:-1], out=buffer)
    np.minimum(row, np.add(buffer, 4, out=buffer), out=row)
    np.minimum(row, np.add(previous[2:-2], 3, out=buffer), out=row)
    # Along the row in both directions: the minimum of row[x'] + 3 |x - x'|.
    np.minimum.accumulate(np.subtract(row, ramp, out=buffer), out=buffer)
    np.minimum(row, np.add(buffer, ramp, out=buffer), out=row)
    np.minimum.accumulate(np.add(row, ramp, out=buffer)[::-1], out=buffer[::-1])
    np.minimum(row, np.subtract(buffer, ramp, out=buffer), out=row)


@dataclass(frozen=True, slots=True, eq=False)
class Seam:
    """How repainted pictures are pasted into the caller's: computed once for a mask, used for each picture. Immutable.

    Attributes:
        rows, columns: the part of the picture that contains everything to repaint.
        weight: weight of the repainted picture in that part, 0 to `full`.
        full: the weight at which nothing of the original shows.
    """

    rows: slice
    columns: slice
    weight: NDArray[np.uint16]
    full: int

    @classmethod
    def plan(cls, mask: Pixels, blur_px: int, opacity: Pixels | None = None) -> Seam:
        """Return the seam of a mask; it is `blur_px` wide, inside the mask; 0 is a hard seam.

        Args:
            mask: the mask.
            blur_px: width of the seam.
            opacity: uint8 (H, W), the image's alpha where the mask is made of it: it lowers the weight of the repainted
                picture to 1 - opacity / 255.
        """
        rows, columns = _span(np.flatnonzero(mask.any(1))), _span(np.flatnonzero(mask.any(0)))
        weight = feather(mask[rows, columns], blur_px)
        full = int(weight.max(initial=1))
        if opacity is not None:  # at most 257 * 255, for the widest blur
            weight, full = weight * (255 - opacity[rows, columns].astype(np.uint16)), full * 255
        return cls(rows, columns, weight, full)

    def paste(self, original: Pixels, painted: Pixels) -> Pixels:
        """Return the painted picture inside the mask, and the original, bit for bit, outside it.

        Args:
            original: uint8 (H, W, 3 or 4); its alpha is kept outside the mask; repainted pixels are opaque. In the seam
                its share is lowered by its alpha, so that the colour of a transparent pixel does not show.
            painted: uint8 (H, W, 3).
        """
        result = original.copy()
        part, fresh = result[self.rows, self.columns], painted[self.rows, self.columns]
        for top in range(0, len(part), STRIP_ROWS):
            strip = slice(top, top + STRIP_ROWS)
            _blend(part[strip], fresh[strip], self.weight[strip], self.full)
        return result


def _span(indices: NDArray[np.intp]) -> slice:
    """Return the slice over sorted indices and one more at each end: `feather` sees no edge at the end of an array."""
    return slice(max(0, int(indices[0]) - 1), int(indices[-1]) + 2) if indices.size else slice(0, 0)


def _blend(shown: Pixels, painted: Pixels, weight: NDArray[np.uint16], full: int) -> None:
    """Blend `painted` into `shown`, in place, by weights from 0 to `full`."""
    inside = weight > 0
    kept = full - weight[inside][:, None].astype(np.uint32)
    if has_alpha(shown):
        kept, full = kept * shown[inside, 3:], full * 255
        shown[inside, 3] = 255
    blend = shown[inside, :3] * kept + painted[inside] * (full - kept)
    shown[inside, :3] = (blend + full // 2) // full
