"""Where the tests run: Triton kernels on a GPU if there is one, else through Triton's interpreter on the CPU."""

import os
import signal
from pathlib import Path

import torch

# Triton reads this when a kernel is decorated, so it must stand before the first import of a kernels.py.
# `make test-compile` sets it to 0: a kernel decorated under the interpreter cannot be compiled in the same process.
if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Processes that tests start must not depend on it: a user has not set it.
os.environ.pop("PYTHONUNBUFFERED", None)

import hypothesis
import pytest

from tmask_kernels.backend import interpreter_enabled

# A busy machine is slow; that is no fault of a test.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rehearse",
        action="store_true",
        help="run tests/gpu without a GPU: small, through Triton's interpreter, without what CUDA alone has",
    )


def pytest_configure() -> None:
    """Heed Ctrl-C, as tests of it need, also in a script's background, where it is ignored by all children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        rehearsed = config.getoption("--rehearse", default=False) and "tests/gpu" in item.path.as_posix()
        if "gpu" in item.keywords and not torch.cuda.is_available() and not rehearsed:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "compile_only" in item.keywords and interpreter_enabled():
            item.add_marker(
                pytest.mark.skip(reason="needs a process without the Triton interpreter: make test-compile")
            )


@pytest.fixture(scope="session")
def device() -> torch.device:
    """CUDA if there is a GPU, else the CPU (where Triton kernels are interpreted)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with nuclei/ and coco-mini/ that TMASK_DATA names."""
    folder = os.environ.get("TMASK_DATA")
    if not folder:
        pytest.skip("TMASK_DATA is not set")
    return Path(folder)
