"""Ablation tables: their configs, the rule for a direction, the page and the chart, and the runner with its breaks."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import tmask
from bench import machine
from bench.ablate import publish, report, runner, runs
from bench.ablate.report import draw, judge, markdown
from bench.ablate.runner import run_table, wait_for
from bench.ablate.runs import Plan, Run, check, prepare, result, settings
from bench.ablate.table import Claim, Setting, Table, Variant, tables
from bench.result import ROOT
from tmask.config import ModelConfig, from_dict
from tmask.data.crossed import CLASSES
from tmask.engine.files import held

CPU = "CPU, 2 cores, torch 2.11.0, commit 0123456789"
SHAPES = {"variant": "crossed", "train_images": 2, "val_images": 1, "size": 32}
SETTING = Setting("tiny", {"train.steps": 4, "data.hflip": 0.0}, SHAPES)
TABLE = Table(
    name="pooling",
    title="Pool or align",
    about="Why.",
    source="A paper",
    metrics=("segm/AP75", "bbox/AP"),
    variants={
        "pool": Variant("RoIPool", {"model.roi_extractor": {"op": "roi_pool"}}, "23.6"),
        "align": Variant("RoIAlign", {"train.lr": 0.5, "data.vflip": 0.5}, "30.9"),
    },
    claims=(
        Claim("align", "pool", "segm/AP75", 10.5),
        Claim("align", "pool", "bbox/AP", small=False),
        Claim("align", "pool", "segm/AP75", "above"),
    ),
    small=SETTING,
    full=Setting("r50_fpn"),
)
LONGER = dataclasses.replace(TABLE, small=dataclasses.replace(SETTING, changes={**SETTING.changes, "train.steps": 5}))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(table=TABLE, out=tmp_path / "out", seeds=2)


@pytest.mark.parametrize("table", tables().values(), ids=tables())
def test_every_table_has_settings_that_exist(table: Table, tmp_path: Path) -> None:
    assert 2 <= len(table.variants) <= 4
    for coco in (None, tmp_path):
        of_table = Plan(table=table, out=tmp_path, seeds=1, coco=coco)
        configs = [of_table.configs(variant) for variant in table.variants]
        assert len({json.dumps(config) for config in configs}) == len(configs), "two variants are the same"
        changes = [name for part in (of_table.setting, *table.variants.values()) for name in part.changes]
        assert all(name.split(".")[1] in configs[0][name.split(".")[0]] for name in changes)
        if coco is None:
            for config in configs:
                tmask.build_model(from_dict(ModelConfig, {"num_classes": 9, **config["model"]}))
            assert table.small.shapes is not None
            assert table.small.shapes["variant"] != "crossed" or configs[0]["data"]["hflip"] == 0, "flips swap classes"


def test_a_run_is_a_config_that_train_takes(plan: Plan) -> None:
    """Preset, setting, variant, then seed and data. The first seed of all variants comes first."""
    assert [(run.variant, run.seed) for run in plan.runs()] == [("pool", 0), ("align", 0), ("pool", 1), ("align", 1)]
    prepare(plan)
    pool, align = (
        yaml.safe_load((plan.out / name / "seed-1/settings.yaml").read_text()) for name in plan.table.variants
    )
    assert pool["preset"] == "tiny"
    assert pool["model"]["roi_extractor"]["op"] == "roi_pool"
    assert align["model"]["roi_extractor"]["op"] == "roi_align"
    assert (pool["train"]["seed"], pool["train"]["steps"], pool["train"]["optimizer"]) == (1, 4, "adamw")
    assert align["train"]["lr"] == 0.5 != pool["train"]["lr"]
    assert (pool["data"]["hflip"], pool["data"]["vflip"], align["data"]["vflip"]) == (0.0, 0.0, 0.5)
    assert Path(pool["data"]["train_images"]).is_dir()
    assert "rising bar" in Path(pool["data"]["val_annotations"]).read_text()


def test_more_seeds_may_be_added_but_nothing_else_changed(plan: Plan) -> None:
    plan.out.mkdir()
    for name in (".result.json.part", ".tmask.lock"):  # of a call that was killed before it wrote anything else
        (plan.out / name).touch()
    check(plan)
    (plan.out / "thesis.tex").touch()
    with pytest.raises(ValueError, match="expected an empty folder or one of this table"):
        check(plan)
    saved = plan.out / "result.json"
    saved.write_text(json.dumps(result(plan)))
    check(dataclasses.replace(plan, seeds=3))
    with pytest.raises(ValueError, match=r"holds the table 'pooling', not 'other'"):
        check(dataclasses.replace(plan, table=dataclasses.replace(TABLE, name="other")))
    with pytest.raises(ValueError, match=r"other settings: changed: {'train.steps': 4, .*} -> {'train.steps': 5"):
        check(dataclasses.replace(plan, table=LONGER))
    saved.write_text("{")
    with pytest.raises(ValueError, match=r"result.json: damaged"):
        check(plan)


def test_coco_and_its_weights_must_be_there(plan: Plan, tmp_path: Path) -> None:
    weights = tmp_path / "r50.pth"

    def refused(message: str, **fields: Any) -> None:
        with pytest.raises(ValueError, match=message):
            check(dataclasses.replace(plan, **fields))

    refused("--coco .*: expected COCO 2017, but there is no train2017", coco=tmp_path)
    for place in runs.COCO.values():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
    refused("--backbone_weights: needed with --coco: .* of resnet50", coco=tmp_path)
    refused("--backbone_weights: no such file", coco=tmp_path, backbone_weights=weights)
    refused("--backbone_weights: only with --coco", backbone_weights=weights)
    weights.touch()
    whole = dataclasses.replace(plan, coco=tmp_path, backbone_weights=weights)
    check(whole)
    assert whole.configs("pool")["model"]["backbone_weights"] == str(weights)
    assert runs.data_paths(whole)["val_annotations"] == str(tmp_path / "annotations" / "instances_val2017.json")


@pytest.mark.parametrize(
    ("better", "worse", "word"),
    [
        ([30, 31, 32], [20, 21, 22], "came out"),
        ([20, 21, 22], [30, 31, 32], "did not come out"),
        ([30, 40, 50], [29, 39, 49], "within the spread"),
        ([22, 23, 24], [20, 21, 22], "came out"),  # 2.45 standard errors
        ([21.6, 22.6, 23.6], [20, 21, 22], "within the spread"),  # 1.96
        ([30, 30], [30, 30], "within the spread"),
        ([31, 31], [30, 30], "came out"),
        ([31], [30, 30], "one seed, no spread"),
        ([31, 32], [30], "one seed, no spread"),
        ([], [30, 31], "no result yet"),
    ],
)
def test_the_rule(better: list[float], worse: list[float], word: str) -> None:
    found = judge(better, worse, published=True)
    assert found.word == word
    words = {"came out": "above", "did not come out": "below"}
    assert judge(better, worse, published=False).word == words.get(word, word)
    if better and worse:
        assert found.difference == pytest.approx(statistics.fmean(better) - statistics.fmean(worse))


def test_chance_alone_comes_out_as_rarely_as_the_rule_says() -> None:
    assert judge([1, 3], [10, 14, 18], published=True).error == pytest.approx(math.sqrt(2 / 2 + 16 / 3))
    draws = random.Random(0)
    words = [
        judge(*([draws.gauss(30, 1) for _ in range(3)] for _ in range(2)), published=True).word for _ in range(1500)
    ]
    for word in ("came out", "did not come out"):
        assert words.count(word) / 1500 == pytest.approx(0.06, abs=0.02)


def made(**runs: Any) -> dict[str, Any]:
    """A result in which run "pool1" is seed 1 of pool: its figures, None if it waits, or why it failed."""
    found = []
    for key, value in runs.items():
        run: dict[str, Any] = {"variant": key[:-1], "seed": int(key[-1]), "state": "waiting"}
        if isinstance(value, str):
            run |= {"state": "failed", "reason": value, "log": f"{key[:-1]}/seed-{key[-1]}/train.log"}
        elif value is not None:
            metrics = dict(zip(TABLE.metrics, value, strict=False))
            run |= {"state": "done", "metrics": metrics, "minutes": value[2], "trained_by": [CPU]}
        found.append(run)
    parts = {"version": 1, "table": "pooling", "setting": "small", "seeds": 2, "settings": settings(TABLE, SETTING)}
    return {**parts, "runs": found}


WHOLE = made(pool0=(0.2, 0.3, 4), align0=(0.3, 0.3, 5), pool1=(0.22, 0.4, 6), align1=(0.33, 0.31, 7))
PART = made(pool0=(0.2, 0.3, 4), align0=(-1, 0.3, 5), pool1=None, align1="died of SIGKILL: 100%|###")
LINES_OF_WHOLE = f"""
| RoIPool | 20.0, 22.0 | 21.0 | 20.0..22.0 | 1.4 | 35.0 | 23.6 |
| RoIAlign | 30.0, 33.0 | 31.5 | 30.0..33.0 | 2.1 | 30.5 | 30.9 |
| RoIAlign over RoIPool, segm/AP75 | +10.5 | +10.5 | 1.8 | came out |
| RoIAlign over RoIPool, bbox/AP | - | -4.5 | 5.0 | within the spread (not expected of a small data set) |
| RoIAlign over RoIPool, segm/AP75 | above | +10.5 | 1.8 | came out |
- Every run: preset `tiny`, `train.steps` 4, `data.hflip` 0.0; seeds 0 to 1.
- RoIPool: `model.roi_extractor` {{"op": "roi_pool"}}.
- {CPU}; a run trained for 5.5 min (median), the longest for 7.0.
![Every seed's value of each variant](chart.png)
"""
# A figure of -1 means that there is no such object, hence no figure.
LINES_OF_PART = r"""
**Partial: 2 of 4 runs.**
| RoIPool | 20.0 (1 of 2 seeds) | 20.0 | 20.0..20.0 | - | 30.0 | 23.6 |
| RoIAlign | - (1 of 2 seeds) | - | - | - | 30.0 | 30.9 |
| RoIAlign over RoIPool, segm/AP75 | +10.5 | - | - | no result yet |
- **Failed**: RoIAlign, seed 1: died of SIGKILL: 100%\|### (`align/seed-1/train.log`)
"""


@pytest.mark.parametrize(("found", "lines"), [(WHOLE, LINES_OF_WHOLE), (PART, LINES_OF_PART)], ids=["whole", "partial"])
def test_a_table_shows_every_seed_the_verdicts_and_what_is_missing(found: dict[str, Any], lines: str) -> None:
    text = markdown(TABLE, found, chart="chart.png")
    assert [line for line in lines.split("\n") if line not in text.split("\n")] == []
    assert [word in text for word in ("Partial", "Failed")] == [found is PART] * 2
    chart = io.BytesIO()
    draw(TABLE, found, chart)
    assert chart.getvalue().startswith(b"\x89PNG")


def test_the_page_is_made_of_the_results_in_the_repository() -> None:
    text = publish.PAGE.read_text(encoding="utf-8")
    assert publish.page(text) == text, "write it anew: python -m bench.ablate.publish"


def test_a_result_is_published_with_its_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page, images = tmp_path / "page.md", tmp_path / "images"
    begin, end = "before\n<!-- table ablations: x -->\n", "<!-- end of ablations -->\nafter\n"
    monkeypatch.setattr(publish, "tables", lambda: {"pooling": dataclasses.replace(TABLE, finding="It is so.")})
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(publish, "PAGE", page)
    page.write_text(f"{begin}old\n{end}")

    def published(code: int, **fields: Any) -> str:
        (tmp_path / "result.json").write_text(json.dumps({**WHOLE, **fields}))
        assert publish.main([str(tmp_path)]) == code
        return page.read_text()

    assert publish.main([]) == 0
    head = "## Pool or align\n\n`tmask ablate pooling`\n\nWhy.\n\n"
    assert f"{head}**Not measured yet.** Published (A paper):\n\n- RoIPool: 23.6\n" in page.read_text()
    small = f"{head}{markdown(TABLE, WHOLE, chart='images/ablate_pooling.png')}\nIt is so.\n"
    assert published(0) == f"{begin}{report.RULE}\n\n{small}{end}"
    assert json.loads((tmp_path / "results" / "pooling.json").read_text()) == WHOLE
    both = published(0, setting="full", seeds=7, settings=settings(TABLE, TABLE.full))
    assert f"{small}\n### On COCO\n\n" in both
    assert "(images/ablate_pooling_full.png)" in both
    assert {path.name for path in images.iterdir()} == {"ablate_pooling.png", "ablate_pooling_full.png"}
    for other in (settings(TABLE, LONGER.small), settings(TABLE, TABLE.full)):
        assert published(2, settings=other) == both
        assert "the table pooling has other settings now: run it again" in capsys.readouterr().err


def test_classes_of_boxes_only_are_apart_also_where_all_masks_were_learnt(tmp_path: Path) -> None:
    """A run that learnt from all masks does not know of them; of the others it is what the training itself says."""
    changes = {**SETTING.changes, "data.mask_classes": "rising bar,falling leaf"}
    table = dataclasses.replace(TABLE, small=dataclasses.replace(SETTING, changes=changes))
    asked = Plan(table=table, out=tmp_path, seeds=1)
    prepare(asked)
    classes = {name: 0.1 * label for label, name in enumerate(CLASSES)}
    classes["falling dumbbell"] = -1  # none in the images
    metrics = {f"segm/AP/{name}": value for name, value in classes.items()}
    told = {"segm/AP_boxes_only": 0.9, "segm/AP_with_masks": 0.8}
    (tmp_path / "pool" / "seed-0" / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "align" / "seed-0" / "metrics.json").write_text(json.dumps(metrics | told))
    oracle, other = (run["metrics"] for run in result(asked)["runs"])
    assert oracle == pytest.approx({"segm/AP_with_masks": (0.0 + 0.3) / 2, "segm/AP_boxes_only": (0.1 + 0.2 + 1.5) / 5})
    assert other == told


# ---- the runner

# Replaces the trainer: notes how it is called, makes a checkpoint of 2 steps, waits as the test wants, and ends. It
# asserts that the kernel will tell it of the end of the table.
STAND_IN = """
import ctypes, json, pathlib, signal, sys, time
if sys.platform == "linux":
    told = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(told))  # PR_GET_PDEATHSIG
    assert told.value == signal.SIGTERM
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(arguments["--out"])
with (out / "calls").open("a") as file:
    file.write(("resume" if "--resume" in arguments else "fresh") + "\\n")
def save():
    (out / "checkpoint.pt").write_text("2")
    (out / "log.jsonl").write_text(json.dumps({"step": 2, "seconds_per_step": 3.0}) + "\\n")
def stop(*_):
    save()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
assert "seed:" in pathlib.Path(arguments["--config"]).read_text()
wish = out.parent / "wish"  # of the test, for all seeds of a variant
if wish.exists() and wish.read_text() == "fail":
    print("tmask train: error: no memory", file=sys.stderr)
    sys.exit(1)
while wish.exists() and wish.read_text() == "wait":
    (out / "waits").touch()
    time.sleep(0.01)
save()
figure = 0.4 if "align" in str(out) else 0.3
(out / "metrics.json").write_text(json.dumps({"segm/AP75": figure, "bbox/AP": 0.5, "bbox/AP/disc": 0.1}))
"""


@pytest.fixture
def table(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    monkeypatch.setattr(report, "draw", lambda table, result, file: file.write(b"a chart"))  # which takes its time
    monkeypatch.setattr(runner, "machine", lambda: CPU)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return Trial(plan, tmp_path / "stand_in.py")


class Trial:
    """A table whose trainer is the stand-in; `said` collects its lines."""

    def __init__(self, plan: Plan, script: Path) -> None:
        self.plan, self.command = plan, [sys.executable, "-S", str(script)]
        self.said: list[str] = []

    def run(self, **fields: Any) -> int:
        return run_table(dataclasses.replace(self.plan, **fields), command=self.command, say=self.said.append)

    def wish(self, variant: str, text: str) -> None:
        (self.plan.out / variant).mkdir(parents=True, exist_ok=True)
        (self.plan.out / variant / "wish").write_text(text)

    def calls(self) -> dict[str, list[str]]:
        files = {f"{run.variant}{run.seed}": run.folder / "calls" for run in self.plan.runs()}
        return {name: path.read_text().split() for name, path in files.items() if path.exists()}

    def states(self) -> list[str]:
        return [run["state"] for run in result(self.plan)["runs"]]


def test_all_runs_are_done_once_and_a_broken_one_goes_on(table: Trial) -> None:
    out = table.plan.out
    prepare(table.plan)
    (out / "align" / "seed-0" / "checkpoint.pt").write_text("1")
    assert table.states() == ["waiting", "begun", "waiting", "waiting"]
    assert table.run() == 0
    assert table.calls() == {"pool0": ["fresh"], "align0": ["resume"], "pool1": ["fresh"], "align1": ["fresh"]}
    assert [line for line in table.said if line.startswith("[") and "AP" not in line] == [
        "[1/4] RoIPool, seed 0: begins",
        "[2/4] RoIAlign, seed 0: goes on from its checkpoint",
        "[3/4] RoIPool, seed 1: begins",
        "[4/4] RoIAlign, seed 1: begins",
    ]
    assert "[2/4] RoIAlign, seed 0: segm/AP75 40.0 in 0 min" in table.said
    text = (out / "table.md").read_text()
    assert text.startswith("# Pool or align\n")
    assert "at least 2 standard errors" in text
    assert "| RoIAlign over RoIPool, segm/AP75 | +10.5 | +10.0 | 0.0 | came out |" in text
    assert (out / "chart.png").is_file()
    metrics = {"segm/AP75": 0.3, "bbox/AP": 0.5}
    first = {"variant": "pool", "seed": 0, "state": "done", "metrics": metrics, "minutes": 0.1, "trained_by": [CPU]}
    assert json.loads((out / "result.json").read_text())["runs"][0] == first
    assert table.run(seeds=3) == 0
    assert (out / "pool" / "seed-2" / "metrics.json").is_file()
    assert all(len(calls) == 1 for calls in table.calls().values()), "a run was repeated"


def test_a_failed_run_is_shown_with_its_log_and_tried_again(table: Trial) -> None:
    table.wish("pool", "fail")
    assert table.run() == 1
    assert table.states() == ["failed", "done", "failed", "done"]
    reason = "ended with exit code 1: tmask train: error: no memory"
    page = table.plan.out / "table.md"
    assert f"Failed**: RoIPool, seed 0: {reason} (`pool/seed-0/train.log`)" in page.read_text()
    assert any(line.startswith(f"[1/4] RoIPool, seed 0: failed: {reason}") for line in table.said)
    table.wish("pool", "")
    assert table.run() == 0
    assert table.calls() == {"pool0": ["fresh"] * 2, "align0": ["fresh"], "pool1": ["fresh"] * 2, "align1": ["fresh"]}
    assert "Failed" not in page.read_text()


def send(number: int, run: Run) -> None:
    """Send a signal to this process once a run is waiting."""

    def wait() -> None:
        end = time.monotonic() + 60
        while not (run.folder / "waits").exists() and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


def test_a_signal_lets_the_training_save_and_the_table_goes_on_later(
    table: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.wish("align", "wait")
    before = signal.getsignal(signal.SIGTERM)
    align = table.plan.runs()[1]
    send(signal.SIGTERM, align)
    assert table.run() == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert table.states() == ["done", "begun", "waiting", "waiting"]
    assert "**Partial: 1 of 4 runs.**" in (table.plan.out / "table.md").read_text()
    assert table.said[-1] == "stopped; the same command goes on"
    table.wish("align", "")
    assert table.run() == 0
    assert table.calls()["align0"] == ["fresh", "resume"]
    assert all(len(run["trained_by"]) == 1 for run in result(table.plan)["runs"]), "the same, before and after a break"
    (align.folder / "metrics.json").unlink()
    monkeypatch.setattr(runner, "machine", lambda: "a GPU")
    assert table.run() == 0
    assert align.trained_by() == [CPU, "a GPU"]
    assert table.plan.runs()[0].trained_by() == [CPU], "who only looks trains not"


def test_a_folder_has_one_table_and_a_run_one_training(table: Trial) -> None:
    with held(table.plan.out, "ablate"), pytest.raises(ValueError, match=rf"ablate \(process {os.getpid()} on"):
        table.run()
    table.plan.out.mkdir()
    words = f"import fcntl, time\nlock = open({str(table.plan.out / '.tmask.lock')!r}, 'ab')\n"
    words += "fcntl.flock(lock, fcntl.LOCK_EX)\nprint(flush=True)\ntime.sleep(0.3)\nopen('saved', 'w').close()\n"
    with subprocess.Popen([sys.executable, "-S", "-c", words], stdout=subprocess.PIPE, cwd=table.plan.out) as training:
        assert training.stdout is not None
        training.stdout.readline()
        wait_for(table.plan.out, [], table.said.append)  # of a table that was killed
        assert (table.plan.out / "saved").exists()
    assert table.said == ["waiting for the training of a table that was killed to save and end"]


@pytest.mark.parametrize(
    ("head", "status", "words"),
    [
        ("0123456789abcdef", "", "0123456789"),
        ("0123456789abcdef", " M bench/result.py", "0123456789 with changes"),
        (None, None, "unknown"),
    ],
)
def test_the_commit_of_the_checkout(head: Any, status: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_output", lambda *words: {"rev-parse": head, "status": status}[words[1]])
    assert machine.checkout() == words


# ---- a real table, of a model so small that it learns nothing

REAL = {
    "model.min_size": 32, "model.max_size": 32, "model.fpn_channels": 8, "model.box_head_dim": 8,
    "model.mask_head_channels": 8, "model.mask_head_layers": 1, "model.box_batch_size": 8, "train.steps": 20,
    "train.batch_size": 2, "train.precision": "fp32", "train.log_every": 1, "train.checkpoint_every": 5,
    "data.num_workers": 0, "data.hflip": 0.0,
}  # fmt: skip
SCRIPT = """
import sys
from pathlib import Path
from bench.ablate.runner import run_table
from bench.ablate.runs import Plan
from tests.bench.test_ablate import real_table
sys.exit(run_table(Plan(table=real_table(), out=Path(sys.argv[1]), seeds=1)))
"""


def real_table() -> Table:
    setting = Setting("tiny", REAL, SHAPES | {"train_images": 6, "val_images": 2})
    return dataclasses.replace(TABLE, variants=TABLE.variants | {"align": Variant("align")}, small=setting)


@pytest.mark.slow
def test_a_real_table_that_is_killed_ends_with_the_figures_of_one_that_is_not(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def start(folder: Path) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
        words = [sys.executable, "-c", SCRIPT, str(folder)]
        return subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, env=env)

    def finish(folder: Path) -> str:
        process = start(folder)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return said

    finish(whole)
    process = start(killed)
    folder = killed / "align" / "seed-0"
    while process.poll() is None and not (folder / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (folder / "metrics.json").exists(), "it was too late to kill it"
    said = finish(killed)
    assert "RoIPool, seed 0: begins" not in said
    assert "align, seed 0: goes on from its checkpoint" in said

    def outcome(folder: Path) -> tuple[str, list[dict[str, float]]]:
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses = [{k: v for k, v in row.items() if k.startswith(("step", "loss"))} for row in rows]
        return (folder / "metrics.json").read_text(), losses

    for variant in ("pool", "align"):
        assert outcome(whole / variant / "seed-0") == outcome(killed / variant / "seed-0")
