"""Backend choice: defaults, precedence, reasons, errors."""

import warnings

import pytest
import torch

from tmask_kernels import backend
from tmask_kernels.backend import default_backend, resolve, triton_reasons, use_backend

CPU = torch.device("cpu")


def test_default_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMASK_BACKEND", raising=False)
    assert default_backend() == "auto"
    monkeypatch.setenv("TMASK_BACKEND", "reference")
    assert default_backend() == "reference"
    with use_backend("torchvision"):
        assert default_backend() == "torchvision"
        with use_backend("triton"):
            assert default_backend() == "triton"
        assert default_backend() == "torchvision"
    assert default_backend() == "reference"


def test_use_backend_restores_after_an_error() -> None:
    before = default_backend()
    with pytest.raises(RuntimeError), use_backend("reference"):
        raise RuntimeError
    assert default_backend() == before


@pytest.mark.parametrize(
    ("device", "order"), [("cuda", "triton reference torchvision"), ("cpu", "torchvision reference triton")]
)
def test_auto_takes_the_first_of_the_device_without_reasons(device: str, order: str) -> None:
    names = order.split()
    for first in range(3):
        reasons = {name: ["no"] if name in names[:first] else [] for name in sorted(names)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert resolve("op", "auto", reasons, device=torch.device(device)) == names[first]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("triton", "'triton' cannot serve this call: too old; too slow"),
        ("cuda", "expected one of auto"),
        ("torchvision", "does not exist"),
    ],
)
def test_a_backend_that_does_not_serve_is_an_error(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("op", name, {"triton": ["too old", "too slow"], "reference": []}, device=CPU)


def test_bad_environment_variable_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMASK_BACKEND", "fast")
    with pytest.raises(ValueError, match="TMASK_BACKEND"):
        default_backend()


def test_a_default_that_an_op_lacks_warns_once_and_is_auto() -> None:
    backend._warn_lacking_once.cache_clear()
    with use_backend("triton"):
        with pytest.warns(UserWarning, match="op_y: has no triton backend"):
            assert resolve("op_y", None, {"reference": []}, device=CPU) == "reference"
        with pytest.raises(ValueError, match="does not exist"):
            resolve("op_y", "triton", {"reference": []}, device=CPU)
        with pytest.raises(ValueError, match="cannot serve this call: too old"):
            resolve("op_y", None, {"triton": ["too old"], "reference": []}, device=CPU)


def test_fallback_on_cuda_warns_once() -> None:
    backend._warn_once.cache_clear()
    reasons = {"triton": ["dtype"], "reference": []}
    with pytest.warns(UserWarning, match="op_x: using the reference backend on CUDA, not triton: dtype"):
        resolve("op_x", None, reasons, device=torch.device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("op_x", None, reasons, device=torch.device("cuda")) == "reference"


def test_triton_reasons_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "without the Triton interpreter" in triton_reasons(torch.zeros(1))[0]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_reasons(torch.zeros(1)) == []
    assert "meta" in triton_reasons(torch.zeros(1, device="meta"))[0]
