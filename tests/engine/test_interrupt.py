"""Ctrl-C and SIGTERM: the first ends the update and saves, the second stops at once."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.engine.toy import Model, command, logged, run, saved, toy
from tmask.engine.interrupt import Interrupted, StopSignals
from tmask.engine.log import NonFiniteLossError

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def _handled() -> Any:
    """The usual handlers, also where the tests run with Ctrl-C ignored; every test must leave them as they are."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.default_int_handler] * 2
    for number, handler in before.items():
        signal.signal(number, handler)


def signalled_at(call: int, *numbers: int, model: Model | None = None) -> Model:
    """A model that sends `numbers` to its process in the forward pass number `call` (from 0)."""
    model = model or Model()
    real = model.forward_padded

    def forward(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if model.calls == call:
            for number in numbers:
                signal.raise_signal(number)
        return real(*args, **kwargs)

    model.forward_padded = forward  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_update_ends_and_is_saved(tmp_path: Path, number: int, code: int, capfd: Any) -> None:
    model = signalled_at(5, number)  # in the first of two batches of the third update
    with pytest.raises(Interrupted) as stop:
        run(tmp_path, model, toy(accumulate=2))
    assert (stop.value.exit_code, stop.value.checkpoint_step) == (code, 3)
    assert str(stop.value) == f"interrupted by {signal.Signals(number).name}"
    assert "stopping after this step" in capfd.readouterr().err
    assert model.calls == 6
    assert saved(tmp_path)["step"] == 3
    assert [row["step"] for row in logged(tmp_path)] == [3]


@pytest.mark.parametrize(("call", "kept", "code"), [(7, 5, 143), (0, None, 143)], ids=["saved", "not saved"])
def test_a_second_signal_stops_at_once(tmp_path: Path, call: int, kept: int | None, code: int) -> None:
    model = signalled_at(call, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(Interrupted) as stop:
        run(tmp_path, model)
    assert (stop.value.checkpoint_step, stop.value.exit_code, model.calls) == (kept, code, call)
    assert (saved(tmp_path)["step"] if (tmp_path / "checkpoint.pt").exists() else None) == kept
    assert [item.name for item in tmp_path.iterdir() if "part" in item.name] == []


class LateSignal(StopSignals):
    """SIGINT just after the first update has found that nothing is due."""

    reads = 0

    @property
    def number(self) -> int | None:  # type: ignore[override]
        self.reads += 1
        return signal.SIGINT if self.reads > 2 else None

    @number.setter
    def number(self, value: int | None) -> None:
        pass


@pytest.mark.parametrize("poison_at", [None, 0], ids=["good", "poisoned"])
def test_a_signal_between_two_updates_loses_no_loss(
    tmp_path: Path, poison_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tmask.engine.loop.StopSignals", LateSignal)
    model = Model(poison_at=poison_at)
    with pytest.raises(Interrupted if poison_at is None else NonFiniteLossError):
        run(tmp_path, model)
    assert model.calls == 1
    assert [row["step"] for row in logged(tmp_path)] == ([1] if poison_at is None else [])
    assert (tmp_path / "checkpoint.pt").exists() == (poison_at is None)


def test_an_evaluation_is_broken_off_with_a_checkpoint_on_disk(tmp_path: Path) -> None:
    def evaluate(model: Model) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the evaluation went on")

    with pytest.raises(Interrupted) as stop:
        run(tmp_path, config=toy(eval_every=3, checkpoint_every=100), evaluate_fn=evaluate)
    assert stop.value.checkpoint_step == saved(tmp_path)["step"] == 3


def test_a_signal_in_the_last_update_leaves_the_evaluation_to_the_resumed_run(tmp_path: Path) -> None:
    metrics = {"segm/AP": 0.5}
    with pytest.raises(Interrupted):
        run(tmp_path, signalled_at(11, signal.SIGINT), evaluate_fn=lambda model: metrics)
    assert logged(tmp_path)[-1]["step"] == 12
    assert "segm/AP" not in logged(tmp_path)[-1]
    assert run(tmp_path, resume=True, evaluate_fn=lambda model: metrics).metrics == metrics


def test_outside_the_main_thread_there_are_no_handlers(tmp_path: Path) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert [result.step for result in results] == [12]


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(tmp_path, signalled_at(3, signal.SIGINT, signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved(tmp_path)["step"] == 12


def test_a_forked_process_takes_no_note() -> None:
    with StopSignals() as stop:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            os._exit(0 if stop.number is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


GO_ON = "; to go on from step 3: tmask train --config 'a run/config.yaml' --out 'a run' --resume 'a run/checkpoint.pt'"


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("step", [3, None], ids=["saved", "not-saved"])
def test_the_command_says_how_to_go_on(step: int | None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        stop = Interrupted(signal.SIGTERM)
        stop.checkpoint_step = step
        raise stop

    monkeypatch.setattr("tmask.engine.train.train", stopped)
    for device in ("auto", "cpu"):
        assert command("train", "--out", "a run", "--device", device) == 143
        (line,) = capsys.readouterr().err.splitlines()
        said = " before the first checkpoint" if step is None else GO_ON + " --device cpu" * (device == "cpu")
        assert line == f"tmask train: interrupted by SIGTERM{said}"
