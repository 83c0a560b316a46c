"""Which pixels are repainted, and the caller's own pixels put back everywhere else.

A mask here is `uint8 (H, W)`: 255 = repaint, 0 = keep, nothing between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovserve.errors import InvalidValue
from ovserve.pixels.frames import scale_mask, size_of
from ovserve.pixels.images import Pixels, flatten, has_alpha
from ovserve.settings.options import Resolution

__all__ = ["Seam", "check_selects", "feather", "holes", "match_mask", "pool", "read_mask"]

RINGS_LIMIT_PX = 32  # up to this width of a seam an erosion for each ring is the quicker way (measured)
STRIP_ROWS = 256  # of a picture are blended at a time: its working numbers take many times its bytes


def read_mask(pixels: Pixels, mask_mode: str) -> Pixels:
    """The mask that a mask image means.

    Args:
        pixels: the decoded mask, RGB or RGBA.
        mask_mode: `alpha`: transparent = repaint (OpenAI's rule); `luminance`: white = repaint, where transparent pixels count
            as black; `auto`: alpha where there is any transparency, else luminance. Half-way values go to the nearer side.
    """
    if mask_mode == "auto":
        mask_mode = "alpha" if has_alpha(pixels) and pixels[..., 3].min() < 255 else "luminance"
    if mask_mode == "alpha":
        if not has_alpha(pixels):
            return np.zeros(pixels.shape[:2], np.uint8)
        return np.where(pixels[..., 3] < 128, 255, 0).astype(np.uint8)
    # ITU-R BT.601 luma in integers, as image tools compute it.
    light = pixels[..., :3].astype(np.uint32) @ np.array([299, 587, 114], np.uint32)
    if has_alpha(pixels):
        light = light * pixels[..., 3] // 255
    return np.where(light >= 128_000, 255, 0).astype(np.uint8)


def holes(pixels: Pixels) -> Pixels | None:
    """The mask an image carries by its own fully transparent pixels; None where there are none."""
    if not has_alpha(pixels):
        return None
    clear = pixels[..., 3] == 0
    return np.where(clear, 255, 0).astype(np.uint8) if clear.any() else None


def match_mask(mask: Pixels, image: Resolution) -> Pixels:
    """The mask at the size of the image. Raises InvalidValue where their shapes differ by more than rounding."""
    size = size_of(mask)
    if size == image:
        return mask
    # Of one shape: scaled to the other's width (or height), the other side comes out right to within a pixel.
    skew = abs(size.width * image.height - size.height * image.width)
    if skew > max(min(size.width, image.width), min(size.height, image.height)):
        raise InvalidValue(
            f"mask: its size {size} does not match the image's {image}: the mask needs the same size, or at least the same shape",
            param="mask",
        )
    return scale_mask(mask, image)


def check_selects(mask: Pixels, where: str = "") -> None:
    """Raise InvalidValue for a mask that repaints nothing: a client that inverted it should hear of it."""
    if not mask.any():
        raise InvalidValue(
            f"mask: it selects nothing to repaint{where}: transparent pixels (or white ones, in a mask without transparency) "
            "mark what is repainted",
            param="mask",
        )


def pool(mask: Pixels, cell_px: int) -> Pixels:
    """The mask in whole cells of the latent grid: a cell with any set pixel is set. Both sides are multiples of `cell_px`."""
    height, width = mask.shape
    cells: Pixels = mask.reshape(height // cell_px, cell_px, width // cell_px, cell_px).max((1, 3))
    return np.repeat(np.repeat(cells, cell_px, 0), cell_px, 1)


def feather(mask: Pixels, blur_px: int) -> NDArray[np.uint16]:
    """How much of the repainted picture shows at each pixel, 0 (none) to the array's maximum (all of it).

    The ramp lies inside the mask, from its seam inwards, `blur_px` wide, or as wide as the widest place of a mask that is
    narrower than that; the border of the picture is no seam. Outside the mask the weight is 0.
    """
    inside = mask > 0
    if blur_px > RINGS_LIMIT_PX:
        return _depth(inside, blur_px + 1)
    weight = inside.astype(np.uint16)
    for ring in range(blur_px):
        if not inside.any():
            break
        inside = _erode(inside, diagonals=bool(ring % 2))
        weight += inside
    return weight


def _erode(inside: NDArray[np.bool_], *, diagonals: bool) -> NDArray[np.bool_]:
    """One pixel less on each side. With and without diagonals in turn, repeated erosion follows an octagon, not a square."""
    bordered = np.pad(inside, 1, mode="edge")
    rows = bordered[:-2, 1:-1] & bordered[1:-1, 1:-1] & bordered[2:, 1:-1]
    if not diagonals:
        return rows & bordered[1:-1, :-2] & bordered[1:-1, 2:]
    tall = bordered[:-2] & bordered[1:-1] & bordered[2:]
    return tall[:, :-2] & tall[:, 1:-1] & tall[:, 2:]


def _depth(inside: NDArray[np.bool_], most: int) -> NDArray[np.uint16]:
    """Which erosion takes a pixel away, counted from 1, at most `most`; 0 outside. In a time that does not grow with `most`.

    Erosion with and without diagonals in turn reaches an offset of (dx, dy) after max(dx, dy, ceil(2 (dx + dy) / 3)) rounds: the
    distance of a chamfer whose moves cost 3 to the side, 4 along a diagonal and 6 as a knight moves, divided by 3 and rounded up.
    Two passes over the rows find it (Borgefors 1986, Distance transformations in digital images, section 3).
    """
    height, width = inside.shape
    far = np.full((height + 4, width + 4), 3 * most, np.int32)  # nothing comes from beyond the border: it is no seam
    far[2:-2, 2:-2][~inside] = 0
    if not inside.all():
        ramp, spare = 3 * np.arange(width, dtype=np.int32), np.empty(width, np.int32)
        for step, rows in ((1, range(2, height + 2)), (-1, range(height + 1, 1, -1))):
            for y in rows:
                _come_nearer(far[y, 2:-2], far[y - step], far[y - 2 * step], ramp, spare)
    return np.asarray((far[2:-2, 2:-2] + 2) // 3, np.uint16)


def _come_nearer(
    row: NDArray[np.int32],
    last: NDArray[np.int32],
    last_but_one: NDArray[np.int32],
    ramp: NDArray[np.int32],
    spare: NDArray[np.int32],
) -> None:
    """Shorten the distances of a row, in place, by ways from the two rows before it (two wider at each end) and along itself."""
    np.minimum(last[:-4], last[4:], out=spare)
    np.minimum(spare, last_but_one[1:-3], out=spare)
    np.minimum(spare, last_but_one[3:-1], out=spare)
    np.minimum(row, np.add(spare, 6, out=spare), out=row)
    np.minimum(last[1:-3], last[3:-1], out=spare)
    np.minimum(row, np.add(spare, 4, out=spare), out=row)
    np.minimum(row, np.add(last[2:-2], 3, out=spare), out=row)
    # Along the row both ways: the least of row[x'] + 3 |x - x'|.
    np.minimum.accumulate(np.subtract(row, ramp, out=spare), out=spare)
    np.minimum(row, np.add(spare, ramp, out=spare), out=row)
    np.minimum.accumulate(np.add(row, ramp, out=spare)[::-1], out=spare[::-1])
    np.minimum(row, np.subtract(spare, ramp, out=spare), out=row)


@dataclass(frozen=True, slots=True, eq=False)
class Seam:
    """How repainted pictures go into the caller's: worked out once for a mask, used for each of its pictures. Never changed.

    Attributes:
        rows, columns: the part of the picture that holds everything to repaint.
        weight: of the repainted picture there, as `feather` gives it.
    """

    rows: slice
    columns: slice
    weight: NDArray[np.uint16]

    @classmethod
    def plan(cls, mask: Pixels, blur_px: int) -> Seam:
        """Args: blur_px: width of the seam inside the mask; 0 for a hard one."""
        rows, columns = _span(np.flatnonzero(mask.any(1))), _span(np.flatnonzero(mask.any(0)))
        return cls(rows, columns, feather(mask[rows, columns], blur_px))

    def paste(self, original: Pixels, painted: Pixels) -> Pixels:
        """The painted picture where the mask says repaint, and the original, bit for bit, everywhere else.

        Args:
            original: uint8 (H, W, 3 or 4); its alpha holds outside the mask, and what is repainted is opaque.
            painted: uint8 (H, W, 3).
        """
        result = original.copy()
        part, fresh = result[self.rows, self.columns], painted[self.rows, self.columns]
        whole = int(self.weight.max(initial=1))
        for top in range(0, len(part), STRIP_ROWS):
            strip = slice(top, top + STRIP_ROWS)
            _blend(part[strip], fresh[strip], self.weight[strip], whole)
        return result


def _span(places: NDArray[np.intp]) -> slice:
    """From the first to the last of these, and one beside each: at the end of the array there is no seam."""
    return slice(max(0, int(places[0]) - 1), int(places[-1]) + 2) if places.size else slice(0, 0)


def _blend(shown: Pixels, painted: Pixels, weight: NDArray[np.uint16], whole: int) -> None:
    """Put `painted` into `shown` by weights up to `whole`, in place."""
    inside = weight > 0
    share = weight[inside][:, None].astype(np.uint32)
    # What shows under a seam is what was to be seen there, not the stored colour of a transparent pixel.
    blend = flatten(shown)[inside] * (whole - share) + painted[inside] * share
    shown[inside, :3] = (blend + whole // 2) // whole
    if has_alpha(shown):
        shown[inside, 3] = 255
