"""How to divide a device for one model: streams, threads and rows in a call, measured at warm-up among a few sensible settings.

What is decided here is decided once for a served model: each request then has the same number of threads whatever the load, so
load never changes a picture's bytes. Another number of threads can change the last bits, so noise must not decide: small models
get single-threaded streams unless more threads win clearly, large ones all threads, and the choice is kept beside the compiled
models (`cache_dir`) or can be pinned.

Measuring costs what it can win. The setting with all threads comes first, and one call of it tells a large model, which keeps every
core busy by itself: nothing else is compiled for that. For a small one single-threaded streams follow, and what lies between
them only where those did not win clearly. After BUDGET_S nothing more is measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovserve.deadline import Deadline
from ovserve.engines.stepwise.compiled import Components, Layout, Requests, run_decoder, run_encoder, run_unet
from ovserve.logs import fields

__all__ = ["LARGE_CALL_S", "Tuning", "available_bytes", "tune", "warm_up"]

log = logging.getLogger(__name__)

ROW_CHOICES = (4, 8, 16)  # beside the two of one picture
COMPARED_ROWS = 4  # in a call, when layouts are compared
# By this much must fewer slots with more threads beat single-threaded ones, which were 1.6 to 2.4 times as quick for the
# built-in model.
CLEAR_GAIN = 1.15
WORTH_MORE_ROWS = 1.03  # more rows in a call must bring this much: they make everybody's step longer
# Where calls are short anyway, more rows need not bring anything: the room for more pictures is worth it.
NOT_WORSE = 0.95
SHORT_CALL_S = 0.05
LARGE_CALL_S = 0.25  # two rows take longer than this: the model keeps every core busy by itself (measured, SD 1.5)
# Small models need 2 s on two idle cores. On a busy machine measuring takes longer and tells less, and somebody waits for the start.
BUDGET_S = 6.0
LONGEST_CALL_S = 0.5  # a picture that comes in waits for the call under way
HEAVY_UNET_BYTES = (
    256 * 1024 * 1024
)  # so many weights are known by a quarter of the area: calls take from half a second on
SLOW_CALL_S = 1.0  # one round of calls this slow is measure enough
MOST_STREAMS = 8  # each holds its own copy of the weights
MEASURE_S = 0.12  # for each setting
WARM_UP_S = 2.0  # for kernels of the numbers of rows to come
LEAST_CAPACITY = 4  # pictures in flight: a short job shares with a long one and does not wait for it
MEMORY_SHARE = 0.5  # of what is free, for the rows of one call


@dataclass(frozen=True, slots=True)
class Tuning:
    """The division of one device for one model.

    Attributes:
        rows: most rows in one call at the model's native size.
        splits: the rows of one picture may go into two calls: a lone row has the same bits as one of two.
        step_s: one step of a lone picture with guidance, measured.
        timestep_per_row: rows at different timesteps may share a call.
    """

    layout: Layout
    rows: int
    splits: bool = True
    step_s: float = 0.0
    timestep_per_row: bool = True

    @property
    def capacity(self) -> int:
        """Pictures in flight at once."""
        return max(LEAST_CAPACITY, self.layout.streams * self.rows // 2)


@dataclass(frozen=True, slots=True)
class _Rate:
    """Rows a second: as the clock saw it, and by CPU time, which other work does not stretch."""

    by_clock: float
    by_cpu: float


@dataclass(frozen=True, slots=True)
class _Measured:
    """What a few calls told of a layout; `row_s` is a row's time without what other work on the machine took of it."""

    layout: Layout
    step_s: float
    row_s: float
    splits: bool
    per_row: bool


def tune(components: Components, beat: Callable[[str], None]) -> Tuning:
    """What was pinned, else what was kept from another start, else the best of what is measured now. Raises ModelError."""
    settings = components.settings
    plugin: dict[str, Any] = json.loads(settings.plugin_config) if settings.plugin_config else {}
    streams = settings.streams or int(plugin.get("NUM_STREAMS", 0))
    threads = settings.threads or int(plugin.get("INFERENCE_NUM_THREADS", 0)) // max(1, streams)
    rows = 2 * settings.max_batch
    kept = _Kept(components)
    found = kept.read()
    if found is not None:
        log.info("division of the device is kept from another start", extra=_fields(found))
        components.timestep_per_row = found.timestep_per_row
        return found
    started = time.monotonic()
    found = _measure_all(components, _layouts(components, streams, threads), rows, beat)
    log.info("division of the device is measured", extra=_fields(found, seconds=round(time.monotonic() - started, 2)))
    kept.write(found)
    return found


def _fields(tuning: Tuning, **more: object) -> dict[str, dict[str, object]]:
    return fields(
        streams=tuning.layout.streams,
        threads=tuning.layout.threads,
        rows=tuning.rows,
        step_ms=round(tuning.step_s * 1000, 1),
        **more,
    )


def _measure_all(components: Components, layouts: list[Layout], rows: int, beat: Callable[[str], None]) -> Tuning:
    """The best of the layouts worth trying, and the rows that suit it."""
    deadline = Deadline.after(BUDGET_S)
    beat("load")
    best = _try(components, layouts[0], beat)
    if len(layouts) > 1 and 2 * best.row_s <= LARGE_CALL_S:
        best = _best(components, best, layouts[1:], beat, deadline)
    components.timestep_per_row = best.per_row
    if rows:
        _check_pinned(components, best, rows, beat, deadline)
    else:
        rows = _choose_rows(components, best, beat, deadline)
    return Tuning(best.layout, rows, best.splits, best.step_s, best.per_row)


def _best(
    components: Components, whole: _Measured, others: list[Layout], beat: Callable[[str], None], deadline: Deadline
) -> _Measured:
    """The layout with the most rows a second by the clock: other work on the machine is met in turns, and the better one counts.

    CPU time would favour many threads: those that wait for one another cost none.

    Args:
        whole: the layout with all threads in one stream.
        others: the rest, from few streams to many.
    """
    between, most = others[:-1], others[-1]
    beat("load")
    tried = [whole, _try(components, most, beat)]
    rates = [0.0, 0.0]
    for is_second in (False, True):
        if deadline.is_expired():
            break
        for place, each in enumerate(tried):
            rate = _rate(
                components.measured_unets(each.layout),
                components.feeds.of(COMPARED_ROWS, timestep_per_row=each.per_row),
                each.layout,
                beat,
            )
            rates[place] = max(rates[place], rate.by_clock)
        if is_second or rates[1] >= CLEAR_GAIN * rates[0]:
            break  # where all threads lose clearly, half as many in twice the streams will not win clearly
        for layout in between:
            beat("load")
            tried.append(_try(components, layout, beat))
            rates.append(0.0)
    log.debug(
        "layouts were compared",
        extra=fields(**{str(each.layout): rate for each, rate in zip(tried, rates, strict=True)}),
    )
    leader = rates.index(max(rates))
    return tried[leader] if rates[leader] >= CLEAR_GAIN * rates[1] > 0 else tried[1]


def _layouts(components: Components, streams: int, threads: int) -> list[Layout]:
    if not components.denoiser_device.startswith("CPU"):
        return [Layout(streams or 1, 0)]
    cores = components.cpu_threads()
    if threads:
        return [Layout(streams or max(1, cores // threads), threads)]
    if streams:
        return [Layout(streams, max(1, cores // streams))]
    choices = [1, 2, 4] if cores >= 8 else [1, 2]
    most = min(cores, MOST_STREAMS)
    return [Layout(count, cores // count) for count in sorted({*(c for c in choices if c <= most), most})]


def _try(components: Components, layout: Layout, beat: Callable[[str], None]) -> _Measured:
    request = components.compile_unet(layout)[0]
    beat("warm-up")
    feeds, per_row = components.feeds, components.timestep_per_row
    times = 1
    if components.unet_bytes > HEAVY_UNET_BYTES:
        feeds, times = feeds.quarter()
    pair = run_unet(request, feeds.of(2, timestep_per_row=per_row))
    beat("warm-up")
    clock_s = cpu_s = 0.0
    for _ in range(2):
        began, began_cpu = time.monotonic(), time.process_time()
        second = run_unet(request, feeds.second(timestep_per_row=per_row))
        # Of the second call, which finds its kernels made; beside long calls those are nothing.
        clock_s, cpu_s = time.monotonic() - began, time.process_time() - began_cpu
        beat("warm-up")
        if clock_s > LARGE_CALL_S:
            break
    splits = bool(np.array_equal(pair[1:], second))
    if per_row and not splits:
        pair = run_unet(request, feeds.of(2, timestep_per_row=False))
        second = run_unet(request, feeds.second(timestep_per_row=False))
        per_row = not np.array_equal(pair[1:], second)
        splits = not per_row
    if not (splits and per_row):
        told = "the rows of a picture stay together" if per_row else "only rows at the same timestep share a call"
        log.warning("a row comes out otherwise beside another one: %s", told)
    clock_s, cpu_s = times * clock_s, times * cpu_s
    # A lone picture's rows go side by side where there are slots for them.
    step_s = clock_s if splits and layout.streams > 1 else 2 * clock_s
    row_s = min(clock_s, cpu_s / layout.threads) if layout.threads else clock_s
    return _Measured(layout, step_s, row_s, splits, per_row)


def _choose_rows(components: Components, best: _Measured, beat: Callable[[str], None], deadline: Deadline) -> int:
    """The fewest rows in a call beyond which more of them bring little; when time is up, as many as make a short call."""
    requests = components.measured_unets(best.layout)
    if best.step_s > LONGEST_CALL_S:
        return 2
    feeds = components.feeds
    make = partial(feeds.of, timestep_per_row=best.per_row)
    pair = run_unet(requests[0], make(2))
    most, most_rate = 2, _Rate(1 / best.row_s, 1 / best.row_s)
    if not deadline.is_expired():
        most_rate = _rate(requests, make(2), best.layout, beat)
    for rows in ROW_CHOICES:
        if rows * len(requests) / most_rate.by_clock > LONGEST_CALL_S or not _fits(components, rows, len(requests)):
            break
        if deadline.is_expired() and rows * best.row_s > SHORT_CALL_S:
            break
        if not np.array_equal(run_unet(requests[0], make(rows))[:2], pair):
            log.warning("rows of a call of %d differ from those of a call of 2: calls hold %d rows", rows, most)
            break
        if deadline.is_expired():
            most = rows
            continue
        rate = _rate(requests, make(rows), best.layout, beat)
        is_short = rows * len(requests) / rate.by_cpu < SHORT_CALL_S
        if rate.by_cpu >= (NOT_WORSE if is_short else WORTH_MORE_ROWS) * most_rate.by_cpu:
            most, most_rate = rows, rate
    return most


def _check_pinned(
    components: Components, best: _Measured, rows: int, beat: Callable[[str], None], deadline: Deadline
) -> None:
    """Tell where rows of a call of as many as are pinned come out otherwise than those of a call of two: when it is measured.

    Nothing is told where such a call is no quick one, or may not fit in memory: it is not tried then.
    """
    is_long = best.step_s > LONGEST_CALL_S or rows * best.row_s > deadline.remaining()
    if rows == 2 or is_long or not _fits(components, rows, 1):
        return
    request = components.measured_unets(best.layout)[0]
    make = partial(components.feeds.of, timestep_per_row=best.per_row)
    pair = run_unet(request, make(2))
    beat("warm-up")
    if not np.array_equal(run_unet(request, make(rows))[:2], pair):
        told = "max_batch=%d is kept, but rows of a call of %d differ from those of a call of 2: load changes pictures"
        log.warning(told, rows // 2, rows)
    beat("warm-up")


def _rate(requests: Sequence[Any], feed: dict[str, NDArray[Any]], layout: Layout, beat: Callable[[str], None]) -> _Rate:
    """Rows a second with a call always under way in each request."""

    def repeat(request: Any, until: float) -> int:
        count = 0
        while not count or time.monotonic() < until:
            run_unet(request, feed)
            count += 1
        return count

    with ThreadPoolExecutor(len(requests)) as pool:
        # The first call of a shape makes its kernels, which a quick call must not be charged with.
        for duration_s in (0.0, MEASURE_S):
            began, began_cpu = time.monotonic(), time.process_time()
            calls = sum(pool.map(repeat, requests, [began + duration_s] * len(requests)))
            clock_s, cpu_s = time.monotonic() - began, time.process_time() - began_cpu
            beat("warm-up")
            if clock_s > SLOW_CALL_S:
                break
    rows = calls * len(feed["sample"])
    busy_s = cpu_s / (layout.threads * len(requests)) if layout.threads else clock_s
    return _Rate(by_clock=rows / clock_s, by_cpu=rows / max(busy_s, 1e-6))


def _fits(components: Components, rows: int, streams: int) -> bool:
    """Whether rows of this size may be tried: by a generous guess of what a row's activations take."""
    size = components.profile.native
    # The widest layers of SD hold 320 channels of floats at 1/64 of the pixels, and tens of them are alive.
    row_bytes = size.width * size.height * 4 * 640
    return rows <= 2 or rows * streams * row_bytes < MEMORY_SHARE * available_bytes()


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process may still take: what the host has free, or what its container's limit leaves, if that is less.

    Args:
        proc, cgroups: where procfs and the unified hierarchy (cgroup v2) are mounted.
    """
    free = _field(proc / "meminfo", "MemAvailable:")
    resident = _field(proc / "self" / "status", "VmRSS:")
    return max(0, min([free, *(limit - resident for limit in _limits(proc / "self" / "cgroup", cgroups))]))


def _field(path: Path, name: str) -> int:
    """A field of procfs in bytes, which it gives in KiB; 0 where it is not there."""
    for line in path.read_text("ascii", "replace").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def _limits(own: Path, cgroups: Path) -> list[int]:
    """The limits of the control group that `own` names and of those around it, as far as they can be seen."""
    found = []
    try:
        group = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    place = cgroups / group.lstrip("/")
    for directory in (place, *place.parents):
        if not directory.is_relative_to(cgroups):
            break
        try:
            found.append(int((directory / "memory.max").read_text()))
        except (OSError, ValueError):
            continue  # no such file at the root; "max" where there is no limit
    return found


def warm_up(components: Components, tuning: Tuning, beat: Callable[[str], None]) -> None:
    """One call of each kind in each slot, then the numbers of rows that calls will have, for as long as WARM_UP_S.

    The first call of each shape makes its kernels: some tens of milliseconds for a small model, paid here and not by a client.
    `beat` is called from several threads at once. A large model in one slot needs none of this: the picture that is made before the engine is ready warms that slot.
    """
    is_large = tuning.step_s > LARGE_CALL_S
    if is_large and len(components.requests) == 1:
        return
    size, scale = components.profile.native, components.vae.scale
    latents = np.zeros((1, components.vae.latent_channels, size.height // scale, size.width // scale), np.float32)
    image = np.zeros((1, 3, size.height, size.width), np.float32)
    until = time.monotonic() + WARM_UP_S

    def warm(requests: Requests) -> None:
        if requests.vae_encoder is not None:
            run_encoder(requests.vae_encoder, image)
        beat("warm-up")
        run_decoder(requests.vae_decoder, latents)
        # Kernels for other numbers of rows are nothing beside the steps of a large model.
        for rows in (2,) if is_large else (2, 1, *range(4, tuning.rows + 1, 2)):
            beat("warm-up")
            run_unet(requests.unet, components.feeds.of(rows, timestep_per_row=tuning.timestep_per_row))
            if time.monotonic() > until:
                break

    with ThreadPoolExecutor(len(components.requests)) as pool:  # side by side, as the slots will run
        list(pool.map(warm, components.requests))


class _Kept:
    """The file beside the compiled models that holds the choice for this model on this machine."""

    def __init__(self, components: Components) -> None:
        settings = components.settings
        graph = components.profile.directory / "unet" / "openvino_model.xml"
        subject = [
            hashlib.blake2b(graph.read_bytes()).hexdigest(),
            ov.get_version(),
            settings.device,
            settings.plugin_config,
            str(components.profile.native),
            settings.streams,
            settings.threads,
            settings.max_batch,
            components.cpu_threads() if components.denoiser_device.startswith("CPU") else 0,
        ]
        key = hashlib.blake2b(json.dumps(subject).encode(), digest_size=16).hexdigest()
        self._path = settings.cache_dir / f"ovserve-division-{key}.json" if settings.cache_dir else None

    def read(self) -> Tuning | None:
        """The choice, or None where there is none or it cannot be read."""
        if self._path is None:
            return None
        try:
            document = json.loads(self._path.read_text("utf-8"))
            layout = Layout(int(document["layout"]["streams"]), int(document["layout"]["threads"]))
            return Tuning(
                layout,
                int(document["rows"]),
                bool(document["splits"]),
                float(document["step_s"]),
                bool(document["timestep_per_row"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, tuning: Tuning) -> None:
        """Keep the choice; a directory that cannot be written costs only the next start's measuring."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._path.with_suffix(".new")
            fresh.write_text(json.dumps(asdict(tuning)), "utf-8")
            fresh.replace(self._path)
        except OSError as error:
            log.warning("the division of the device was not kept: %s", error)
