"""Count the visits of blocks and the segments of a JPEG."""

from __future__ import annotations

import re

from ovserve.pixels.counts.walk import MAX_EXIF_BYTES, MAX_PLAIN_PROFILE_BYTES, FileWalk, check_count, is_plain_profile

__all__ = ["walk_jpeg"]

# Times the blocks of a JPEG are visited. libjpeg's progressive script visits each 5 to 6 times, mozjpeg's up to 8.
MAX_JPEG_PASSES = 16
MAX_JPEG_SEGMENTS = 2048  # depth maps come in 500 segments
MAX_JPEG_JUNK_BYTES = 64 << 10  # between segments; Pillow reads these byte by byte

_JPEG_MARK = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # the marker of a segment; see api/parameters/imagehead.py
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_CMYK_COMPONENTS = 4
_SEQUENTIAL_SOF = (0xC0, 0xC1)  # Huffman codes, one pass
_PARAMETERLESS = frozenset(range(0x01, 0xC0))


def walk_jpeg(found: FileWalk) -> None:
    """Count the visits of blocks in all scans of the first image (ITU-T T.81, sections A.2 and B.2)."""
    data, at, junk, segments, exif_bytes, profile_bytes = found.data, 2, 0, 0, 0, 0
    has_plain_profile = True
    blocks: dict[int, tuple[int, int]] = {}  # by component: blocks of a scan of it alone, and of an interleaved scan
    visits = frame_visits = 0
    while match := _JPEG_MARK.search(data, at):
        kind = data[match.start() + 1]
        if not visits:
            junk += match.start() - at
            check_count(junk, MAX_JPEG_JUNK_BYTES, "bytes between its segments")
        at = match.end()
        segments += 1
        check_count(segments, MAX_JPEG_SEGMENTS, "segments")
        if kind == _EOI:
            found.end = at
            is_plain = has_plain_profile and profile_bytes <= MAX_PLAIN_PROFILE_BYTES
            is_plain = is_plain and not (profile_bytes and len(blocks) == _CMYK_COMPONENTS)
            found.is_baseline = found.is_baseline and is_plain and visits == frame_visits and not junk
            return
        if kind in _PARAMETERLESS:
            found.is_baseline = False
            continue
        if kind == _SOI:
            break  # libjpeg ends with an error
        (length,) = found.unpack(">H", at)
        if length < 2:
            break
        if kind in _SOF:
            if blocks:
                break  # libjpeg ends with an error
            _, found.height, found.width, count = found.unpack(">BHHB", at + 2)
            blocks = _jpeg_blocks(found, at + 8, count)
            frame_visits = sum(interleaved for _, interleaved in blocks.values())
            found.is_baseline = kind in _SEQUENTIAL_SOF
        elif kind == _SOS:
            (count,) = found.unpack("B", at + 2)
            scan = [blocks.get(found.unpack("B", at + 3 + 2 * k)[0], (0, 0)) for k in range(count)]
            visits += scan[0][0] if len(scan) == 1 else sum(interleaved for _, interleaved in scan)
            if visits > MAX_JPEG_PASSES * frame_visits:
                passes = -(-visits // max(1, frame_visits))
                check_count(passes, MAX_JPEG_PASSES, "passes over its blocks in its scans")
        elif kind >= 0xE0:
            found.add_metadata(length)
            if kind == 0xE1 and bytes(data[at + 2 : at + 6]) == b"Exif":
                exif_bytes += length
                check_count(exif_bytes, MAX_EXIF_BYTES, "bytes of EXIF data")
            elif kind == 0xE2 and bytes(data[at + 2 : at + 14]) == b"ICC_PROFILE\0":
                # ICC.1:2022 annex B.4: 14 bytes of marker, number and count before each part of the profile.
                profile_bytes += length
                is_first = data[at + 14] == 1
                is_plain = not is_first or is_plain_profile(bytes(data[at + 16 : at + length]))
                has_plain_profile = has_plain_profile and is_plain
        at += length
    found.is_baseline = False


def _jpeg_blocks(found: FileWalk, at: int, count: int) -> dict[int, tuple[int, int]]:
    """Return the blocks of each component: in a scan of that component alone, and in a scan of several."""
    parts = [found.unpack("BB", at + 3 * k) for k in range(count)]
    wide, high = max(part >> 4 for _, part in parts), max(part & 15 for _, part in parts)
    across, down = -(-found.width // (8 * wide)), -(-found.height // (8 * high))
    blocks = {}
    for name, part in parts:
        alone = -(-found.width * (part >> 4) // (8 * wide)) * -(-found.height * (part & 15) // (8 * high))
        # A frame of one component is never interleaved, whatever its sampling factors are.
        interleaved = alone if count == 1 else across * down * (part >> 4) * (part & 15)
        # A component with few blocks still costs the decoder a walk over the rows.
        blocks[name] = (max(alone, 1), max(interleaved, 1))
    return blocks
