"""Users' files of weights: each is read, or an error of one line says what the file is; none runs code."""

import argparse
import collections
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tmask
from tmask.engine.checkpoint import load_checkpoint, load_initial
from tmask.model.state_dict import bare_weights, read_file
from tmask.weights import LANDMARK

NAME, OTHER = "rpn.head.conv.weight", "rpn.head.conv.bias"


def weights(value: float = 1.0, prefix: str = "", infix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}rpn.head.{infix}conv.{part}": torch.full((2,), value) for part in ("weight", "bias")}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Settings(dict):  # type: ignore[type-arg]
    """As EasyDict and others: a dict whose keys are attributes too."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__.update(items)


class Slots:
    __slots__ = ("lr",)

    def __init__(self) -> None:
        self.lr = 0.1


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("open('code-ran', 'w')",)


HARMLESS = {
    "Namespace": argparse.Namespace(lr=0.02, layers=[1, 2], out=Path("a")),
    "SimpleNamespace": SimpleNamespace(lr=0.02),
    "path": Path("runs") / "a",
    "device and dtype": [torch.device("cpu"), torch.float16, torch.Size([1])],
    "numbers of NumPy": [np.float64(0.5), np.int64(3), np.zeros(3), np.array(["a"])],
    "generator of NumPy": np.random.RandomState(0).get_state(),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "a dict with attributes": Settings(lr=0.02, inner=Settings(a=1)),
    "slots": Slots(),
    "set, bytes, complex": [{1, 2}, b"ab", 1j, bytearray(b"a")],
    "class": argparse.Namespace,
    "function": len,
    "code": Evil(),
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize("args", HARMLESS)
def test_a_training_checkpoint_is_read_whatever_its_arguments_hold(
    args: str, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    allowed = set(torch.serialization.get_safe_globals())
    content = {"args": HARMLESS[args], "model": weights(), "optimizer": {"state": {0: {}}}, "epoch": 25, "scaler": None}
    torch.save(content, "a.pth", _use_new_zipfile_serialization=not old)
    read, _ = read_file("a.pth")
    assert read["epoch"] == 25
    assert torch.equal(bare_weights(read, LANDMARK)[NAME], torch.ones(2))
    assert not Path("code-ran").exists()
    assert set(torch.serialization.get_safe_globals()) == allowed


WRAPPED: dict[str, Callable[[], Any]] = {
    "bare": weights,
    "under model": lambda: {"model": weights(), "epoch": 3},
    "under two keys": lambda: {"model": {"state_dict": weights()}},
    "Lightning": lambda: {"state_dict": weights(prefix="model.") | {"metric.total": torch.zeros(1)}, "epoch": 3},
    "another attribute": lambda: {"state_dict": weights(prefix="net.detector.")},
    "DataParallel": lambda: weights(prefix="module."),
    "compiled": lambda: weights(prefix="_orig_mod."),
    "compiled, then DataParallel": lambda: weights(prefix="module._orig_mod."),
    "a part compiled": lambda: weights(infix="_orig_mod."),
    "FSDP": lambda: weights(prefix="_fsdp_wrapped_module."),
    "average": lambda: {"model": weights(9), "model_ema": {"n_averaged": torch.tensor(3)} | weights(prefix="module.")},
    "average of DataParallel": lambda: {"model_ema": weights(prefix="module.module.")},
    "average inside": lambda: {"state_dict": weights(9, "model.") | weights(prefix="model_ema.")},
    "parameters": lambda: {name: nn.Parameter(tensor) for name, tensor in weights().items()},
}


@pytest.mark.parametrize("form", WRAPPED)
def test_weights_are_unwrapped(form: str) -> None:
    found = bare_weights(WRAPPED[form](), LANDMARK)
    assert found.keys() == {NAME, OTHER}
    assert all(torch.equal(tensor, torch.ones(2)) for tensor in found.values())


def test_several_models_are_not_guessed_among() -> None:
    found = {"state_dict": weights(prefix="student.") | weights(prefix="teacher.")}
    names = "'state_dict.student.', 'state_dict.teacher.'"
    message = re.escape(f"expected the weights of one model, got 2, under {names}; save one alone") + "$"
    with pytest.raises(ValueError, match=f"^{message}"):
        bare_weights(found, LANDMARK)
    with pytest.raises(ValueError, match=f"^state_dict: {message}"):
        tmask.load_torchvision(found)


Write = Callable[[Path], object]


def zipped(**members: bytes) -> Write:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)

    return write


def tarred(path: Path) -> None:
    (path.parent / "b.txt").write_text("b")
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "b.txt", "b.txt")


def saved(content: Any, **how: Any) -> Write:
    return lambda path: torch.save(content, path, **how)


def data(content: bytes) -> Write:
    return lambda path: path.write_bytes(content)


def pickled(content: Any, **how: Any) -> Write:
    return data(pickle.dumps(content, **how))


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(Net(), (torch.rand(1, 2),)), str(path))


def cut(write: Write, end: int) -> Write:
    """The file without its last bytes."""
    return lambda path: (write(path), path.write_bytes(path.read_bytes()[:end]))


OLD: Any = {"_use_new_zipfile_serialization": False}
ZERO, ARGS = torch.zeros(1), argparse.Namespace()
D2 = {"backbone.bottom_up.stem.conv1.weight": np.zeros(1, np.float32)}
D2_TRAINER = {"model": {"proposal_generator.rpn_head.conv.weight": ZERO}, "iteration": 3}
ONNX = b"\x08\x08\x12\x07pytorch\x1a\x052.4.0:\x00"
OF_NET = r"a pickle of \S*\.Net"
NOT_READ = ", which is not read, as it could run code; save the weights alone: "
DAMAGED = "a truncated or damaged file"
# Others: docs/bad-input.md.
FILES: dict[str, tuple[str, Write, str]] = {
    "a model": ("a.pth", saved(Net()), OF_NET + r" and \d+ more classes" + NOT_READ),
    "a model, before PyTorch 1.6": ("a.pth", saved(Net(), **OLD), OF_NET + NOT_READ),
    "a model in a dict": ("a.pt", saved({"model": Net(), "epoch": 3}), OF_NET + " and"),
    "a model beside its optimiser": ("a.pt", saved({"net": Net(), "optimizer": {"state": {0: ZERO}}}), OF_NET + " and"),
    "other names beside arguments": (
        "a.pth",
        saved({"model": {"a.b": ZERO}, "args": ARGS}),
        "1 other names, first 'a.b'",
    ),
    "a model, pickled": ("a.pkl", pickled(Net()), r"a pickle of \S*test_state_dict\.Net, "),
    "code": ("a.pth", saved({"format": Evil()}), "a pickle of builtins.exec, "),
    "code, pickled": ("a.pth", pickled(Evil()), "a pickle of "),
    "another protocol": ("a.pth", saved(weights(), pickle_protocol=4), "a file of pickle protocol 4: save it "),
    "a list": ("a.pth", saved([1]), "a list"),
    "nothing": ("a.pth", saved({}), "nothing"),
    "other names": ("a.pth", saved({"a": ZERO, "b": ZERO}), "2 other names, first 'a'"),
    "detectron2's zoo": (
        "a.pkl",
        pickled({"model": D2, "__author__": "Detectron2 Model Zoo"}),
        "weights of detectron2, ",
    ),
    "detectron2's, protocol 2": (
        "a.pkl",
        pickled({"model": D2}, protocol=2),
        "weights of detectron2, which are not read",
    ),
    "detectron2's trainer": ("a.pth", saved(D2_TRAINER), "weights of detectron2, which are not read yet"),
    "Detectron": ("a.pkl", pickled({"blobs": {"conv_rpn_fpn2_w": np.zeros(1)}}, protocol=2), "weights of Detectron, "),
    "TorchScript": ("a.pt", lambda path: torch.jit.script(Net()).save(str(path)), "a TorchScript program, "),
    "torch.export": ("a.pt2", exported, "a program of torch.export, "),
    "ONNX": ("a.onnx", data(ONNX), "an ONNX model, "),
    "ONNX under another name": ("a.pth", data(ONNX), "an ONNX model, "),
    "Keras 3": ("a.keras", zipped(**{"model.weights.h5": b"", "config.json": b"{}"}), "a model of Keras, "),
    "TensorFlow": ("model.ckpt-9.data-00000-of-00001", data(bytes(99)), "a file of TensorFlow, "),
    "TensorFlow's index": ("model.ckpt.index", data(b"\x00\x01\x08"), "a file of TensorFlow, "),
    "TensorFlow's graph": ("frozen_inference_graph.pb", data(b"\n\x1c\n"), "a file of TensorFlow, "),
    "TensorFlow Lite": ("a.tflite", data(b"\x1c\x00\x00\x00TFL3" + bytes(99)), "a model of TensorFlow Lite, "),
    "NumPy, several": ("a.npz", lambda path: np.savez(path, a=np.zeros(1)), "arrays of NumPy, which are not read"),
    "NumPy": ("a.npy", lambda path: np.save(path, np.zeros(1)), "an array of NumPy, "),
    "text": ("a.pt", data("größer\n".encode() * 999), "a text that begins 'größer'"),
    "an archive": ("a.pth", zipped(**{"run/a.pth": b"a"}), "a zip archive, first of it 'run/a.pth': unpack it"),
    "a tar archive": ("a.pth.tar", tarred, "a packed archive: unpack it"),
    "gzip": ("a.pth.gz", data(b"\x1f\x8b\x08" + bytes(99)), "a packed archive: unpack it"),
    "an empty file": ("a.pth", data(b""), "an empty file"),
    "zeros": ("a.pth", data(bytes(9999)), DAMAGED),
    "truncated": ("a.pth", cut(saved(weights()), -10), DAMAGED),
    "truncated, before PyTorch 1.6": ("a.pth", cut(saved(weights() | {"args": ARGS}, **OLD), 300), DAMAGED),
    "truncated safetensors": ("a.safetensors", cut(lambda path: save_file(weights(), path), -3), DAMAGED),
    "truncated pickle": ("a.pkl", cut(pickled({"model": D2}), -9), DAMAGED),
    "safetensors of others": ("a.safetensors", lambda path: save_file({"a": ZERO}, path), "1 other names, first 'a'"),
    "a length of safetensors that is none": ("a.safetensors", data(struct.pack("<Q", 999) + b"{}"), DAMAGED),
}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got a file that cannot be read: No such file or directory$"):
        load_initial(nn.Linear(1, 1), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"got a file that cannot be read: Is a directory$"):
        load_initial(nn.Linear(1, 1), tmp_path)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_file_is_named_for_what_it_is(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, write, what = FILES[kind]
    write(Path(name))
    model = nn.Linear(1, 1)
    for read, begins in (
        (lambda: load_initial(model, name), f"init {name}: expected a checkpoint or weights of a Mask R-CNN, got "),
        (lambda: load_checkpoint(name), f"checkpoint {name}: expected a file written by tmask, got "),
        (lambda: tmask.load_torchvision(name), f"state_dict: expected weights in {name}, got "),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(begins)}({what})") as error:
            read()
        assert "\n" not in str(error.value)
    assert not Path("code-ran").exists()


def test_the_file_s_name_does_not_matter(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "a.pth")
    torch.save(weights(), tmp_path / "a.safetensors")
    for path in tmp_path.iterdir():
        assert torch.equal(read_file(path)[0][NAME], torch.ones(2))


def test_a_user_s_own_safe_classes_stay(tmp_path: Path) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        torch.save({"args": argparse.Namespace(a=1), "path": Path("a")}, tmp_path / "a.pth")
        content, left_out = read_file(tmp_path / "a.pth")
        assert content["args"] == argparse.Namespace(a=1)
        assert [name.rpartition(".")[2] for name in left_out] == ["PosixPath"]
        assert argparse.Namespace in torch.serialization.get_safe_globals()


def test_a_checkpoint_of_ours_holds_no_other_objects(tmp_path: Path) -> None:
    torch.save({"format": "tmask checkpoint", "args": argparse.Namespace()}, tmp_path / "a.pt")
    for read in (load_checkpoint, lambda path: load_initial(nn.Linear(1, 1), path)):
        with pytest.raises(ValueError, match=r"checkpoint \S*a.pt: holds argparse.Namespace, which is none of tmask's"):
            read(tmp_path / "a.pt")
