"""Draw a run of the stepwise engine: the pictures in each call, over time."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from ovserve.engines.stepwise.engine import Call
from ovserve.engines.stepwise.slots import Finished

__all__ = ["chrome_trace", "svg"]

PALETTE = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
WIDTH_PX, ROW_PX, LEFT_PX = 1200, 9, 90


def chrome_trace(calls: Sequence[Finished[Call]]) -> dict[str, Any]:
    """Return the calls in Chrome's trace-event format (for Perfetto too), one track per slot and per picture."""
    start = min(call.started_at for call in calls)
    events: list[dict[str, Any]] = []
    for call in calls:
        common = {"ph": "X", "ts": (call.started_at - start) * 1e6, "dur": (call.ended_at - call.started_at) * 1e6}
        rows = [
            f"{row.picture.work.job} step {row.index + 1}/{row.picture.steps} {_timestep(row)}"
            for row in call.subject.rows
        ]
        name = f"{call.subject.kind} x{len(rows)}"
        events.append({**common, "name": name, "cat": "slot", "pid": "slots", "tid": call.slot, "args": {"rows": rows}})
        for row in call.subject.rows:
            if row.condition == 0:
                label = f"step {row.index + 1}" if call.subject.kind == "denoise" else call.subject.kind
                events.append(
                    {**common, "name": label, "cat": "picture", "pid": "pictures", "tid": row.picture.work.job}
                )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _timestep(row: Any) -> str:
    picture = row.picture
    return f"t={picture.plan.timesteps[row.index]}" if row.index < picture.steps else ""


def svg(calls: Sequence[Finished[Call]]) -> str:
    """Return an SVG of the slots over time: a call is a column of its rows, one colour per picture.

    Rows of encoding and decoding are paler than those of denoising.
    """
    start, end = min(call.started_at for call in calls), max(call.ended_at for call in calls)
    scale = (WIDTH_PX - LEFT_PX) / (end - start)
    deepest = max(len(call.subject.rows) for call in calls)
    jobs = list(dict.fromkeys(row.picture.work.job for call in calls for row in call.subject.rows))
    slots = sorted({call.slot for call in calls})
    lane = deepest * ROW_PX + 18
    parts = []
    for call in calls:
        x, width = (
            LEFT_PX + (call.started_at - start) * scale,
            max(0.5, (call.ended_at - call.started_at) * scale - 0.4),
        )
        top = slots.index(call.slot) * lane + 4
        for place, row in enumerate(call.subject.rows):
            colour = PALETTE[jobs.index(row.picture.work.job) % len(PALETTE)]
            title = (
                f"{row.picture.work.job}, {call.subject.kind}, step {row.index + 1} of {row.picture.steps} "
                f"{_timestep(row)}"
            )
            opacity = "1" if call.subject.kind == "denoise" else "0.45"
            parts.append(
                f'<rect x="{x:.1f}" y="{top + place * ROW_PX}" width="{width:.1f}" height="{ROW_PX - 1}" '
                f'fill="{colour}" fill-opacity="{opacity}"><title>{escape(title)}</title></rect>'
            )
    for place, slot in enumerate(slots):
        parts.append(f'<text x="4" y="{place * lane + 16}" font-size="12" font-family="sans-serif">slot {slot}</text>')
    bottom = len(slots) * lane + 6
    for tick in range(6):
        at = LEFT_PX + tick * (WIDTH_PX - LEFT_PX) / 5
        label = f"{(end - start) * tick / 5 * 1000:.0f} ms"
        anchor = "end" if tick == 5 else "middle"
        parts.append(
            f'<text x="{at:.0f}" y="{bottom + 8}" font-size="10" text-anchor="{anchor}" '
            f'font-family="sans-serif">{label}</text>'
        )
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX} {bottom + 14}">\n{body}\n</svg>\n'
