"""Tables of ablations: what they train, the rule by which a direction comes out, and what is written of a result."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

import tmask
from bench.ablate import __main__ as main
from bench.ablate import outcome, publish
from bench.ablate import plan as plans
from bench.ablate import table as tables
from bench.ablate.chart import draw
from bench.ablate.plan import Plan, check_data, check_folder
from bench.ablate.report import markdown, progress
from bench.ablate.table import Claim, Drawn, Setting, Table, Variant
from bench.ablate.verdict import Spread, judge
from tmask.config import ModelConfig, from_dict
from tmask.data.crossed import CLASSES

SETTING = Setting(
    preset="tiny",
    shapes=Drawn(variant="crossed", train_images=2, val_images=1, size=32),
    train={"steps": 4},
    data={"hflip": 0.0},
)
TABLE = Table(
    title="Pool or align",
    about="Why.",
    source="A paper",
    metrics=("segm/AP75", "bbox/AP"),
    variants={
        "pool": Variant(label="RoIPool", published="23.6", model={"roi_extractor": {"op": "roi_pool"}}),
        "align": Variant(label="RoIAlign", published="30.9", train={"lr": 0.5}, data={"vflip": 0.5}),
    },
    claims=(
        Claim(better="align", worse="pool", metric="segm/AP75", published=10.5),
        Claim(better="align", worse="pool", metric="bbox/AP", small=False),
    ),
    small=SETTING,
    full=Setting(preset="r50_fpn"),
)


def plan(out: Path, **fields: Any) -> Plan:
    return Plan(**{"name": "pooling", "table": TABLE, "out": out, "seeds": 2, **fields})


@pytest.mark.parametrize("name", tables.names())
def test_every_table_is_of_settings_that_exist(name: str, tmp_path: Path) -> None:
    table = tables.load(name)
    assert 2 <= len(table.variants) <= 4
    for coco in (None, tmp_path):
        of_table = Plan(name=name, table=table, out=tmp_path, seeds=1, coco=coco)
        configs = [of_table.configs(variant) for variant in table.variants]
        assert len({json.dumps(config, default=str) for config in configs}) == len(configs), "two variants are the same"
        assert all(config["train"]["steps"] >= 1 for config in configs)
        if coco is None:
            for config in configs:
                tmask.build_model(from_dict(ModelConfig, {"num_classes": 9, **config["model"]}))


def test_small_settings_flip_no_class_into_another() -> None:
    for name in tables.names():
        small = tables.load(name).small
        assert small.shapes is not None
        assert small.shapes.variant != "crossed" or small.data["hflip"] == 0


def test_the_first_seed_of_all_variants_comes_first(tmp_path: Path) -> None:
    runs = plan(tmp_path).runs()
    assert [(run.variant, run.seed) for run in runs] == [("pool", 0), ("align", 0), ("pool", 1), ("align", 1)]
    assert runs[2].folder == tmp_path / "pool" / "seed-1"


def test_a_run_is_a_config_that_train_takes(tmp_path: Path) -> None:
    """The preset, then the setting, then the variant, then seed and data."""
    import yaml

    plans.prepare(plan(tmp_path))
    pool, align = (
        yaml.safe_load((tmp_path / variant / "seed-1" / "settings.yaml").read_text()) for variant in ("pool", "align")
    )
    assert pool["preset"] == "tiny"
    assert pool["model"]["roi_extractor"]["op"] == "roi_pool"
    assert align["model"]["roi_extractor"]["op"] == "roi_align"
    assert (pool["train"]["seed"], pool["train"]["steps"], pool["train"]["optimizer"]) == (1, 4, "adamw")
    assert align["train"]["lr"] == 0.5 != pool["train"]["lr"]
    assert (pool["data"]["hflip"], pool["data"]["vflip"], align["data"]["vflip"]) == (0.0, 0.0, 0.5)
    assert Path(pool["data"]["train_images"]).is_dir()
    assert "rising bar" in Path(pool["data"]["val_annotations"]).read_text()


def test_more_seeds_may_be_added_but_nothing_else_changed(tmp_path: Path) -> None:
    plans.prepare(plan(tmp_path))
    check_folder(plan(tmp_path, seeds=3))
    with pytest.raises(ValueError, match=r"holds the table 'pooling', not 'other'"):
        check_folder(plan(tmp_path, name="other"))
    longer = dataclasses.replace(TABLE, small=dataclasses.replace(SETTING, train={"steps": 5}))
    with pytest.raises(ValueError, match=r"other settings: variants.align.train.steps: 4 -> 5; variants.pool"):
        check_folder(plan(tmp_path, table=longer))
    record = tmp_path / "ablation.json"
    saved = json.loads(record.read_text())
    for configs in saved["variants"].values():  # as an older version wrote it, without settings that came later
        del configs["model"]["neck"], configs["model"]["roi_extractor"]["interpolation"]
        del configs["train"]["only"], configs["data"]["mask_classes"]
    record.write_text(json.dumps(saved))
    check_folder(plan(tmp_path))
    with pytest.raises(ValueError, match=r"other settings: variants.align.train.steps: 4 -> 5; variants.pool"):
        check_folder(plan(tmp_path, table=longer))
    saved["variants"]["pool"]["model"]["gone"] = 1
    record.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"other settings: unknown ModelConfig setting 'gone'"):
        check_folder(plan(tmp_path))
    record.write_text("{")
    with pytest.raises(ValueError, match=r"ablation.json: damaged"):
        check_folder(plan(tmp_path))


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    check_folder(plan(tmp_path / "none"))
    (tmp_path / ".ablation.json.part").touch()
    (tmp_path / "lock").touch()  # of a call that was killed before it wrote anything else
    check_folder(plan(tmp_path))
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"expected an empty folder or one of this table"):
        check_folder(plan(tmp_path))


def test_coco_and_its_weights_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--coco .*: expected COCO 2017, but there is no train2017"):
        check_data(plan(tmp_path, coco=tmp_path))
    for place in plans.COCO.values():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
    with pytest.raises(ValueError, match=r"--backbone_weights: needed with --coco: .* of resnet50"):
        check_data(plan(tmp_path, coco=tmp_path))
    with pytest.raises(ValueError, match=r"--backbone_weights: no such file"):
        check_data(plan(tmp_path, coco=tmp_path, backbone_weights=tmp_path / "r50.pth"))
    with pytest.raises(ValueError, match=r"--backbone_weights: only with --coco"):
        check_data(plan(tmp_path, backbone_weights=tmp_path / "r50.pth"))
    (tmp_path / "r50.pth").touch()
    whole = plan(tmp_path, coco=tmp_path, backbone_weights=tmp_path / "r50.pth")
    check_data(whole)
    assert whole.configs("pool")["model"]["backbone_weights"] == str(tmp_path / "r50.pth")
    assert plans.data_paths(whole)["val_annotations"] == str(tmp_path / "annotations" / "instances_val2017.json")


def test_an_unknown_table_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["focl"]) == 2
    message = "unknown table 'focl': expected 'focal'? (see tmask ablate --help)"
    assert capsys.readouterr().err == f"tmask ablate: error: {message}\n"


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


def test_the_standard_error_is_that_of_a_difference_of_means() -> None:
    found = judge([1, 3], [10, 14, 18], published=True)
    assert found.error == pytest.approx(math.sqrt(2 / 2 + 16 / 3))
    assert Spread((1.0, 3.0)).deviation == pytest.approx(math.sqrt(2))


def test_chance_alone_comes_out_as_rarely_as_the_rule_says() -> None:
    draws = random.Random(0)
    words = [
        judge(*([draws.gauss(30, 1) for _ in range(3)] for _ in range(2)), published=True).word for _ in range(1500)
    ]
    assert words.count("came out") / 1500 == pytest.approx(0.06, abs=0.02)
    assert words.count("did not come out") / 1500 == pytest.approx(0.06, abs=0.02)


def result(**states: Any) -> dict[str, Any]:
    """A result in which run "pool1" is that of seed 1 of pool: its figures, None if it waits, or why it failed."""
    runs = []
    for key, value in states.items():
        run: dict[str, Any] = {"variant": key[:-1], "seed": int(key[-1]), "state": "waiting"}
        if isinstance(value, str):
            run |= {"state": "failed", "reason": value, "log": f"{key[:-1]}/seed-{key[-1]}/train.log"}
        elif value is not None:
            run |= {"state": "done", "metrics": {"segm/AP75": value[0], "bbox/AP": value[1]}, "minutes": value[2]}
            run |= {"trained_by": ["CPU, 2 cores, torch 2.11.0, commit 0123456789"]}
        runs.append(run)
    return {"setting": "small", "seeds": 2, "settings": outcome.shared(TABLE, SETTING), "runs": runs}


WHOLE = result(pool0=(0.2, 0.3, 4), align0=(0.3, 0.3, 5), pool1=(0.22, 0.4, 6), align1=(0.33, 0.31, 7))


def test_a_whole_table_shows_every_seed_and_what_came_out() -> None:
    text = markdown(TABLE, WHOLE, chart="chart.png")
    assert progress(WHOLE) == ""
    assert "| RoIPool | 20.0, 22.0 | 21.0 | 20.0..22.0 | 1.4 | 35.0 | 23.6 |" in text
    assert "| RoIAlign | 30.0, 33.0 | 31.5 | 30.0..33.0 | 2.1 | 30.5 | 30.9 |" in text
    assert "| RoIAlign over RoIPool, segm/AP75 | +10.5 | +10.5 | 1.8 | came out |" in text
    verdict = "within the spread (not expected of a small data set)"
    assert f"| RoIAlign over RoIPool, bbox/AP | - | -4.5 | 5.0 | {verdict} |" in text
    assert "preset `tiny`, `train.steps` 4, `data.hflip` 0.0; seeds 0 to 1." in text
    assert '- RoIPool: `model.roi_extractor` {"op": "roi_pool"}.' in text
    assert (
        "CPU, 2 cores, torch 2.11.0, commit 0123456789; a run trained for 5.5 min (median), the longest for 7.0."
        in text
    )
    assert "![" in text
    assert "Partial" not in text
    assert "Failed" not in text


def test_a_partial_table_says_what_is_missing_and_what_failed() -> None:
    part = result(pool0=(0.2, 0.3, 4), align0=(-1, 0.3, 5), pool1=None, align1="died of SIGKILL: 100%|###")
    text = markdown(TABLE, part, chart="chart.png")
    assert "**Partial: 2 of 4 runs.**" in text
    assert "| RoIPool | 20.0 (1 of 2 seeds) | 20.0 | 20.0..20.0 | - | 30.0 | 23.6 |" in text
    assert "| RoIAlign | - (1 of 2 seeds) | - | - | - | 30.0 | 30.9 |" in text  # -1: no such object, hence no figure
    assert "| RoIAlign over RoIPool, segm/AP75 | +10.5 | - | - | no result yet |" in text
    assert r"- **Failed**: RoIAlign, seed 1: died of SIGKILL: 100%\|### (`align/seed-1/train.log`)" in text


def test_charts_of_partial_and_empty_tables_are_drawn(tmp_path: Path) -> None:
    charts = []
    for found in (result(pool0=(0.2, 0.3, 4), pool1=(0.3, 0.4, 4), align0=None), result(pool0=None, align0=None)):
        with (tmp_path / "chart.png").open("wb") as file:
            draw(TABLE, found, file)
        charts.append((tmp_path / "chart.png").read_bytes())
    assert all(chart.startswith(b"\x89PNG") for chart in charts)
    assert charts[0] != charts[1]


def test_the_page_is_made_of_the_results_in_the_repository() -> None:
    text = publish.PAGE.read_text(encoding="utf-8")
    assert publish.page(text) == text, "write it anew: python -m bench.ablate.publish"


def test_a_result_is_published_with_its_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(tables, "names", lambda: ["pooling"])
    monkeypatch.setattr(tables, "load", lambda name: TABLE)
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(publish, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(publish.page, "__defaults__", (tmp_path / "results",))
    (tmp_path / "page.md").write_text(f"before\n{publish.BEGIN}\nold\n{publish.END}\nafter\n")
    assert publish.main([]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "## Pool or align\n\n`tmask ablate pooling`\n\nWhy.\n\n**Not measured yet.** Published (A paper):" in text
    assert "- RoIPool: 23.6" in text
    found = {"version": 1, "table": "pooling", **WHOLE}
    (tmp_path / "result.json").write_text(json.dumps(found))
    assert publish.main([str(tmp_path)]) == 0
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert markdown(TABLE, WHOLE, chart="images/ablate_pooling.png") in text
    assert (tmp_path / "images" / "ablate_pooling.png").is_file()
    assert json.loads((tmp_path / "results" / "pooling.json").read_text()) == found

    monkeypatch.setattr(tables, "load", lambda name: dataclasses.replace(TABLE, finding="It is so."))
    assert publish.main([str(tmp_path)]) == 0
    assert (
        f"{markdown(TABLE, WHOLE, chart='images/ablate_pooling.png')}\nIt is so.\n"
        in (tmp_path / "page.md").read_text()
    )
    monkeypatch.setattr(tables, "load", lambda name: TABLE)

    full = {**found, "setting": "full", "seeds": 7, "settings": outcome.shared(TABLE, TABLE.full)}
    (tmp_path / "result.json").write_text(json.dumps(full))
    assert publish.main([str(tmp_path)]) == 0
    both = (tmp_path / "page.md").read_text()
    assert both.startswith(text[: text.index("after")].removesuffix(publish.END + "\n")), "the small one stays"
    assert "\n### On COCO\n\n" in both
    assert "(images/ablate_pooling_full.png)" in both
    assert (tmp_path / "images" / "ablate_pooling_full.png").is_file()

    other = dataclasses.replace(SETTING, data={"hflip": 0.5})
    for settings in (outcome.shared(TABLE, other), outcome.shared(TABLE, TABLE.full)):
        (tmp_path / "result.json").write_text(json.dumps({**found, "settings": settings}))
        assert publish.main([str(tmp_path)]) == 2
        assert "the table pooling has other settings now: run it again" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == both


def test_classes_of_boxes_only_are_apart_also_where_all_masks_were_learnt(tmp_path: Path) -> None:
    """Of the oracle, whose training does not know of them; of the others it is what the training itself says."""
    parts = dataclasses.replace(SETTING, data={**SETTING.data, "mask_classes": "rising bar,falling leaf"})
    table = dataclasses.replace(TABLE, small=parts, variants={**TABLE.variants})
    asked = plan(tmp_path, table=table, seeds=1)
    plans.prepare(asked)
    classes = {name: 0.1 * label for label, name in enumerate(CLASSES)}
    classes["falling dumbbell"] = -1  # none in the images
    metrics = {f"segm/AP/{name}": value for name, value in classes.items()}
    (tmp_path / "pool" / "seed-0" / "metrics.json").write_text(json.dumps(metrics))
    told = {**metrics, "segm/AP_boxes_only": 0.9, "segm/AP_with_masks": 0.8}
    (tmp_path / "align" / "seed-0" / "metrics.json").write_text(json.dumps(told))
    oracle, other = (run["metrics"] for run in outcome.result(asked)["runs"])
    assert oracle == pytest.approx({"segm/AP_with_masks": (0.0 + 0.3) / 2, "segm/AP_boxes_only": (0.1 + 0.2 + 1.5) / 5})
    assert other == {"segm/AP_boxes_only": 0.9, "segm/AP_with_masks": 0.8}


def test_a_direction_without_a_figure_comes_out_too() -> None:
    words = dataclasses.replace(TABLE.claims[0], published="above")
    text = markdown(dataclasses.replace(TABLE, claims=(words,)), WHOLE, chart="chart.png")
    assert "| RoIAlign over RoIPool, segm/AP75 | above | +10.5 | 1.8 | came out |" in text
