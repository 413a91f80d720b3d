"""Tables and charts of results, checked on results made up here: no figure in this file was measured."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench import report
from bench import result as results
from bench.charts import charts
from bench.charts.style import LOSS, PEERS, WIN
from bench.machine import Roofs
from bench.report import README, newest, readme_block, replace_block
from bench.rows import Row, row_of
from bench.standings import AIMS, Standing, aim_of, digits, duration, standings, times
from bench.tables import markdown
from bench.work import Work

MACHINE = {
    "gpu": "SYNTHETIC GPU", "device": "SYNTHETIC GPU", "threads": 1, "driver": "1.2", "cuda": "13.0",
    "python": "3.12.1", "versions": {"torch": "2.11.0", "triton": "3.6.0", "torchvision": "0.26.0", "mmcv": None},
    "commit": "0123456789abcdef", "changed": False, "date": "2026-01-02",
}  # fmt: skip
ROOFS = {"copy_gbps": 4300.0, "matmul_bf16_tflops": 790.0, "matmul_fp32_tflops": 50.0}


def timed(key: str, median: float, **fields: Any) -> Row:
    fields = {"p20_us": median * 0.95, "p80_us": median * 1.1, "wall_us": median + 20, "bytes": 10**7} | fields
    gbps = fields["bytes"] / median / 1e3
    return row_of(key, "timed", "", median_us=median, gbps=gbps, roof_share=gbps / 4300, peak_mib=12.5, **fields)


def result_of(*rows: Row, **fields: Any) -> results.Result:
    return results.empty(MACHINE) | {"roofs": ROOFS, "rows": [dataclasses.asdict(row) for row in rows]} | fields


# Op, case, modes, megabytes, operations a byte, torchvision's time in us.
WORK = [
    ("roi_align", "W1", ("forward", "backward"), 48, 9, 620),
    ("roi_align", "W2", ("forward", "backward"), 51, 9, 700),
    ("roi_align", "W3-bicubic", ("forward",), 48, 30, None),
    ("roi_align", "W3-max", ("forward",), 48, 8, None),
    ("roi_align", "W4-adaptive", ("forward", "backward"), 93, 9, 900),
    ("nms", "W5", ("forward",), 0.4, 300, 2300),
    ("nms", "W6", ("forward",), 1.6, 300, 5200),
    ("nms", "W7-1k", ("forward",), 0.024, 900, 550),
    ("nms", "W7-10k", ("forward",), 0.24, 9000, 1410),
    ("nms", "W7-100k", ("forward",), 2.4, 90000, 26500),
    ("nms", "W7-1M", ("forward",), 24, 900000, None),
    ("rpn_proposals", "W8", ("forward",), 2, 5, 4800),
    ("decode_boxes", "W8-decode", ("forward", "backward"), 0.46, 0.5, 180),
    ("matcher", "W9", ("forward",), 6.4, 170, 900),
    ("paste_masks", "W10-bool", ("forward",), 107, 1, 15000),
    ("paste_masks", "W10-packed", ("forward",), 14, 8, 15000),
    ("paste_masks", "W10-rle", ("forward",), 0.2, 500, 90000),
    ("focal_loss", "W11-rpn", ("forward", "backward"), 5.4, 5, 210),
    ("focal_loss", "W11-box", ("forward", "backward"), 0.4, 5, 160),
    ("inference", "W12-batch1", ("eval",), 400, 1340, 32000),
    ("inference", "W12-batch8", ("eval",), 3200, 1340, 210000),
    ("training", "W13-batch2", ("train",), 1600, 2000, 190000),
    ("training", "W13-batch16", ("train",), 12800, 2000, 1400000),
]


def synthetic(seed: int = 0, size: str = "full") -> results.Result:
    """A result as large as a real one, of random numbers: speed-ups from 0.3 to 1000, rows that miss or failed."""
    draw = random.Random(seed)
    rows = []
    for op, case, modes, megabytes, intensity, base in WORK:
        model = case.startswith(("W12", "W13"))
        ours = ("tmask", "tmask-graph") if model else ("triton", "triton-graph")
        providers = (*ours, "torchvision", *(("torchvision-compile",) if model else ("compile", "reference", "mmcv")))
        for mode in modes:
            median = base or 800.0
            speed = {name: 10 ** draw.uniform(-0.5, 1.6) for name in ours}
            speed |= {"compile": draw.uniform(0.3, 3), "reference": 10 ** draw.uniform(-2.2, -0.2), "mmcv": 1.1}
            speed |= {"torchvision": 1.0, "torchvision-compile": 1.3}
            if case == "W10-rle":
                speed["triton"] = 1000
            for dtype in ("fp32", "bf16"):
                for layout in ("nchw", "nhwc") if op == "roi_align" else ("-",):
                    for name in providers:
                        key = f"{op}/{case}/{mode}/{dtype}/{layout}/{name}"
                        work = {"size": size, "bytes": int(megabytes * (1e6 if dtype == "bf16" else 2e6))}
                        work["flops"] = int(work["bytes"] * intensity)
                        if (name == "torchvision" and base is None) or (name == "mmcv" and op != "roi_align"):
                            rows.append(row_of(key, "unavailable", f"{name} has no such op", **work))
                        elif case == "W7-1M" and name.startswith("triton"):
                            rows.append(row_of(key, "killed", "hung: no row within 60 s", **work))
                        elif case == "W10-packed" and name.startswith("triton"):
                            rows.append(row_of(key, "not built", "the project has no such op", **work))
                        elif size == "reduced" and name.startswith("triton"):
                            rows.append(row_of(key, "passed", "right; Triton's interpreter is no timing", **work))
                        else:
                            slower = (1.5 if dtype == "fp32" else 1) * (1.2 if layout == "nchw" else 1)
                            time = median / speed[name] * slower * draw.uniform(0.97, 1.03)
                            rows.append(timed(key, time, **work))
    return result_of(*rows)


def test_the_best_layout_and_both_ratios() -> None:
    result = result_of(
        timed("roi_align/W1/forward/bf16/nchw/triton", 80),
        timed("roi_align/W1/forward/bf16/nhwc/triton", 50, bytes=10**8, wall_us=77.7),
        timed("roi_align/W1/forward/bf16/nhwc/torchvision", 600),
        timed("roi_align/W1/forward/bf16/nchw/torchvision", 500),
        timed("roi_align/W1/forward/fp32/nchw/torchvision", 400),
    )
    line = next(line for line in markdown(result).splitlines() if "**triton**" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "W1", "forward", "bf16", "**triton**", "nhwc", "50.0 us", "47.5 us - 55.0 us", "77.7 us", "10.0x", "8.00x",
        "2,000", "47 %", "12.5",
    ]  # fmt: skip
    assert "80.0 us" not in markdown(result)  # the other layout
    assert "| torchvision | nchw | 500 us | 475 us - 550 us | 520 us | 1.00x | 0.800x (slower) |" in markdown(result)


@pytest.mark.parametrize("status", ["wrong", "failed", "killed", "out of memory", "unavailable", "not built"])
def test_only_timed_rows_have_a_time(status: str, tmp_path: Path) -> None:
    """Whatever else such a row holds, it is neither in a table of times nor a baseline nor a bar."""
    bad = {"median_us": 77.0, "p20_us": 77.0, "p80_us": 77.0, "bytes": 10**6, "gbps": 1.0, "roof_share": 0.1}
    result = result_of(
        row_of("nms/W5/forward/fp32/-/triton", status, "tap 3 | is off", **bad),
        timed("nms/W5/forward/fp32/-/torchvision", 100),
    )
    text = markdown(result)
    assert "77.0" not in text + readme_block(result)
    assert "100 us" in text
    assert standings(results.rows(result))[0].speedup is None
    if status == "not built":
        assert "Not built yet (1 rows): nms W5." in text
    else:
        assert f"| {status} | triton | nms | 1 | W5 forward (fp32) | tap 3 \\| is off |" in text
    assert f"| nms | W5 | {status} | 100 us (fp32) |  | ≥ 10x |" in readme_block(result)


def test_a_loss_reads_like_one() -> None:
    result = result_of(
        timed("nms/W5/forward/fp32/-/triton", 200), timed("nms/W5/forward/fp32/-/torchvision", 100)
    )  # fmt: skip
    assert "0.500x (slower) | ≥ 10x | no |" in readme_block(result)
    assert "Faster than torchvision in 0 of 1 lines, aim reached in 0 of 1" in readme_block(result)


def test_every_row_is_somewhere() -> None:
    result = synthetic()
    text = markdown(result)
    for row in results.rows(result):
        assert row.case in text
        if row.status not in ("timed", "not built"):
            assert row.reason in text
    assert text.count("**triton") == sum(
        1 for s in standings(results.rows(result)) for d in ("fp32", "bf16") for p in ("triton", "triton-graph")
        if s.best((p,), d)
    )  # fmt: skip


def test_tests_validation_and_parts() -> None:
    result = result_of(
        tests=[
            {"file": "tests/kernels/test_nms.py", "passed": 40, "failed": 1, "skipped": 2, "seconds": 12.34,
             "status": "killed", "reason": "", "failures": [{"test": "test_x[a]", "reason": "first\nanother one"}]},
            {"file": "tests/model/test_rpn.py", "passed": 5, "failed": 0, "skipped": 0, "seconds": 1, "status": "done",
             "failures": []},
        ],
        validation=[
            {"op": "nms", "direction": "forward", "backend": "triton", "dtype": "fp32", "max_error": 3.0,
             "tolerance": 0.0, "verdict": "fail", "note": "two indices"},
            {"op": "nms", "direction": "forward", "backend": "reference", "dtype": "fp32", "max_error": 0.0,
             "tolerance": 0.0, "verdict": "pass", "note": ""},
        ],
        parts={"ops": {"status": "stopped", "seconds": 200.0, "reason": "its time was up"}},
    )  # fmt: skip
    text = markdown(result)
    assert "| tests/kernels/test_nms.py | 40 | 1 | 2 | 12.3 | killed |" in text
    assert "| all | 45 | 1 | 2 | 13.3 |  |" in text
    assert "- `test_x[a]`: first\n" in text
    assert "another one" not in text
    assert "1 passed, 1 failed, 0 skipped." in text
    assert "- nms forward, triton, fp32: error 3, tolerance 0. two indices" in text
    assert "| ops | stopped | 200 | its time was up |" in text


def test_a_sweep_shows_its_best_and_the_present_one() -> None:
    rows = [timed(f"sweep nms/-/-/-/-/triton[warps={n}]", 100 + n) for n in range(12)]
    rows += [timed("sweep nms/-/-/-/-/triton", 202), row_of("sweep nms/-/-/-/-/triton[warps=99]", "failed", "spills")]
    text = markdown(result_of(sweeps=[dataclasses.asdict(row) for row in rows]))
    assert "### nms: 13 of 14 configurations timed" in text
    assert "| 1 | triton\\[warps=0\\] | 100 us | 95.0 us - 110 us | 2.02x |" in text
    assert "| 13 | **as now** | 202 us | 192 us - 222 us | 1.00x |" in text
    assert "warps=9\\]" in text
    assert "warps=10\\]" not in text


@pytest.mark.parametrize(
    ("case", "mode", "aim"),
    [
        ("W1", "forward", "≥ 6x, ≤ 100 us"),
        ("W1b", "backward", "≥ 6x"),
        ("W1", "backward", "≥ 6x"),
        ("W3-bicubic", "forward", "≤ 2.5x the time of bilinear"),
        ("W3", "forward", "None"),
        ("W7-10k-dense", "forward", "≤ 300 us, ≤ 1.19 MiB"),
        ("W7-1M", "forward", "≤ 11,921 MiB"),
        ("W7-1k", "forward", "≤ 100 us"),
        ("W8-decode", "forward", "None"),
        ("W10", "rle", "≥ 50x, ≤ 1.00 ms, ≤ 30.5 MiB"),
        ("W13-b16", "train", "≥ 4x, ≤ 160 ms"),
        ("W12-batch1", "forward", "≥ 4x, ≥ 8x its fp32"),
        ("W14", "forward", "None"),
    ],
)
def test_aims(case: str, mode: str, aim: str) -> None:
    assert str(aim_of(case, mode)) == aim


@pytest.mark.parametrize(
    ("ours", "fp32", "bf16", "met"),
    [(10, 90, 45, True), (10, 70, 45, False), (10, 90, 35, False)],
    ids=["both", "too near fp32", "too near bf16"],
)
def test_an_aim_over_two_precisions(ours: float, fp32: float, bf16: float, met: bool) -> None:
    rows = (
        timed("inference/W12/eval/bf16/-/tmask", ours),
        timed("inference/W12/eval/fp32/-/torchvision", fp32),
        timed("inference/W12/eval/bf16/-/torchvision", bf16),
    )
    assert Standing("inference", "W12", "eval", rows).aim_met is met


def test_an_aim_in_microseconds() -> None:
    ours = timed("nms/W7-1k/forward/fp32/-/triton", 99)
    assert Standing("nms", "W7-1k", "forward", (ours,)).aim_met is True
    assert Standing("nms", "W7-1k", "forward", (dataclasses.replace(ours, median_us=101.0),)).aim_met is False
    assert Standing("nms", "W7-1k", "forward", (dataclasses.replace(ours, size="reduced"),)).aim_met is None


@pytest.mark.parametrize(
    ("microseconds", "eager", "graph", "met"),
    [
        (299, 1.0, None, True),
        (299, 1.3, None, False),
        (301, 1.0, None, False),
        (301, None, None, False),
        (299, None, None, None),
        (299, 1.0, 50.0, True),
        (299, 1.3, 50.0, False),
    ],
)
def test_an_aim_of_time_and_memory(microseconds: float, eager: float | None, graph: float | None, met: Any) -> None:
    """A graph is faster and has no memory of its own, so that of the eager call counts."""
    rows = [dataclasses.replace(timed("nms/W7-10k/forward/fp32/-/triton", microseconds), peak_mib=eager)]
    if graph:
        rows.append(dataclasses.replace(timed("nms/W7-10k/forward/fp32/-/triton-graph", graph), peak_mib=None))
    assert Standing("nms", "W7-10k", "forward", tuple(rows)).aim_met is met


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.123 us"), (9.876, "9.88 us"), (123.4, "123 us"), (999.4, "999 us"), (999.6, "1.00 ms"),
     (12_345, "12.3 ms"), (999_600, "1.00 s"), (12_345_678, "12.3 s")],
)  # fmt: skip
def test_durations(value: float, text: str) -> None:
    assert duration(value) == text


def test_numbers() -> None:
    assert [digits(v) for v in (0, 0.01234, 1.005, 99.96, 1234.5, 4_300_000)] == [
        "0", "0.0123", "1.00", "100", "1,230", "4,300,000",
    ]  # fmt: skip
    assert [times(v) for v in (12.34, 1.0, 0.9999, 0.5)] == ["12.3x", "1.00x", "1.00x", "0.500x (slower)"]


def area(path: Path, *colours: str) -> list[int]:
    """How many pixels of a picture have each of these colours, #RRGGBB."""
    pixels = np.asarray(Image.open(path).convert("RGBA")).view("<u4")
    return [int((pixels == int.from_bytes(bytes.fromhex(f"{colour[1:]}FF"), "little")).sum()) for colour in colours]


def test_charts_show_wins_losses_and_peers(tmp_path: Path) -> None:
    speedup, roofline = charts(synthetic(), tmp_path)
    assert (speedup.name, roofline.name) == ("speedup.png", "roofline.png")
    assert Image.open(speedup).width == 1800
    assert min(area(speedup, LOSS, *(PEERS[name] for name in ("compile", "reference", "mmcv")))) > 200
    assert area(speedup, WIN)[0] > 50_000  # bars, not only words
    assert min(area(roofline, WIN, LOSS)) > 200


def test_charts_without_a_gpu_have_no_bars_of_ours(tmp_path: Path) -> None:
    result = synthetic(size="reduced")
    result["rows"] = [row for row in result["rows"] if not row["provider"].startswith("tmask")]
    result["machine"] = MACHINE | {"gpu": None}
    for chart in charts(result, tmp_path):
        warning, peer, win = area(chart, LOSS, PEERS["compile"], WIN)
        assert min(warning, peer) > 1000
        assert win < 2000  # the word "faster"
    assert "no statement about the kernels" in markdown(result)
    with pytest.raises(ValueError, match="results of a GPU"):
        readme_block(result)


def test_no_chart_of_nothing(tmp_path: Path) -> None:
    assert charts(result_of(row_of("nms/W5/forward/fp32/-/triton", "failed", "x")), tmp_path) == []
    assert "## Times" not in markdown(result_of())


def test_the_readme_holds_the_newest_result() -> None:
    """After a new result: python -m bench.report --write-readme"""
    path = newest()
    block = readme_block(None if path is None else results.load(path), path)
    assert README.read_text() == replace_block(README.read_text(), block)


def test_newest_is_of_a_gpu(tmp_path: Path) -> None:
    def save(name: str, **machine: Any) -> Path:
        results.save(tmp_path / name, results.empty(MACHINE | machine))
        return tmp_path / name

    assert newest(tmp_path) is None
    save("cpu/2026-03-01-a.json", gpu=None, date="2026-03-01")
    assert newest(tmp_path) is None
    save("h200/2026-01-02-b.json", date="2026-01-02")
    save("h200/2026-02-01-d.json", date="2026-02-01", time="09:10")
    later = save("h100/2026-02-01-c.json", date="2026-02-01", time="10:05")
    assert newest(tmp_path) == later


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    path = tmp_path / "result.json"
    results.save(path, synthetic())
    assert report.main([str(path), "--write-readme", "--charts", str(tmp_path / "result")]) == 0
    printed = capsys.readouterr()
    assert printed.out == markdown(synthetic())
    assert readme.read_text() == f"before\n{report.BEGIN}\n{readme_block(synthetic())}{report.END}\nafter\n"
    assert (tmp_path / "result" / "speedup.png").exists()
    assert "![Speed-up of every case over torchvision](result/speedup.png)" in readme_block(synthetic(), path)


def test_another_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(synthetic() | {"schema": 7}))
    assert report.main([str(path)]) == 2
    assert "schema" in capsys.readouterr().err
    assert report.main([str(tmp_path / "none.json")]) == 2


def test_every_aim_has_a_case() -> None:
    """A workload that the table of aims names is one of W1 to W13."""
    assert {name for name, _, _ in AIMS} == {f"W{n}" for n in range(1, 14)} | {"W1b"}


def test_float32_models_are_held_to_the_roof_of_tf32() -> None:
    roofs = Roofs(1000.0, 800.0, 50.0, 400.0)
    work = Work(bytes=0, flops=10**12)
    assert [roofs.floor_us(work, dtype) for dtype in ("fp32", "tf32", "bf16")] == [20_000, 2500, 1250]
