"""`tmask validate` and `tmask info`: they must see a wrong op, and must not hide one."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import tmask_kernels
from tmask import cli, validate
from tmask_kernels.common.spec import FEATURE_DTYPES
from tmask_kernels.testing import TOLERANCES, OpSpec, op_specs

CPU = torch.device("cpu")
BY_NAME = {check.name: check for check in op_specs()}


def faulty(change: Any, **changes: Any) -> OpSpec:
    """The focal loss, with `change` applied to what every backend but the reference in float64 gives."""
    check = BY_NAME["sigmoid_focal_loss"]

    def call(x: dict[str, Tensor], backend: str) -> Any:
        out = check.call(x, backend)
        return out if x["logits"].dtype == torch.float64 else change(out)

    return dataclasses.replace(check, call=call, **changes)


def reference_rows(change: Any, **changes: Any) -> list[validate.Row]:
    check = faulty(change, **{"dtypes": (torch.float32,), "gradients": (), **changes})
    return [row for row in validate.validate_op(check, CPU) if row.backend == "reference"]


def test_every_public_op_has_a_case() -> None:
    helpers = {"AnchorSpec", "make_anchors", "pack_masks", "pyramid_levels", "unpack_masks", "use_backend"}
    modules = {"MultiScaleRoIAlign", "RoIAlign", "RoIPool"}
    ops = set(tmask_kernels.__all__) - helpers - modules
    assert {check.name.split()[0] for check in op_specs()} == ops


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_the_reference_passes_its_own_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = BY_NAME[name]
    monkeypatch.setattr(validate, "NAMES", ("reference",))  # the interpreter is slow, and tests/kernels is thorough
    rows = validate.validate_op(check, CPU)
    assert len(rows) == len(check.dtypes) * (2 if check.gradients else 1)
    assert [row for row in rows if row.verdict != "pass"] == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_row_passes_on_a_gpu(name: str, device: torch.device) -> None:
    rows = validate.validate_op(BY_NAME[name], device)
    assert [row for row in rows if row.verdict == "fail"] == []
    assert {row.backend for row in rows if row.verdict == "pass"} >= {"reference", "triton"}


def test_feature_ops_are_checked_in_three_dtypes_both_ways() -> None:
    losses = ("sigmoid_focal_loss", "softmax_focal_loss", "mask_bce")
    for name in ("roi_align", "roi_pool", "multiscale_roi_align", *losses):
        assert BY_NAME[name].dtypes == FEATURE_DTYPES
        assert BY_NAME[name].gradients


@pytest.mark.parametrize("dtype", FEATURE_DTYPES, ids=str)
@pytest.mark.parametrize(("excess", "verdict"), [(0.5, "pass"), (4.0, "fail")])
def test_one_wrong_element_is_found(dtype: torch.dtype, excess: float, verdict: str) -> None:
    def change(out: Tensor) -> Tensor:
        delta = torch.zeros_like(out)
        delta[3, 2] = excess * TOLERANCES[dtype].max * max(1.0, float(out.abs().max()))
        return out.float().add(delta).to(out.dtype) if dtype == torch.float32 else out + delta

    assert [row.verdict for row in reference_rows(change, dtypes=(dtype,))] == [verdict]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda out: out[:-1], "shape (52, 7), expected (53, 7)"),
        (lambda out: out * float("nan"), "a value is not finite"),
        (lambda out: (out, out), "2 outputs, expected 1"),
        (lambda out: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["shape", "nan", "outputs", "crash"],
)
def test_other_faults_fail_with_a_note(change: Any, note: str) -> None:
    assert {(row.verdict, row.note) for row in reference_rows(change)} == {("fail", note)}


def test_a_wrong_gradient_is_found() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 1.01 * grad

    rows = reference_rows(Wrong.apply, gradients=BY_NAME["sigmoid_focal_loss"].gradients)
    assert {row.direction: row.verdict for row in rows} == {"forward": "pass", "backward": "fail"}


def test_integers_must_be_equal() -> None:
    assert validate._compare(torch.tensor([1, 2]), torch.tensor([1, 3]))[2:] == (False, "1 of 2 differ")
    assert validate._compare({"counts": "a"}, {"counts": "b"})[2:] == (False, "values differ")


def test_a_failing_row_sets_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else a second process would be started
    monkeypatch.setattr(validate, "NAMES", ("reference",))  # one row
    for change, code in ((lambda out: out, 0), (lambda out: out + 1, 1)):
        one = (faulty(change, dtypes=(torch.float32,), gradients=()),)
        monkeypatch.setattr(validate, "op_specs", lambda one=one: one)
        assert cli.main(["validate", "--device", "cpu"]) == code
        *_, failure, total = capsys.readouterr().out.splitlines()
        assert f"{code} fail" in total
        assert total.endswith("s (Triton through its interpreter)")
        expected = "FAIL sigmoid_focal_loss, forward, reference, fp32: expected an error of at most 1.0e-05, got "
        assert failure.startswith(expected) == bool(code)


def test_a_row_is_printed_before_the_next_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And Ctrl-C leaves the rows that are done and their total."""
    seen: list[str] = []

    def change(out: Tensor) -> Tensor:
        seen.append(capsys.readouterr().out)
        if out.dtype == torch.float16:
            raise KeyboardInterrupt
        return out

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(validate, "NAMES", ("reference",))
    monkeypatch.setattr(validate, "op_specs", lambda: (faulty(change, gradients=()),))
    assert cli.main(["validate", "--device", "cpu"]) == 130
    assert ["op " in seen[0], "fp32" in seen[1], "bf16" in seen[2]] == [True] * 3
    last = capsys.readouterr()
    assert last.out.startswith("2 rows: 2 pass, 0 fail, 0 skip in ")
    assert last.out.endswith("stopped after 0 of 1 cases\n")
    assert last.err.endswith("tmask validate: interrupted\n")


def test_notes_of_the_table_are_short() -> None:
    def change(out: Tensor) -> Tensor:
        raise TypeError(f"cannot convert\n{[0.5] * 900}\nto bool")

    (row,) = reference_rows(change)
    assert row.note == "TypeError: cannot convert ... to bool"
    note = "x" * 900
    assert validate._format(9, dataclasses.replace(row, note=note)).endswith(f" fail    {'x' * 57}...")


@pytest.mark.skipif(torch.cuda.is_available(), reason="that machine's numpy need not suit Triton's interpreter")
@pytest.mark.parametrize("ops", ["padded_nms", '["padded_nms"]'])
def test_without_a_gpu_the_kernels_are_interpreted(ops: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tmask", "validate", "--device", "cpu", "--json", "--ops", ops]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["backend"] for row in rows} == {"triton", "torchvision", "reference"}
    assert {row["verdict"] for row in rows} == {"pass"}
    assert {"op", "direction", "backend", "dtype", "max_error", "tolerance", "verdict", "note"} == set(rows[0])


def test_info_names_versions_presets_and_reasons(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for part in (f"torch {torch.__version__.split('+')[0]}", "presets: tiny, tiny_c5, r18_fpn", "backends on"):
        assert part in out
    for check in op_specs():
        assert f"  {check.name} " in out
    if not torch.cuda.is_available():
        assert "not triton [1]" in out
        assert "[1] CPU tensor without the Triton interpreter" in out
