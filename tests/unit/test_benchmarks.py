from __future__ import annotations

import http.server
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks import bench_sizes, compare, in_process, metadata, run, stats
from benchmarks.aims import LONE_STEPS, OURS, Aim, list_aims
from benchmarks.bench_account import REST, difference, outside_share, read_account
from benchmarks.bench_sizes import Model, add_full_depth, add_ratios, check_depths, find_models
from benchmarks.edits import BOUNDARY, Body, Kind, encode_form, parse_kind
from benchmarks.extrapolate import describe_blocks, extrapolate, pool
from benchmarks.load import Load, Report, Sample, Target, apply_load
from benchmarks.load import main as load_main
from benchmarks.plot import Point, line_chart
from benchmarks.render import NOTES, PAGE, PLOTS, account, newest, render
from benchmarks.results import DIRECTORY, Result, Series, read_result
from benchmarks.servers import SERVICES
from ovserve.front.forms.multipart import MultipartParser, PartData
from ovserve.models.profile import builtin_directory

STEADY = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01]


def result_of(name: str, values: list[float], *, better: str = "lower", unit: str = "s") -> Result:
    result = Result(name, {"date": "2026-01-02T00:00:00+00:00", "commit": "0123456789", "busy": False})
    result.add("latency", values, unit=unit, better=better, case={"server": "a"})
    return result


def saved(folder: Path, label: str, result: Result) -> str:
    return str(result.save(folder / f"{label}.json"))


class TestStats:
    def test_the_interval_holds_the_median_and_narrows_with_more_values(self) -> None:
        few, many = stats.estimate(STEADY), stats.estimate(STEADY * 20)
        assert few.low <= few.value <= few.high
        assert many.high - many.low < few.high - few.low

    def test_the_interval_covers_the_true_median_in_most_samples(self) -> None:
        import numpy as np

        generator = np.random.default_rng(3)
        held = 0
        for _ in range(60):
            estimate = stats.estimate(list(generator.lognormal(0.0, 0.5, 40)))
            held += estimate.low <= 1.0 <= estimate.high
        assert held >= 52  # 95 % of 60 is 57

    def test_few_values_give_their_whole_range(self) -> None:
        assert stats.estimate([3.0, 1.0, 2.0]) == stats.Estimate(2.0, 1.0, 3.0, 3)
        ratio = stats.ratio([2.0, 4.0], [1.0, 2.0])
        assert (ratio.low, ratio.high) == (1.0, 4.0)

    def test_the_same_sample_gives_the_same_interval(self) -> None:
        assert stats.estimate(STEADY, 90) == stats.estimate(STEADY, 90)

    def test_a_ratio_of_twice_is_two(self) -> None:
        ratio = stats.ratio([2 * value for value in STEADY], STEADY)
        assert ratio.value == pytest.approx(2, rel=0.01)
        assert 1.9 < ratio.low <= ratio.high < 2.1

    @pytest.mark.parametrize(
        ("values", "warning"),
        [
            ([1.0], "only 1 value"),
            ([1.0, 2.0, 3.0, 4.0], "spreads over"),
            ([1.0] * 9 + [2.0], "one value is 100%"),
            ([0.0001] * 5, "below 1 ms"),
        ],
    )
    def test_unreliable_samples_have_a_warning(self, values: list[float], warning: str) -> None:
        assert warning in " ".join(stats.warnings_of(values, "s"))

    def test_a_stable_sample_has_no_warning(self) -> None:
        assert stats.warnings_of(STEADY, "s") == []

    def test_an_empty_sample_is_rejected(self) -> None:
        with pytest.raises(ValueError, match="no values"):
            stats.estimate([])


class TestResults:
    def test_a_saved_result_is_read_back_unchanged(self, tmp_path: Path) -> None:
        written = result_of("r", STEADY)
        written.add("latency", [5.0], unit="s", case={"server": "b"})
        read = read_result(written.save(tmp_path / "r.json"))
        assert read == written
        assert read.find("latency", server="b").values == (5.0,)

    def test_values_of_the_same_case_are_appended(self) -> None:
        result = result_of("r", [1.0])
        result.add("latency", [2.0], unit="s", case={"server": "a"})
        assert result.find("latency").values == (1.0, 2.0)

    def test_a_file_that_is_not_a_result_is_rejected(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text('{"schema": 1}')
        with pytest.raises(ValueError, match="not a result file"):
            read_result(path)

    def test_metadata_records_commit_machine_packages_and_model(self) -> None:
        record = metadata.collect(Path("ovserve/builtin"))
        assert re.fullmatch(r"[0-9a-f]{10}(-dirty)?|unknown", record["commit"])
        assert record["cpu"]
        assert record["cores"] >= 1
        assert record["packages"]["openvino"]
        assert re.fullmatch(r"[0-9a-f]{16}", record["model"]["sha256"])

    def test_a_changed_model_has_another_hash(self, tmp_path: Path) -> None:
        weights = tmp_path / "unet.bin"
        weights.write_bytes(b"1")
        before = metadata.hash_of_model(tmp_path)
        weights.write_bytes(b"2")
        assert metadata.hash_of_model(tmp_path) != before


class TestCompare:
    def test_a_slowdown_gives_exit_code_1(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        old = saved(tmp_path, "old", result_of("r", STEADY))
        new = saved(tmp_path, "new", result_of("r", [1.3 * value for value in STEADY]))
        assert compare.main([old, new]) == 1
        assert "worse: 1 of 1: latency server=a" in capsys.readouterr().out
        assert compare.main([new, old]) == 0

    def test_a_lower_throughput_is_a_regression_too(self, tmp_path: Path) -> None:
        old = saved(tmp_path, "old", result_of("r", STEADY, better="higher", unit="1/s"))
        new = saved(tmp_path, "new", result_of("r", [0.7 * value for value in STEADY], better="higher", unit="1/s"))
        assert compare.main([old, new]) == 1
        assert compare.main([new, old]) == 0

    def test_noise_is_not_a_regression(self, tmp_path: Path) -> None:
        noisy = [1.0, 1.6, 0.7, 1.3, 0.9, 1.1, 1.5, 0.8]
        old = saved(tmp_path, "old", result_of("r", noisy))
        new = saved(tmp_path, "new", result_of("r", [1.08 * value for value in noisy[::-1]]))
        assert compare.main([old, new]) == 0

    def test_a_figure_without_direction_is_never_worse(self, tmp_path: Path) -> None:
        old = saved(tmp_path, "old", result_of("r", STEADY, better="none"))
        new = saved(tmp_path, "new", result_of("r", [9 * value for value in STEADY], better="none"))
        assert compare.main([old, new]) == 0

    def test_a_worse_tail_is_a_regression_even_with_an_equal_median(self, tmp_path: Path) -> None:
        old = saved(tmp_path, "old", result_of("r", STEADY * 100))
        new = saved(tmp_path, "new", result_of("r", [*(STEADY * 97), *([5.0] * 24)]))
        assert compare.main([old, new]) == 1

    def test_files_without_a_common_figure_are_an_error(self, tmp_path: Path) -> None:
        other = Result("r", {"commit": "x"})
        other.add("memory", [1.0], unit="bytes")
        assert compare.main([saved(tmp_path, "a", result_of("r", STEADY)), saved(tmp_path, "b", other)]) == 2
        assert compare.main([str(tmp_path / "none.json"), str(tmp_path / "none.json")]) == 2

    def test_a_sleep_in_a_command_is_a_regression(self, tmp_path: Path) -> None:
        work = "import time; a = time.perf_counter(); sum(range(300000)); {sleep}; b = time.perf_counter()"
        output = "import json; print(json.dumps({{'series': {{'loop': {{'values': [b - a]}}}}}}))"
        paths = []
        for label, sleep in (("old", "pass"), ("new", "time.sleep(0.2)")):
            code = f"{work}; {output}".format(sleep=sleep)
            result = run.run_commands(label, {"toy": [sys.executable, "-c", code]}, runs=3, warm_ups=1)
            paths.append(saved(tmp_path, label, result))
        assert compare.main(paths) == 1
        assert compare.main([paths[0], paths[0]]) == 0


class TestRun:
    def test_runs_are_interleaved_and_warm_ups_are_dropped(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        code = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
        commands = {label: [sys.executable, "-c", code, str(log), label] for label in "ab"}
        result = run.run_commands("toy", commands, runs=2, warm_ups=1)
        order = log.read_text()
        assert sorted(order) == ["a", "a", "a", "b", "b", "b"]
        assert all(sorted(order[turn : turn + 2]) == ["a", "b"] for turn in (0, 2, 4))
        assert [len(series.values) for series in result.select("wall time")] == [2, 2]

    def test_the_error_of_a_failing_command_contains_its_output(self) -> None:
        with pytest.raises(RuntimeError, match="no such luck"):
            run.run_commands(
                "toy", {"a": [sys.executable, "-c", "raise SystemExit('no such luck')"]}, runs=1, warm_ups=0
            )

    def test_the_command_line_writes_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "out.json"
        command = f'a={sys.executable} -c "pass"'
        assert run.main([command, "--runs", "1", "--warm_ups", "0", "--name", "toy", "--out", str(path)]) == 0
        assert read_result(path).find("wall time", command="a").values[0] > 0


class TestEdits:
    def test_requests_differ_and_repeat(self) -> None:
        kind = parse_kind("masked")
        assert kind.body(3) == kind.body(3)
        assert len({kind.body(index).content for index in range(20)}) == 20

    def test_a_kind_can_repeat_the_same_request(self) -> None:
        kind = parse_kind("edit:same=1")
        assert kind.body(1) == kind.body(2)

    def test_fields_and_weights_are_read(self) -> None:
        kind = parse_kind("edit*3:num_inference_steps=4;size=64x64", {"model": "m", "size": "8x8"})
        assert kind.weight == 3
        assert dict(kind.fields) == {"model": "m", "num_inference_steps": "4", "size": "64x64"}

    def test_generations_are_sent_as_json(self) -> None:
        body = parse_kind("generate:num_inference_steps=4").body(0)
        assert isinstance(body, Body)
        assert (body.task, body.media_type) == ("generations", "application/json")
        assert json.loads(body.content)["num_inference_steps"] == 4

    @pytest.mark.parametrize("text", ["draw", "edit:steps", "edit*x"])
    def test_a_malformed_kind_is_rejected(self, text: str) -> None:
        with pytest.raises(ValueError, match=r".+"):
            parse_kind(text)

    @pytest.mark.parametrize("upload_bytes", [100_000, 1_000_000])
    def test_an_upload_has_about_the_requested_size(self, upload_bytes: int) -> None:
        size = len(parse_kind(f"edit:upload_bytes={upload_bytes}").body(0).content)
        assert 0.98 * upload_bytes < size < 1.02 * upload_bytes


class Toy(http.server.BaseHTTPRequestHandler):
    """A server that answers after `delay_s`, one request at a time, like a model."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and content are written separately
    delay_s = 0.02
    turn = threading.Lock()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.turn:
            time.sleep(self.delay_s)
        self.answer(b'{"data": []}')

    def do_GET(self) -> None:
        self.answer(b"ok")

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Server-Timing", "queue;dur=900.0, prepare;dur=2.0, denoise;dur=5.5, finish;dur=1.5")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def toy() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Toy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class TestLoad:
    def test_a_closed_loop_reaches_but_does_not_exceed_the_capacity_of_the_server(self, toy: str) -> None:
        report = apply_load(Target(toy), Load(clients=4, seconds=1.0, warm_up_s=0.2))
        assert 10 < report.throughput <= 51
        assert set(report.outcomes()) == {"200"}

    def test_an_open_loop_keeps_its_rate_and_counts_the_wait(self, toy: str) -> None:
        report = apply_load(Target(toy), Load(rate=80, seconds=1.0, warm_up_s=0.0, in_flight=16))
        assert len(report.samples) == 80  # at most 50 per second are answered; the wait of the others counts
        assert max(report.latencies()) > 0.3
        due = [sample.due_s for sample in report.samples]
        assert due == pytest.approx([index / 80 for index in range(80)])

    def test_overhead_is_latency_minus_the_work_in_server_timing(self, toy: str) -> None:
        report = apply_load(Target(toy), Load(clients=1, seconds=30, warm_up_s=0, requests=3))
        expected = [sample.latency_s - 0.009 for sample in report.samples]  # time in the queue is not work
        assert report.overheads() == pytest.approx(expected)
        assert Report(1.0, [Sample("edit", 0.0, 0.0, 1.0, 200, 1)]).overheads() == []  # no Server-Timing field

    def test_the_number_of_requests_is_bounded(self, toy: str) -> None:
        report = apply_load(Target(toy), Load(clients=3, seconds=60, warm_up_s=0, requests=7))
        assert len(report.samples) == 7
        assert report.throughput > 5

    def test_it_begins_with_its_first_request(self, toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
        sent: list[int] = []
        body = Kind.body

        def recorded(kind: Kind, index: int) -> Body:
            sent.append(index)
            return body(kind, index)

        load = Load(clients=1, seconds=30, warm_up_s=0, requests=3, first=100)
        monkeypatch.setattr(Kind, "body", recorded)
        apply_load(Target(toy), load)
        assert sent[-3:] == [100, 101, 102]
        assert min(sent) == 100

    def test_abandoned_requests_are_counted_separately(self, toy: str) -> None:
        load = Load(clients=2, seconds=30, warm_up_s=0, requests=10, abandon=1.0, abandon_after_s=0.001)
        assert apply_load(Target(toy), load).outcomes() == {"abandoned": 10}

    def test_health_is_probed_during_the_load(self, toy: str) -> None:
        report = apply_load(Target(toy), Load(clients=1, seconds=0.5, warm_up_s=0, probe="/health", probe_every_s=0.02))
        assert 5 <= len(report.probes) <= 26
        assert report.failed_probes == 0

    def test_kinds_are_mixed_by_weight(self, toy: str) -> None:
        kinds = [parse_kind("edit*3"), parse_kind("generate")]
        report = apply_load(Target(toy), Load(clients=4, seconds=30, warm_up_s=0, requests=60, kinds=kinds))
        assert 32 <= len(report.latencies("edit*3")) <= 56

    def test_a_refused_connection_is_an_outcome(self) -> None:
        report = apply_load(Target("http://127.0.0.1:1"), Load(clients=1, seconds=5, warm_up_s=0, requests=2))
        assert report.outcomes() == {"ConnectionRefusedError": 2}
        assert load_main(["http://127.0.0.1:1", "--requests", "1", "--seconds", "5", "--warm_up_s", "0"]) == 1

    def test_the_command_line_prints_every_sample_as_json(self, toy: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert load_main([toy, "--requests", "5", "--seconds", "9", "--warm_up_s", "0", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["outcomes"] == {"200": 5}
        assert len(printed["samples"]) == 5

    @pytest.mark.parametrize(
        "wrong", [{"seconds": 0.0}, {"clients": 9999}, {"requests": 0}, {"kinds": ()}, {"abandon": 2.0}]
    )
    def test_a_load_with_a_value_out_of_range_is_rejected(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r".+"):
            Load(**wrong)

    def test_latency_counts_from_the_due_time(self) -> None:
        sample = Sample("edit", due_s=1.0, sent_s=3.0, done_s=3.5, status=200, bytes=1)
        assert sample.latency_s == 2.5
        assert Report(1.0, [sample]).latencies() == [2.5]


def test_the_server_can_parse_the_encoded_form() -> None:
    parser = MultipartParser(BOUNDARY, max_parts=9, max_part_head_bytes=999)
    events = parser.feed(encode_form({"prompt": "x"}, {"image": b"png"}))
    parser.finish()
    assert b"".join(bytes(event.data) for event in events if isinstance(event, PartData)) == b"xpng"


class TestPage:
    def test_the_page_is_rendered_from_the_committed_results(self) -> None:
        page, plots = render(newest(), NOTES.read_text("utf-8"))
        assert PAGE.read_text("utf-8") == page, "run python -m benchmarks.render"
        assert {path.name: path.read_text("utf-8") for path in PLOTS.glob("*.svg")} == plots

    def test_every_committed_result_can_be_read(self) -> None:
        for path in DIRECTORY.glob("*.json"):
            result = read_result(path)
            assert path.name == f"{result.metadata['date'][:10]}-{result.metadata['commit']}-{result.name}.json"

    def test_the_newest_file_of_each_benchmark_is_used(self, tmp_path: Path) -> None:
        old, new = result_of("r", [1.0]), result_of("r", [2.0])
        new.metadata["date"] = "2026-01-03T00:00:00+00:00"
        new.save(tmp_path / "a.json")
        old.save(tmp_path / "b.json")
        assert newest(tmp_path)["r"][1] == new

    def test_a_model_missing_in_the_newest_file_is_taken_from_an_older_one(self, tmp_path: Path) -> None:
        old, new = result_of("r", [1.0]), result_of("r", [2.0])
        old.series = [Series("x", {"model": model}, "s", "lower", (1.0,)) for model in ("small", "large")]
        new.series = [Series("x", {"model": "small"}, "s", "lower", (2.0,))]
        new.metadata["date"] = "2026-01-03T00:00:00+00:00"
        new.save(tmp_path / "new.json")
        old.save(tmp_path / "old.json")
        path, found = newest(tmp_path)["r"]
        assert path.name == "new.json"
        assert [(series.case["model"], series.values) for series in found.series] == [
            ("small", (2.0,)),
            ("large", (1.0,)),
        ]
        page, _ = render({"r": (path, found)}, "")
        assert "| r, other models | old.json |" in page

    def test_the_verdict_of_an_aim_depends_on_bound_and_interval(self) -> None:
        sure, close = stats.Ratio(2.5, 2.4, 2.6), stats.Ratio(2.1, 1.9, 2.2)
        assert Aim("a", 2.0, sure).verdict == "met"
        assert Aim("a", 2.0, sure, is_maximum=True).verdict == "**missed**"
        assert Aim("a", 2.0, close).verdict == "met, within noise"
        assert Aim("a", 2.0, None).verdict == ""

    def test_one_client_has_an_aim_and_a_column_for_each_number_of_steps(self) -> None:
        result = Result("serving", {"date": "2026-01-02T00:00:00+00:00", "commit": "0123456789"})
        result.add("bare edit", [0.08] * 8, case={"model": "builtin"})
        for steps in LONE_STEPS:
            case = {"workload": "one client", "steps": steps}
            result.add("bare edit", [0.01 * steps] * 8, case=case)
            result.add("latency", [0.008 * steps] * 8, case=case | {"server": OURS})
        found = {aim.name: aim for aim in list_aims(result)}
        for steps in LONE_STEPS:
            over = "over the bare pipeline with decoding and encoding"
            aim = found[f"one client, {steps} steps, engine stepwise, {over}"]
            assert aim.verdict == "met"
            assert aim.measured is not None
            assert aim.measured.value == pytest.approx(0.8)
        page, _ = render({"serving": (Path("x.json"), result)}, "")
        assert "| server | 4 steps | 12 steps | 16 steps | 32 steps |" in page
        assert f"| {OURS} | 32 [32, 32] ms | 96 [96, 96] ms | 128 [128, 128] ms | 256 [256, 256] ms |" in page

    def test_notes_are_placed_below_the_table_of_their_section(self, tmp_path: Path) -> None:
        path = result_of("toy", STEADY).save(tmp_path / "toy.json")
        page, _ = render(newest(tmp_path), "\n## Benchmark: toy\n\nSlow because of the sleep.\n")
        assert page.index("| latency | a |") < page.index("Slow because of the sleep.")
        assert path.name in page

    def test_a_chart_is_an_svg_with_a_circle_for_each_point(self) -> None:
        points = [Point(1, 2, 1, 3), Point(10, 4, 3, 5)]
        drawn = line_chart("a < b", "x", "y", {"one": points, "two": points}, log_x=True, log_y=True)
        assert drawn == line_chart("a < b", "x", "y", {"one": points, "two": points}, log_x=True, log_y=True)
        root = ET.fromstring(drawn)
        assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 4

    def test_a_chart_without_points_or_with_a_log_of_zero_is_rejected(self) -> None:
        with pytest.raises(ValueError, match="nothing"):
            line_chart("t", "x", "y", {})
        with pytest.raises(ValueError, match="above zero"):
            line_chart("t", "x", "y", {"one": [Point(0, 1, 1, 1)]}, log_x=True)


FULL = {"double": 5, "single": 20, "text": 36}
DEPTHS = (
    {"double": 1, "single": 1, "text": 3},
    {"double": 3, "single": 1, "text": 3},
    {"double": 1, "single": 4, "text": 3},
    {"double": 1, "single": 1, "text": 6},
)


def depth_models(depths: tuple[dict[str, int], ...] = DEPTHS) -> list[Model]:
    return [Model("klein", Path("x"), 256, weights, blocks, FULL) for blocks in depths for weights in ("fp16", "int8")]


class TestExtrapolation:
    @staticmethod
    def plane(blocks: dict[str, int]) -> float:
        return 2.0 + 0.5 * blocks["double"] + 0.25 * blocks["single"] + 0.125 * blocks["text"]

    def test_the_value_of_the_full_model_is_on_the_plane_through_the_points(self) -> None:
        points = [(blocks, self.plane(blocks)) for blocks in DEPTHS]
        assert extrapolate(points, FULL) == pytest.approx(2.0 + 2.5 + 5.0 + 4.5)
        assert extrapolate(points[::-1], FULL) == pytest.approx(14.0)
        assert extrapolate(points, DEPTHS[2]) == pytest.approx(self.plane(DEPTHS[2]))

    def test_two_depths_of_one_kind_give_a_line(self) -> None:
        assert extrapolate([({"main": 1}, 10.0), ({"main": 3}, 16.0)], {"main": 30}) == pytest.approx(97.0)

    def test_kinds_that_are_not_asked_for_do_not_count(self) -> None:
        points = [({"main": 1, "text": 2}, 10.0), ({"main": 3, "text": 9}, 16.0)]
        assert extrapolate(points, {"main": 30}) == pytest.approx(97.0)

    @pytest.mark.parametrize(
        ("depths", "reason"),
        [
            (DEPTHS[:3], "3 models for 3 kinds"),
            ((*DEPTHS, {"double": 2, "single": 2, "text": 4}), "5 models"),
            ((*DEPTHS[:3], DEPTHS[0]), "do not tell them apart"),
            ((*DEPTHS[:3], {"double": 3, "single": 4, "text": 3}), "do not tell them apart"),
        ],
    )
    def test_depths_that_do_not_determine_the_plane_are_rejected(
        self, depths: tuple[dict[str, int], ...], reason: str
    ) -> None:
        with pytest.raises(ValueError, match=reason):
            extrapolate([(blocks, 1.0) for blocks in depths], FULL)

    def test_models_that_differ_in_another_kind_are_put_together(self) -> None:
        measured = [
            ({"main": 1, "text": 2}, [1.0, 2.0]),
            ({"main": 3, "text": 2}, [7.0]),
            ({"main": 1, "text": 5}, [9.0]),
        ]
        assert pool(measured, ["main"]) == [({"main": 1}, 2.0), ({"main": 3}, 7.0)]
        assert pool(measured, ["text"]) == [({"text": 2}, 2.0), ({"text": 5}, 9.0)]


class TestSizes:
    def result(self) -> Result:
        result = Result("sizes", {"date": "2026-01-02T00:00:00+00:00", "commit": "0123456789"})
        for model in depth_models():
            text, others = model.blocks["text"], 2 * model.blocks["double"] + model.blocks["single"]
            size = 1 if model.weights == "fp16" else 0.5
            for side in ("stepwise", "library"):
                case = model.case | {"side": side}
                result.add("step", [size * others, size * others], case=case)
                result.add("rest of an edit", [3 + text], case=case)
                result.add("ready", [1 + text + others], case=case)
                result.add("private memory", [size * (text + others)], unit="bytes", case=case)
        return result

    def test_figures_of_the_full_depth_are_added_for_each_engine_and_weights(self) -> None:
        result = self.result()
        add_full_depth(result, depth_models())
        blocks = f"extrapolated to {describe_blocks(FULL)}"
        for figure, weights, expected in (
            ("step", "fp16", 30.0),
            ("step", "int8", 15.0),
            ("rest of an edit", "fp16", 39.0),
            ("ready", "int8", 67.0),
            ("private memory", "fp16", 66.0),
            ("private memory", "int8", 33.0),
        ):
            for side in ("stepwise", "library"):
                found = result.find(figure, model="klein", weights=weights, side=side, blocks=blocks)
                assert found.values == (pytest.approx(expected),)

    def test_the_ratio_of_a_step_is_that_of_equal_cases(self) -> None:
        result = self.result()
        add_full_depth(result, depth_models())
        add_ratios(result)
        ratios = result.select("step, int8 over fp16")
        assert len(ratios) == 2 * (len(DEPTHS) + 1)
        assert {value for series in ratios for value in series.values} == {0.5}

    def test_a_depth_that_is_not_measured_leaves_the_figures_out(self) -> None:
        result = self.result()
        result.series = [
            series
            for series in result.series
            if (series.name, series.case["blocks"], series.case["side"])
            != ("ready", describe_blocks(DEPTHS[1]), "library")
        ]
        add_full_depth(result, depth_models())
        found = [series for series in result.select("ready") if "extrapolated" in str(series.case["blocks"])]
        assert {series.case["side"] for series in found} == {"stepwise"}

    def test_a_figure_that_falls_with_more_blocks_is_left_out_and_named(self) -> None:
        result = Result("sizes", {})
        for model in depth_models():
            for side in ("stepwise", "library"):
                ready = 9.0 if model.blocks == DEPTHS[0] else 8.0  # noise: the smallest model took longest
                result.add("ready", [ready], case=model.case | {"side": side})
        add_full_depth(result, depth_models())
        assert not [series for series in result.series if "extrapolated" in str(series.case["blocks"])]
        assert len(result.metadata["skipped"]) == 4
        assert "ready is -" in result.metadata["skipped"][0]

    def test_depths_are_checked_before_anything_is_measured(self) -> None:
        check_depths(depth_models())
        check_depths(depth_models(DEPTHS[:1]))
        with pytest.raises(ValueError, match="3 models for 3 kinds"):
            check_depths(depth_models(DEPTHS[:3]))

    def test_a_folder_has_a_model_for_each_kind_of_weights(self, tmp_path: Path) -> None:
        for place in ("openvino", "int8"):
            (tmp_path / place).mkdir()
            (tmp_path / place / "model_index.json").write_text("{}")
        (tmp_path / "blocks.json").write_text(json.dumps({"blocks": DEPTHS[0], "full": FULL}))
        found = find_models(f"klein={tmp_path}@512")
        assert [(model.weights, model.directory.name, model.side_px) for model in found] == [
            ("fp16", "openvino", 512),
            ("int8", "int8", 512),
        ]
        assert found[0].case["blocks"] == "1 double, 1 single, 3 text"
        assert [model.weights for model in find_models(f"k={tmp_path}@64", ["int8"])] == ["int8"]
        own = find_models(f"sd15={tmp_path / 'int8'}@64")
        assert [(model.weights, dict(model.blocks)) for model in own] == [("as given", {})]

    @pytest.mark.parametrize("argument", ["sd15", "sd15=x", "sd15=x@big", "=x@512", "sd15=none@512"])
    def test_an_argument_without_a_model_is_rejected(self, argument: str) -> None:
        with pytest.raises(ValueError, match=r"not NAME=FOLDER@SIDE|no model_index.json"):
            find_models(argument)

    def test_the_page_marks_extrapolated_figures_and_gives_them_no_interval(self) -> None:
        result = self.result()
        result.add("step", [3.0], case={"model": "sd15", "weights": "fp16", "side_px": 512, "side": "library"})
        add_full_depth(result, depth_models())
        add_ratios(result)
        page, _ = render({"sizes": (Path("sizes.json"), result)}, "")
        rows = [line for line in page.splitlines() if line.startswith(("| klein", "| sd15"))]
        assert len(rows) == 4 * (len(DEPTHS) + 1) + 1
        assert rows[-1].startswith("| sd15 | all | fp16 | library | 512 | 3 [3, 3] s |")
        assert "| 1 double, 1 single, 3 text | int8 | stepwise | 256 | 1.5 [1.5, 1.5] s |" in rows[4 - 2]
        last = rows[4 * len(DEPTHS)]
        assert "| *extrapolated to 5 double, 20 single, 36 text* | fp16 | stepwise | 256 | *30 s* | *39 s* |" in last


def test_simulated_devices_are_busy_until_the_front_end_is_the_limit() -> None:
    from benchmarks.bench_scale import simulate

    assert simulate(10, 1.0, 0.0, 0.0) > 0.8  # the last jobs do not end together
    assert simulate(10, 1.0, 0.001, 0.003) > 0.8
    assert simulate(1000, 1.0, 0.01, 0.0, rounds=10) < 0.12, "a hundred requests a second keep a hundred devices busy"
    assert simulate(10, 1.0, 0.0, 1.0) < 0.6, "half of the time is spent on the way"


def test_the_edit_in_one_process_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"engine": "genai", "side_px": 256, "steps": 2, "edits": 1}
    monkeypatch.setattr(sys, "argv", ["in_process", *(f"--{name}={value}" for name, value in options.items())])
    in_process.main()
    series = json.loads(capsys.readouterr().out)["series"]
    assert 0 < series["in process, encoding"]["values"][0] < series["in process"]["values"][0]


def test_the_account_of_an_edit_adds_up(tmp_path: Path) -> None:
    names = {"UNet": 3.0, "dispatcher": 0.25}
    for pid, (process, parts, cpu_s) in enumerate((("worker", {"UNet": 1.0, "PNG": 0.5}, 2.0), ("front end", {}, 0.5))):
        document = {"process": process, "parts": parts, "cpu_s": cpu_s}
        (tmp_path / f"{pid}.json").write_text(json.dumps(document), "utf-8")
    before = read_account(tmp_path, wait_s=0)
    assert before == {("worker", "UNet"): 1.0, ("worker", "PNG"): 0.5, ("worker", REST): 0.5, ("front end", REST): 0.5}
    document = {"process": "front end", "parts": names, "cpu_s": 4.5}
    (tmp_path / "2.json").write_text(json.dumps(document), "utf-8")
    account = difference(before, read_account(tmp_path, wait_s=0), edits=2)
    assert account["front end", "UNet"] == 1.5
    assert account["front end", REST] == pytest.approx(0.625)
    assert account["worker", "UNet"] == 0
    assert outside_share(account) == pytest.approx((0.125 + 0.625) / 2.25)


def test_the_table_of_the_account_has_shares_and_the_largest_part_first() -> None:
    result = Result("account", {"date": "2026-01-02T00:00:00+00:00", "commit": "0123456789"})
    for clients, parts in ((1, {"UNet": 0.03, "PNG": 0.01}), (8, {"UNet": 0.015, "PNG": 0.005})):
        for part, seconds in parts.items():
            case = {"clients": clients, "process": "worker", "part": part}
            result.add("cpu for an edit", [seconds], case=case)
        result.add("cpu for an edit, all", [sum(parts.values())], case={"clients": clients})
        result.add("outside the model's calls", [0.25], unit="", case={"clients": clients})
    table = "\n".join(account(result))
    assert "| process | part | 1 client | 8 clients |" in table
    assert "| worker | UNet | 30.00 ms, 75.0% | 15.00 ms, 75.0% |\n| worker | PNG | 10.00 ms, 25.0% |" in table
    assert "| all |  | 40.00 ms, 100.0% | 20.00 ms, 100.0% |" in table
    assert "| all | outside the model's calls | 0.25" in table


def test_no_edit_of_a_size_benchmark_can_come_from_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr("benchmarks.bench_sizes._engine", lambda _: made.append)
    here, there = Pipe()
    with here, there:
        bench_sizes.run("stepwise", Model("a", builtin_directory(), 64, "as given", {}, {}), 3, there)
        found, _ = here.recv()
    assert [name for name, _ in found].count("step") == 3
    assert [work.num_inference_steps for work in made] == [1, *(1, bench_sizes.MOST_STEPS) * 3]
    assert len({work.prompt for work in made}) == len({work.initial_image.tobytes() for work in made}) == 7


def test_a_server_with_a_configuration_file_gets_no_other_model() -> None:
    command = SERVICES["ovserve stepwise"].command("builtin", 7, ("--config", "models.toml"), plain=True)
    assert command[1:] == ["-m", "ovserve", "--port", "7", "--config", "models.toml"]
    assert "--model_path" in SERVICES["ovserve stepwise"].command("builtin", 7, ("--replicas", "2"))


@pytest.mark.parametrize(
    ("argument", "recorded"),
    [
        (f"{metadata.ROOT}/benchmarks/run.py", "benchmarks/run.py"),
        ("/srv/models/sd15/openvino", ".../sd15/openvino"),
        ("sd15=/srv/models/sd15@512", "sd15=.../models/sd15@512"),
        (
            f"after=env PYTHONPATH=/srv/new/tree {metadata.ROOT}/.venv/bin/python benchmarks/closed_loops.py",
            "after=env PYTHONPATH=.../new/tree .venv/bin/python benchmarks/closed_loops.py",
        ),
        ("edit*3:size=256x256", "edit*3:size=256x256"),
        ("http://127.0.0.1:8000/v1/models", "http://127.0.0.1:8000/v1/models"),
        ("benchmarks/../run.py", "benchmarks/../run.py"),
    ],
)
def test_a_recorded_argument_names_no_place_of_the_machine(argument: str, recorded: str) -> None:
    assert metadata.portable_argument(argument) == recorded


def test_no_result_names_a_place_of_the_machine() -> None:
    for path in DIRECTORY.glob("*.json"):
        command = json.loads(path.read_text("utf-8"))["metadata"]["command"]
        assert metadata.portable_argument(command) == command, path.name
