"""Tables and charts of results, checked on results made up here: no figure in this file was measured."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench import result as results
from bench import tables
from bench.__main__ import main
from bench.cases import CASES
from bench.charts import LOSS, PEERS, WIN, draw
from bench.machine import H100, Roofs, Work
from bench.result import Row
from bench.standings import Standing, digits, duration, standings, times
from bench.tables import README, contest_line, markdown, meaning, newest, readme_block, replace_table

MACHINE = {
    "gpu": "SYNTHETIC GPU", "device": "SYNTHETIC GPU", "threads": 1, "driver": "1.2", "cuda": "13.0",
    "python": "3.12.1", "versions": {"torch": "2.11.0", "triton": "3.6.0", "torchvision": "0.26.0", "mmcv": None},
    "commit": "0123456789abcdef", "changed": False, "date": "2026-01-02",
}  # fmt: skip
ROOFS = {"copy_gbps": 4300.0, "matmul_bf16_tflops": 790.0, "matmul_fp32_tflops": 50.0}
NMS = "padded_nms/nms-rpn/forward/fp32/-"


def timed(key: str, median: float, **fields: Any) -> Row:
    fields = {"p20_us": median * 0.95, "p80_us": median * 1.1, "wall_us": median + 20, "bytes": 10**7} | fields
    fields = {"peak_mib": 12.5} | fields
    gbps = fields["bytes"] / median / 1e3
    return Row(key=key, status="timed", median_us=median, gbps=gbps, roof_share=gbps / 4300, **fields)


def untimed(key: str, status: str, reason: str, **fields: Any) -> Row:
    return Row(key=key, status=status, reason=reason, **fields)


def result_of(*rows: Row, **fields: Any) -> results.Result:
    return results.empty(MACHINE) | {"roofs": ROOFS, "rows": [row.line() for row in rows]} | fields


def synthetic(size: str = "full") -> results.Result:
    """A result of every case, of random numbers: speed-ups from 0.5 to 40, rows that miss or failed."""
    numbers = random.Random(0)
    rows = []
    for case in CASES.values():
        model = case.name.startswith(("inference", "training"))
        ours = ("tmask", "tmask-graph") if model else ("triton", "triton-graph")
        speeds = {"torchvision": 1.0, "compile": 2.0, "mmcv": 0.3}
        speeds |= {name: 0.5 if case.name.startswith("focal") else 10 ** numbers.uniform(0.1, 1.6) for name in ours}
        for mode in case.modes:
            for name, speed in speeds.items():
                key = f"op/{case.name}/{mode}/{case.dtype}/-/{name}"
                work = {"size": size, "bytes": 10**7, "flops": 10**9}
                if name.startswith("triton") and (size == "reduced" or case.name == "nms-1m"):
                    status = "passed" if size == "reduced" else "killed"
                    rows.append(untimed(key, status, f"{case.name} hung", **work))
                else:
                    rows.append(timed(key, 1000 / speed, **work))
    return result_of(*rows)


def cells_of(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_best_layout_and_the_ratios() -> None:
    key = "roi_align/roi-align-box-head/forward"
    text = markdown(result_of(
        timed(f"{key}/bf16/nchw/triton", 80),
        timed(f"{key}/bf16/nhwc/triton", 50, bytes=10**8, wall_us=77.7),
        timed(f"{key}/bf16/nhwc/torchvision", 600),
        timed(f"{key}/fp32/nchw/torchvision", 400),
    ))  # fmt: skip
    assert cells_of(text, "| roi_align |") == [
        "roi_align", "roi-align-box-head", "50.0 us (bf16 nhwc)", "400 us (fp32 nchw)", "8.00x", "≥ 6x, ≤ 100 us",
        "yes", "46.5 %",
    ]  # fmt: skip
    assert cells_of(text, "| roi-align-box-head | forward | bf16 | nhwc |") == [
        "roi-align-box-head", "forward", "bf16", "nhwc", "**triton**", "50.0 us", "47.5 us - 55.0 us", "77.7 us",
        "12.0x", "2,000", "46.5 %", "12.5", "",
    ]  # fmt: skip


@pytest.mark.parametrize("status", ["wrong", "failed", "killed", "out of memory", "unavailable"])
def test_only_timed_rows_have_a_time(status: str) -> None:
    """Whatever else such a row holds, it is neither a time in a table nor a baseline."""
    bad = {"median_us": 77.0, "p20_us": 77.0, "p80_us": 77.0, "bytes": 10**6, "gbps": 1.0, "roof_share": 0.1}
    rows = untimed(f"{NMS}/triton", status, "tap 3 | is off", **bad), timed(f"{NMS}/torchvision", 100)
    result = result_of(*rows)
    text = markdown(result)
    assert "77.0" not in text + readme_block(result)
    assert standings(rows)[0].speedup is None
    assert f"| **triton** | {status} |  |  |  |  |  |  | tap 3 \\| is off |" in text
    assert f"| padded_nms | nms-rpn | {status} | 100 us (fp32) |  | ≥ 10x |" in readme_block(result)
    assert contest_line(rows) == f"padded_nms nms-rpn forward fp32: triton {status}, torchvision 100 us"
    assert meaning(rows)[-1] == f"  triton {status}: tap 3 | is off"


def test_a_loss_reads_like_one() -> None:
    rows = timed(f"{NMS}/triton", 200, size="reduced"), timed(f"{NMS}/torchvision", 100, size="reduced")
    assert "0.500x (slower) | ≥ 10x |  |" in readme_block(result_of(*rows))
    assert "| padded_nms | nms-rpn (reduced) |" in readme_block(result_of(*rows))
    assert contest_line(rows) == "padded_nms nms-rpn forward fp32 (reduced): triton 200 us (0.5x), torchvision 100 us"
    full = [dataclasses.replace(row, size="full") for row in rows]
    assert "0.500x (slower) | ≥ 10x | no |" in readme_block(result_of(*full))
    assert "Faster than torchvision in 0 of 1 lines, aim reached in 0 of 1" in readme_block(result_of(*full))


def test_every_row_is_somewhere() -> None:
    result = synthetic()
    text = markdown(result)
    for row in results.rows(result):
        assert f"| {row.case} | {row.mode} |" in text
        assert row.status == "timed" or row.reason in text


def test_tests_and_parts() -> None:
    tests = [{"key": f"tests/a.py::{n}", "status": "passed", "reason": "", "seconds": 3.0} for n in range(4)]
    tests.append({"key": "tests/b.py::x[a]", "status": "killed", "reason": "first\nanother one", "seconds": 0.34})
    parts = [{"key": "ops", "status": "stopped", "seconds": 200.0, "reason": "its time was up"}]
    text = markdown(result_of(tests=tests, parts=parts))
    assert "| tests/a.py | 4 | 0 | 0 | 0 | 12.0 |" in text
    assert "| all | 4 | 0 | 0 | 1 | 12.3 |" in text
    assert "- `tests/b.py::x[a]` killed: first\n" in text
    assert "another one" not in text
    assert "| ops | stopped | 200 | its time was up |" in text


def test_a_sweep_shows_its_best_and_the_present_one() -> None:
    rows = [timed(f"sweep/nms/-/-/-/triton[warps={n}]", 100 + n) for n in range(12)]
    rows += [timed("sweep/nms/-/-/-/triton", 202), untimed("sweep/nms/-/-/-/triton[warps=99]", "failed", "spills")]
    text = markdown(result_of(*rows))
    assert "## Sweep nms: 13 of 14 launch configurations timed" in text
    assert "| 1 | triton\\[warps=0\\] | 100 us | 2.02x |" in text
    assert "| 13 | triton | 202 us | 1.00x |" in text
    assert "warps=9\\]" in text
    assert "warps=10\\]" not in text


AIMS = {
    ("roi-align-box-head", "forward"): "≥ 6x, ≤ 100 us",
    ("roi-align-box-head", "backward"): "≥ 6x",
    ("roi-align-bicubic", "forward"): "≤ 2.5x the time of bilinear",
    ("roi-align-one-image", "forward"): "None",
    ("nms-10k-dense", "forward"): "≤ 300 us, ≤ 1.19 MiB",
    ("nms-1m", "forward"): "≤ 11,921 MiB",
    ("paste-masks", "rle"): "≥ 50x, ≤ 1.00 ms, ≤ 30.5 MiB",
    ("inference-b1", "padded"): "≥ 4x, ≥ 8x its fp32",
    ("unknown", "forward"): "None",
}


def test_aims() -> None:
    assert {key: str(Standing("op", *key, ()).aim) for key in AIMS} == AIMS


@pytest.mark.parametrize(
    ("case", "rows", "met"),
    [  # microseconds and MiB of each row
        ("inference-b1", {"bf16/-/tmask": 10, "fp32/-/torchvision": 90, "bf16/-/torchvision": 45}, True),
        ("inference-b1", {"bf16/-/tmask": 10, "fp32/-/torchvision": 70, "bf16/-/torchvision": 45}, False),
        ("inference-b1", {"bf16/-/tmask": 10, "fp32/-/torchvision": 90, "bf16/-/torchvision": 35}, False),
        ("nms-1k", {"fp32/-/triton": 99}, True),
        ("nms-1k", {"fp32/-/triton": 101}, False),
        ("nms-1k", {"fp32/-/triton reduced": 99}, None),
        ("nms-10k", {"fp32/-/triton": (299, 1.0)}, True),
        ("nms-10k", {"fp32/-/triton": (299, 1.3)}, False),
        ("nms-10k", {"fp32/-/triton": (301, None)}, False),
        ("nms-10k", {"fp32/-/triton": (299, None)}, None),
        # A graph has no memory of its own: that of the eager call counts.
        ("nms-10k", {"fp32/-/triton": (299, 1.0), "fp32/-/triton-graph": (50, None)}, True),
        ("nms-10k", {"fp32/-/triton": (299, 1.3), "fp32/-/triton-graph": (50, None)}, False),
    ],
)
def test_an_aim_is_met_or_not_or_unknown(case: str, rows: dict[str, Any], met: bool | None) -> None:
    made = []
    for name, value in rows.items():
        name, _, size = name.partition(" ")
        us, mib = value if isinstance(value, tuple) else (value, 12.5)
        made.append(timed(f"op/{case}/forward/{name}", us, peak_mib=mib, size=size or "full"))
    assert Standing("op", case, "forward", tuple(made)).aim_met is met


def test_numbers() -> None:
    assert [digits(v) for v in (0, 0.01234, 1.005, 99.96, 1234.5, 4_300_000)] == [
        "0", "0.0123", "1.00", "100", "1,230", "4,300,000",
    ]  # fmt: skip
    assert [times(v) for v in (12.34, 1.0, 0.9999, 0.5)] == ["12.3x", "1.00x", "1.00x", "0.500x (slower)"]
    assert [duration(v) for v in (0.1234, 123.4, 999.4, 999.6, 12_345, 999_600, 12_345_678)] == [
        "0.123 us", "123 us", "999 us", "1.00 ms", "12.3 ms", "1.00 s", "12.3 s",
    ]  # fmt: skip


def test_a_floor_is_the_larger_of_bytes_and_flops() -> None:
    bytes_of_100_us, product = 335_000_000, 67 * 10**9
    assert H100.floor_us(Work(bytes_of_100_us), "bf16") == pytest.approx(100)
    assert H100.floor_us(Work(bytes_of_100_us, product), "bf16") == pytest.approx(100)
    assert H100.floor_us(Work(bytes_of_100_us, product), "fp32") == pytest.approx(1000)
    tf32 = Roofs(1000.0, 800.0, 50.0, 400.0)  # float32 models are held to the roof of TF32
    assert [tf32.floor_us(Work(0, 10**12), dtype) for dtype in ("fp32", "tf32", "bf16")] == [20_000, 2500, 1250]


def area(path: Path, *colours: str) -> list[int]:
    """How many pixels of a picture have each of these colours, #RRGGBB."""
    pixels = np.asarray(Image.open(path).convert("RGBA")).view("<u4")
    return [int((pixels == int.from_bytes(bytes.fromhex(f"{colour[1:]}FF"), "little")).sum()) for colour in colours]


def test_charts_show_wins_losses_and_peers(tmp_path: Path) -> None:
    speedup = draw(synthetic(), tmp_path)
    assert speedup == tmp_path / "speedup.png"
    assert min(area(speedup, LOSS, PEERS["compile"], PEERS["mmcv"])) > 200
    assert area(speedup, WIN)[0] > 20_000  # bars, not only words


def test_charts_without_a_gpu_have_no_bars_of_ours(tmp_path: Path) -> None:
    result = synthetic("reduced")
    result["rows"] = [row for row in result["rows"] if not row["key"].rpartition("/")[2].startswith("tmask")]
    result["machine"] = MACHINE | {"gpu": None}
    chart = draw(result, tmp_path)
    assert chart is not None
    warning, peer, win = area(chart, LOSS, PEERS["compile"], WIN)
    assert min(warning, peer) > 200
    assert win == 0
    assert "Reduced sizes" in markdown(result)
    with pytest.raises(ValueError, match="results of a GPU"):
        readme_block(result)
    failed = result_of(untimed(f"{NMS}/triton", "failed", "x"))
    assert draw(failed, tmp_path) is None
    assert "## Against" not in markdown(failed)


def test_the_readme_holds_the_newest_result(tmp_path: Path) -> None:
    """After a new result: python -m bench show --write-readme"""
    path = newest(tables.ROOT / "bench" / "results")
    block = readme_block(None if path is None else results.load(path), path)
    assert README.read_text() == replace_table(README.read_text(), "bench", block)

    def save(name: str, **machine: Any) -> Path:
        results.save(tmp_path / name, results.empty(MACHINE | machine))
        return tmp_path / name

    save("cpu/2026-03-01-a.json", gpu=None, date="2026-03-01")
    assert newest(tmp_path) is None
    save("h200/2026-01-02-b.json", date="2026-01-02")
    save("h200/2026-02-01-d.json", date="2026-02-01", time="09:10")
    later = save("h100/2026-02-01-c.json", date="2026-02-01", time="10:05")
    assert newest(tmp_path) == later


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table bench: x -->\nold\n<!-- end of bench -->\nafter\n")
    monkeypatch.setattr(tables, "README", readme)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    path = tmp_path / "result.json"
    results.save(path, synthetic())
    assert main(["show", str(path), "--write-readme", "--charts", str(tmp_path / "result")]) == 0
    assert capsys.readouterr().out == markdown(synthetic())
    block = readme_block(synthetic())
    assert readme.read_text() == f"before\n<!-- table bench: x -->\n{block}<!-- end of bench -->\nafter\n"
    assert list((tmp_path / "result").glob("*.png"))
    assert "![Speed-up of every case over torchvision](result/speedup.png)" in readme_block(synthetic(), path)
    assert main(["show", str(tmp_path / "none.json")]) == 2
    with pytest.raises(ValueError, match="expected a table 'bench' between its marks"):
        replace_table("nothing", "bench", "new")
