"""The choice of streams, threads and rows in a call for one model, by measuring a few layouts at warm-up.

Invariant: the choice is made once for a served model. Every request then runs with the same number of threads under any
load, so load never changes a picture's bytes. Another number of threads can change the last bits, so measurement noise
must not decide: small models get single-threaded streams unless more threads win clearly, large ones all threads in one
stream. The choice is stored beside the compiled models (`cache_dir`), or the operator can pin it.

Only what can pay off is measured. A tiny model gets the single-threaded layout at once: its calls are so short that
threads would mostly wait for one another. For others the layout with all threads comes first; one call of it identifies
a large model, which keeps every core busy by itself, so no other layout is compiled for it. For a small model the
single-threaded layout follows, and the layouts between them only if neither won clearly. After BUDGET_S nothing more is
measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovserve.deadline import Deadline
from ovserve.engines.families.protocol import Feeds
from ovserve.engines.stepwise.compiled import Components, Layout, Requests, run_decoder, run_encoder
from ovserve.engines.stepwise.memory import available_bytes
from ovserve.logs import fields

__all__ = ["LARGE_CALL_S", "Tuning", "shared_rows", "tune", "warm_up", "warm_up_rows"]

log = logging.getLogger(__name__)

ROW_CHOICES = (4, 8, 16)  # rows of a call, besides the two of one picture
COMPARED_ROWS = 4  # rows of a call when layouts are compared
# Fewer slots with more threads must be faster than single-threaded slots by this factor. For the built-in model the
# single-threaded ones were 1.6 to 2.4 times as fast.
CLEAR_GAIN = 1.15
MIN_GAIN = 1.03  # more rows in a call must give this factor in rows a second, because they make each step longer
# Calls shorter than SHORT_CALL_S may even lose a little with more rows, because more pictures then fit into a call.
MIN_GAIN_SHORT = 0.95
SHORT_CALL_S = 0.05
LARGE_CALL_S = 0.25  # if two rows take longer, the model keeps every core busy by itself (measured, SD 1.5)
# Small models need 2 s on two idle cores. On a busy machine measuring takes longer, gives less, and delays the start.
BUDGET_S = 6.0
LONGEST_CALL_S = 0.5  # a new picture waits for the calls in flight
# Denoisers with more weights are measured on a quarter of the area: their calls take half a second or more.
HEAVY_DENOISER_BYTES = 256 * 1024 * 1024
# Only denoisers with fewer weights can be tiny. The built-in model has 10 MB, and rows of 2 ms.
TINY_DENOISER_BYTES = 64 * 1024 * 1024
TINY_ROW_S = 0.006  # CPU time of a row alone; in a call of 16 rows it is half of that (measured)
SLOW_CALL_S = 1.0  # if a round of calls takes longer, it is not repeated
MAX_STREAMS = 8  # each stream has its own copy of the weights
MEASURE_S = 0.12  # for each layout and number of rows
WARM_UP_S = 2.0  # for the kernels of the numbers of rows that calls will have
MIN_CAPACITY = 4  # pictures in flight; a short job then shares calls with a long one instead of waiting for it
RULES = 3  # of measuring; a choice stored under other rules is not read
MEMORY_SHARE = 0.5  # of the available memory, for the rows of one call


@dataclass(frozen=True, slots=True)
class Tuning:
    """The chosen layout and rows for one model.

    Attributes:
        rows: maximum rows in one call at the model's native size.
        splits: the rows of one picture may go into two calls, because a row alone has the same bits as one of two.
        step_s: measured duration of a step of one picture alone, with guidance.
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
        return max(MIN_CAPACITY, self.layout.streams * self.rows // 2)


@dataclass(frozen=True, slots=True)
class _Rate:
    """Rows a second, by the clock and by CPU time; other processes on the machine do not change the latter."""

    by_clock: float
    by_cpu: float


@dataclass(frozen=True, slots=True)
class _Timing:
    """Timings measured for one layout; `row_s` is the duration of a row without the share of other processes."""

    layout: Layout
    step_s: float
    row_s: float
    splits: bool
    per_row: bool


def tune(components: Components, beat: Callable[[str], None]) -> Tuning:
    """Return the stored choice of an earlier start with the same options; else measure what is not pinned.

    Raises:
        ModelError: a device cannot compile the denoiser.
    """
    settings = components.settings
    plugin: dict[str, Any] = json.loads(settings.plugin_config) if settings.plugin_config else {}
    streams = settings.streams or int(plugin.get("NUM_STREAMS", 0))
    threads = settings.threads or int(plugin.get("INFERENCE_NUM_THREADS", 0)) // max(1, streams)
    rows = 2 * settings.max_batch
    file = _TuningFile(components)
    found = file.read()
    if found is not None:
        log.info("device layout read from the cache", extra=_fields(found))
        components.timestep_per_row = found.timestep_per_row
        return found
    started = time.monotonic()
    found = _measure_all(components, _layouts(components, streams, threads), rows, beat)
    log.info("device layout measured", extra=_fields(found, seconds=round(time.monotonic() - started, 2)))
    file.write(found)
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
    """Choose a layout, then the rows for it."""
    deadline = Deadline.after(BUDGET_S)
    beat("load")
    single_threaded = _measure_single_threaded(components, layouts, beat)
    if single_threaded is not None and _is_tiny(components, single_threaded):
        best = single_threaded
    else:
        best = _measure_layout(components, layouts[0], beat)
        if len(layouts) > 1 and 2 * best.row_s <= LARGE_CALL_S:
            last = single_threaded or _measure_layout(components, layouts[-1], beat)
            best = _compare_layouts(components, best, layouts[1:-1], last, beat, deadline=deadline)
    components.timestep_per_row = best.per_row
    if rows:
        _check_pinned_rows(components, best, rows, beat, deadline)
    else:
        rows = _choose_rows(components, best, beat, deadline)
    return Tuning(best.layout, rows, best.splits, best.step_s, best.per_row)


def _measure_single_threaded(
    components: Components, layouts: list[Layout], beat: Callable[[str], None]
) -> _Timing | None:
    """Return the single-threaded layout, measured; None if it is not one of several, or the model cannot be tiny."""
    layout = layouts[-1]
    if len(layouts) == 1 or layout.threads != 1 or components.denoiser_bytes > TINY_DENOISER_BYTES:
        return None  # larger models are not compiled for each core before they are known to be small
    return _measure_layout(components, layout, beat)


def _is_tiny(components: Components, timing: _Timing) -> bool:
    return components.denoiser_bytes <= TINY_DENOISER_BYTES and timing.row_s <= TINY_ROW_S


def _compare_layouts(
    components: Components,
    one_stream: _Timing,
    between: list[Layout],
    single_threaded: _Timing,
    beat: Callable[[str], None],
    *,
    deadline: Deadline,
) -> _Timing:
    """Return the layout with the most rows a second by the clock, unless it wins too little over single threads.

    CPU time would favour many threads, because threads that wait for one another use none. Layouts are measured in
    turns, twice, and the better rate counts, so that other work on the machine affects all of them.

    Args:
        components: the models.
        one_stream: the layout with all threads in one stream.
        between: the layouts between the two others, from few streams to many.
        single_threaded: the layout with the fewest threads.
        beat: sends a heartbeat.
        deadline: after it, nothing more is measured.
    """
    beat("load")
    tried = [one_stream, single_threaded]
    rates = [0.0, 0.0]
    for is_second in (False, True):
        if deadline.is_expired():
            break
        for index, each in enumerate(tried):
            rate = _rate(components, each, COMPARED_ROWS, beat)
            rates[index] = max(rates[index], rate.by_clock)
        if is_second or rates[1] >= CLEAR_GAIN * rates[0]:
            break  # if one stream loses clearly, the layouts between will not win clearly
        for layout in between:
            beat("load")
            tried.append(_measure_layout(components, layout, beat))
            rates.append(0.0)
    log.debug(
        "layouts compared",
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
    highest = min(cores, MAX_STREAMS)
    return [Layout(count, cores // count) for count in sorted({*(c for c in choices if c <= highest), highest})]


def _measure_layout(components: Components, layout: Layout, beat: Callable[[str], None]) -> _Timing:
    """Compile the denoiser for a layout, time one row, and check that rows do not depend on other rows of the call."""
    request = components.compile_denoiser(layout)[0]
    beat("warm-up")
    feeds, per_row = components.feeds, components.timestep_per_row
    times = 1
    if components.denoiser_bytes > HEAVY_DENOISER_BYTES:
        feeds, times = feeds.quarter()
    pair = components.family.run(request, feeds.of(2, timestep_per_row=per_row))
    beat("warm-up")
    clock_s = cpu_s = 0.0
    for _ in range(2):
        began, began_cpu = time.monotonic(), time.process_time()
        second = components.family.run(request, feeds.second(timestep_per_row=per_row))
        # The second call counts: the first also makes the kernels. For long calls that is negligible.
        clock_s, cpu_s = time.monotonic() - began, time.process_time() - began_cpu
        beat("warm-up")
        if clock_s > LARGE_CALL_S:
            break
    splits = bool(np.array_equal(pair[1:], second))
    if per_row and not splits:
        pair = components.family.run(request, feeds.of(2, timestep_per_row=False))
        second = components.family.run(request, feeds.second(timestep_per_row=False))
        splits = bool(np.array_equal(pair[1:], second))
        per_row = not splits and _repeated_timestep_has_the_same_bits(components, request, pair, feeds)
    if not (splits and per_row):
        result = "the rows of a picture stay in one call" if per_row else "only rows at the same timestep share a call"
        log.warning("a row has other bits in a call with another row; %s", result)
    clock_s, cpu_s = times * clock_s, times * cpu_s
    # The two rows of one picture alone run side by side if there are slots for them.
    step_s = clock_s if splits and layout.streams > 1 else 2 * clock_s
    row_s = min(clock_s, cpu_s / layout.threads) if layout.threads else clock_s
    return _Timing(layout, step_s, row_s, splits, per_row)


def _repeated_timestep_has_the_same_bits(
    components: Components, request: Any, pair: NDArray[np.float32], feeds: Feeds
) -> bool:
    """Return whether a call of two rows has the same bits with its timestep once, as the library passes it, and twice.

    With int8 weights, the product of the timestep's embedding can round differently for two rows than for one.

    Args:
        components: the models.
        request: an infer request of the denoiser.
        pair: the result with the timestep once.
        feeds: what the call was made of.
    """
    feed = feeds.of(2, timestep_per_row=False)
    repeated = components.family.run(request, feed | {"timestep": np.repeat(feed["timestep"], 2)})
    return bool(np.array_equal(repeated, pair))


def _choose_rows(components: Components, best: _Timing, beat: Callable[[str], None], deadline: Deadline) -> int:
    """Return the rows in a call beyond which more gain little; after the deadline, the rows of a short call.

    For a tiny model these are all that keep their bits: what a call costs beside its rows is most of a small call.
    """
    requests = components.measured_denoisers(best.layout)
    if best.step_s > LONGEST_CALL_S:
        return 2
    feeds = components.feeds
    make = partial(feeds.of, timestep_per_row=best.per_row)
    pair = components.family.run(requests[0], make(2))
    most, most_rate = 2, _Rate(1 / best.row_s, 1 / best.row_s)
    is_tiny = best.layout.threads == 1 and _is_tiny(components, best)
    if not is_tiny and not deadline.is_expired():
        most_rate = _rate(components, best, 2, beat)
    for rows in ROW_CHOICES:
        if rows * len(requests) / most_rate.by_clock > LONGEST_CALL_S or not _fits(components, rows, len(requests)):
            break
        if deadline.is_expired() and rows * best.row_s > SHORT_CALL_S:
            break
        if not np.array_equal(components.family.run(requests[0], make(rows))[:2], pair):
            log.warning("rows of a call of %d differ from those of a call of 2; calls have at most %d rows", rows, most)
            break
        if is_tiny or deadline.is_expired():
            most = rows
            continue
        rate = _rate(components, best, rows, beat)
        is_short = rows * len(requests) / rate.by_cpu < SHORT_CALL_S
        if rate.by_cpu >= (MIN_GAIN_SHORT if is_short else MIN_GAIN) * most_rate.by_cpu:
            most, most_rate = rows, rate
    return most


def _check_pinned_rows(
    components: Components, best: _Timing, rows: int, beat: Callable[[str], None], deadline: Deadline
) -> None:
    """Log a warning if rows of a call with the pinned number of rows differ from those of a call of two.

    The check is skipped if such a call is long or may not fit in memory.
    """
    is_long = best.step_s > LONGEST_CALL_S or rows * best.row_s > deadline.remaining()
    if rows == 2 or is_long or not _fits(components, rows, 1):
        return
    request = components.measured_denoisers(best.layout)[0]
    make = partial(components.feeds.of, timestep_per_row=best.per_row)
    pair = components.family.run(request, make(2))
    beat("warm-up")
    if not np.array_equal(components.family.run(request, make(rows))[:2], pair):
        log.warning(
            "max_batch is %d, but rows of a call of %d differ from those of a call of 2: load changes pictures; "
            "use a smaller max_batch",
            rows // 2,
            rows,
        )
    beat("warm-up")


def _rate(components: Components, each: _Timing, rows: int, beat: Callable[[str], None]) -> _Rate:
    """Measure rows a second of a layout with a call of `rows` rows always in flight in each request."""
    requests = components.measured_denoisers(each.layout)
    feed = components.feeds.of(rows, timestep_per_row=each.per_row)

    def repeat(request: Any, until: float) -> int:
        count = 0
        while not count or time.monotonic() < until:
            components.family.run(request, feed)
            count += 1
        return count

    with ThreadPoolExecutor(len(requests)) as pool:
        # The first round is not measured: the first call of a shape makes its kernels.
        for duration_s in (0.0, MEASURE_S):
            began, began_cpu = time.monotonic(), time.process_time()
            calls = sum(pool.map(repeat, requests, [began + duration_s] * len(requests)))
            clock_s, cpu_s = time.monotonic() - began, time.process_time() - began_cpu
            beat("warm-up")
            if clock_s > SLOW_CALL_S:
                break
    busy_s = cpu_s / (each.layout.threads * len(requests)) if each.layout.threads else clock_s
    return _Rate(by_clock=calls * rows / clock_s, by_cpu=calls * rows / max(busy_s, 1e-6))


def _fits(components: Components, rows: int, streams: int) -> bool:
    """Return whether a call of so many rows may fit in memory, by a generous estimate of a row's activations."""
    size = components.profile.native
    # The widest layers of SD have 320 channels of floats at 1/64 of the pixels, and tens of them are alive at once.
    row_bytes = size.width * size.height * 4 * 640
    return rows <= 2 or rows * streams * row_bytes < MEMORY_SHARE * available_bytes()


def warm_up(components: Components, tuning: Tuning, beat: Callable[[str], None]) -> None:
    """Run one call of each kind in each slot, with the rows of one picture; up to WARM_UP_S also shared calls.

    The first call of each shape makes its kernels: some tens of milliseconds for a small model on a CPU, which no
    request should pay. There, those of shared calls are made in idle time. `beat` is called from several threads at
    once. A large model in one slot needs none of this: the picture that is made before the engine is ready warms up
    that slot.
    """
    is_large = tuning.step_s > LARGE_CALL_S
    if is_large and len(components.requests) == 1:
        return
    size, scale = components.profile.native, components.vae.scale
    latents = np.zeros((1, components.vae.latent_channels, size.height // scale, size.width // scale), np.float32)
    image = np.zeros((1, 3, size.height, size.width), np.float32)
    until = time.monotonic() + WARM_UP_S
    shared = () if tuning.layout.threads else shared_rows(tuning)

    def warm(requests: Requests) -> None:
        """Make the kernels of one slot."""
        if requests.vae_encoder is not None:
            run_encoder(requests.vae_encoder, image)
        beat("warm-up")
        run_decoder(requests.vae_decoder, latents)
        # For a large model, making the kernels for other numbers of rows is negligible compared with its steps.
        for rows in (2,) if is_large else (2, 1, *shared):
            beat("warm-up")
            warm_up_rows(components, tuning, requests, rows)
            if time.monotonic() > until:
                break

    with ThreadPoolExecutor(len(components.requests)) as pool:  # side by side, as the slots will run
        list(pool.map(warm, components.requests))


def shared_rows(tuning: Tuning) -> range:
    """Return the numbers of rows that `warm_up` leaves out: of calls that several pictures share; none if long."""
    is_long = tuning.step_s / 2 * tuning.rows > LARGE_CALL_S  # a step has two rows
    return range(0) if is_long else range(4, tuning.rows + 1, 2)


def warm_up_rows(components: Components, tuning: Tuning, requests: Requests, rows: int) -> None:
    """Make the kernels of one slot for calls with a number of rows."""
    components.family.run(requests.denoiser, components.feeds.of(rows, timestep_per_row=tuning.timestep_per_row))


class _TuningFile:
    """The file beside the compiled models that stores the choice for this model on this machine."""

    def __init__(self, components: Components) -> None:
        settings = components.settings
        graph = components.profile.directory / components.family.denoiser / "openvino_model.xml"
        subject = [
            RULES,
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
        """Return the stored choice, or None if there is none or it cannot be read."""
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
        """Store the choice. Best effort: without the file, the next start measures again."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._path.with_suffix(".new")
            fresh.write_text(json.dumps(asdict(tuning)), "utf-8")
            fresh.replace(self._path)
        except OSError as error:
            log.warning("device layout not stored, so the next start measures again: %s", error)
