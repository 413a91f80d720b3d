"""Files of weights: read them without running code, find the state dict in them, and compare it with a module.

A file that cannot be read is named for what it is.
"""

from __future__ import annotations

import codecs
import pickle
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

DAMAGED = "a truncated or damaged file"
NOT_READ = (
    "which is not read, as it could run code; save the weights alone: torch.save(model.state_dict(), 'weights.pth')"
)

# The first bytes of a file -> what it is.
_SIGNATURES = (
    (rb"version https://git-lfs", "a Git LFS pointer in place of the file: run git lfs pull"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, such as Keras's .h5, which is not read"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\(\xb5/\xfd|.{257}ustar", "a packed archive: unpack it"),
    (rb"\x93NUMPY", "an array of NumPy, which is not read"),
    (rb"....TFL3", "a model of TensorFlow Lite, which is not read"),
    (rb"\x08[\x01-\x20][\x12:]", "an ONNX model, which is not read"),
)
_TENSORFLOW = re.compile(r"\.(data-\d+-of-\d+|index|meta|pb)$")  # names: these files have no first bytes of their own
# The end of the name of a file in a zip archive -> what the archive is. PyTorch writes archives with a data.pkl.
_MEMBERS = (
    (r"constants\.pkl", "a TorchScript program, which is not read; save the state_dict() of the model it was made of"),
    (
        r"archive_format|serialized_exported_program\.json",
        "a program of torch.export, which is not read; save the state_dict() of the model it was made of",
    ),
    (r"\.weights\.h5", "a model of Keras, which is not read"),
    (r"\.npy", "arrays of NumPy, which are not read"),
)
# A part of a name in the weights of another library -> whose they are.
_LIBRARIES = {
    "backbone.bottom_up.": "detectron2",
    "proposal_generator.": "detectron2",
    "res2.0.conv1.": "detectron2",
    "rpn_head.rpn_conv.": "mmdetection",
    "roi_head.bbox_head.": "mmdetection",
    "neck.lateral_convs.": "mmdetection",
    "mmdet_version": "mmdetection",
    "roi_heads.box.feature_extractor.": "maskrcnn-benchmark",
    "Conv_Body.": "Detectron.pytorch",
    "conv_rpn_": "Detectron",
    "fpn.inner_blocks.0.1.": "torchvision's model _v2",
    "_branch2a_": "Detectron",
}
_OLD_FORMAT = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save wrote first before PyTorch 1.6
# What DistributedDataParallel, averages of weights, torch.compile and FSDP put into the names of what they wrap.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGE = re.compile(r"(?<![a-z])(ema|averaged?)(?![a-z])", re.IGNORECASE)
_NOT_WEIGHTS = ("n_averaged",)  # a counter beside averaged weights


class ForeignFileError(ValueError):
    """A file without weights that can be read; the message is what it is, as "a Git LFS pointer"."""


def read_file(path: str | Path, device: torch.device | str = "cpu") -> tuple[Any, list[str]]:
    """The content of a file of torch.save or safetensors, and the names of the classes whose objects are left out.

    The content has numbers, texts, lists, dicts and tensors, and an empty dict in place of any other object.
    Errors: ForeignFileError.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(1024)
            if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:  # the length of a header of JSON
                from safetensors.torch import load_file

                return load_file(path, device=str(device)), []
            if head[:2] == b"PK":
                _check_zip(path)
            elif _OLD_FORMAT not in head[:16]:
                raise ForeignFileError(_other_file(path, head))
            return _torch_load(file, device)
    except (ForeignFileError, ImportError):
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ForeignFileError(f"a file that cannot be read: {error.strerror}") from error
    except Exception as error:  # zip, pickle, safetensors and torch each have errors of their own
        raise ForeignFileError(DAMAGED) from error


def _torch_load(file: BinaryIO, device: torch.device | str) -> tuple[Any, list[str]]:
    """`read_file` of a file that torch.save wrote; not by its path, as torch goes by the suffix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other pickle protocols
        file.seek(0)
        try:
            return torch.load(file, map_location=device, weights_only=True), []
        except pickle.UnpicklingError:  # classes that torch does not know as harmless
            protocol, classes, _ = _words(_opcodes(file))
        known = {
            item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}"
            for item in torch.serialization.get_safe_globals()
        }
        met: list[str] = []
        stand_ins: list[Any] = [(_stand_in(name, met), name) for name in dict.fromkeys(classes) if name not in known]
        file.seek(0)
        try:
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(file, map_location=device, weights_only=True), met
        except Exception as error:
            strange = [name for name in classes if not name.startswith(("torch.", "collections."))]
            if strange:
                raise ForeignFileError(f"a pickle of {strange[0]}, {NOT_READ}") from error
            if protocol != 2:
                raise ForeignFileError(
                    f"a file of pickle protocol {protocol}: save it with torch.save's own, 2"
                ) from error
            raise


def _stand_in(name: str, met: list[str]) -> type:
    """A class that stands for the class or function `name` in a file: each call gives an empty object, noted in `met`.

    torch's reader fills no mapping but a dict, OrderedDict or Counter, and of these a Counter alone may have the state
    of any object; NumPy's have states of their own.
    """

    class StandIn:
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            met.append(name)
            return object.__new__(cls) if name.startswith("numpy.") else Counter()

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def __setstate__(self, state: Any) -> None:
            pass

    return StandIn


def _opcodes(file: BinaryIO) -> Iterator[tuple[Any, Any, Any]]:
    """The operations of the pickle in a file of torch.save; none is run."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            yield from pickletools.genops(archive.read(name))
        return
    file.seek(0)
    for _ in range(4):  # a number, a version, what the machine was, and the object
        yield from pickletools.genops(file)


def _words(opcodes: Iterable[tuple[Any, Any, Any]]) -> tuple[int, list[str], list[str]]:
    """The protocol of a pickle, the full names of the classes and functions in it, and its texts."""
    protocol = 0
    classes: list[str] = []
    texts: list[str] = []
    for opcode, argument, _ in opcodes:
        if opcode.name == "PROTO":
            protocol = argument
        if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
            module, name = argument.split(" ", 1) if argument else (["?", "?", *texts][-2:])
            old = NAME_MAPPING.get((module, name))  # Python 2's names, which protocol 2 keeps to
            classes.append(".".join(old or (IMPORT_MAPPING.get(module, module), name)))
        elif isinstance(argument, str):
            texts.append(argument)
    return protocol, classes, texts


def _check_zip(path: Path) -> None:
    """Errors: ForeignFileError for an archive that torch.save did not write."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for end, what in _MEMBERS:
        if any(re.search(f"{end}$", name) for name in names):
            raise ForeignFileError(what)
    if not any(name.endswith("data.pkl") for name in names):
        raise ForeignFileError(
            f"a zip archive, first of it {names[0]!r}: unpack it" if names else "an empty zip archive"
        )


def _other_file(path: Path, head: bytes) -> str:
    """What a file is that neither torch.save nor safetensors wrote."""
    if not head:
        return "an empty file"
    for start, what in _SIGNATURES:
        if re.match(start, head, re.DOTALL):
            return what
    text = _text(head)
    if text:
        if text.startswith("<"):
            return "a page of HTML or XML, which servers give in place of a file: download it again"
        return f"a text that begins {text.splitlines()[0][:40]!r}"
    if _TENSORFLOW.search(path.name):
        return "a file of TensorFlow, which is not read"
    if head[:1] != b"\x80":
        return DAMAGED
    with path.open("rb") as file:
        _, classes, texts = _words(pickletools.genops(file))
    return library(texts) or f"a pickle{f' of {classes[0]}' if classes else ''}, {NOT_READ}"


def _text(head: bytes) -> str:
    """The beginning of a file of text; empty if it is none."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head).strip()  # whose last letter may be cut off
    except UnicodeDecodeError:
        return ""
    return text if all(letter.isprintable() or letter.isspace() for letter in text) else ""


def library(names: Iterable[str]) -> str:
    """Whose weights these are, by their names; empty if none of another library that is known."""
    found = (whose for name in names for part, whose in _LIBRARIES.items() if part in name)
    whose = next(found, None)
    return f"weights of {whose}, which are not read yet" if whose else ""


def describe(content: Any, left_out: Iterable[str] = ()) -> str:
    """What a file holds whose `content` has no weights that are known: as `read_file` gives both."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    parts = [part for _, part in _mappings(content)]
    whose = library(name for part in parts for name in part)
    if whose:
        return whose
    tensors = [name for part in parts for name, value in part.items() if isinstance(value, Tensor)]
    if any("layer1.0.conv1." in name for name in tensors):
        return "weights of a ResNet without a detector: give them as model.backbone_weights"
    classes = list(dict.fromkeys(left_out))
    if classes and not any("." in name for name in tensors):  # none, or those of an optimiser
        more = f" and {len(classes) - 1} more classes" if len(classes) > 1 else ""
        return f"a pickle of {classes[0]}{more}, {NOT_READ}"
    return f"{len(tensors)} other names, first {tensors[0]!r}" if tensors else "nothing"


def bare_weights(content: Any, landmark: str) -> dict[str, Tensor]:
    """The state dict in `content` that has a name beginning with `landmark`; empty if there is none.

    `content` is the state dict itself or holds it under any key, as a checkpoint does. What wrappers put into names
    (``module.``, ``_orig_mod.``) is cut out, and so is any prefix, such as Lightning's ``model.``; tensors without that
    prefix belong to something else and are left out. If there is an average of the model too, it is the average.
    Errors: ValueError for several models.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for place, part in _mappings(content):
        tensors = {_WRAPPERS.sub("", name): value for name, value in part.items() if isinstance(value, Tensor)}
        starts = (re.match(rf"(|.*?\.){re.escape(landmark)}", name) for name in tensors)
        for prefix in dict.fromkeys(start[1] for start in starts if start):
            own = ((name, tensor) for name, tensor in tensors.items() if name.startswith(prefix))
            found[f"{place}{prefix}"] = {n.removeprefix(prefix): tensor for n, tensor in own if n not in _NOT_WEIGHTS}
    averages = {place: weights for place, weights in found.items() if _AVERAGE.search(place)}
    found = averages or found
    if len(found) > 1:
        places = ", ".join(map(repr, found))
        raise ValueError(f"expected the weights of one model, got {len(found)}, under {places}; save one alone")
    return next(iter(found.values()), {})


def _mappings(content: Any, place: str = "", depth: int = 3) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The mapping `content` and those in it, each with its place: the keys that lead to it."""
    if isinstance(content, Mapping):
        yield place, {name: value for name, value in content.items() if isinstance(name, str)}
        for name, value in content.items() if depth else ():
            yield from _mappings(value, f"{place}{name}.", depth - 1)


def read_weights(path: str | Path, argument: str, landmark: str) -> dict[str, Tensor]:
    """The `bare_weights` in a file. Errors: ValueError, naming `argument`, the file and what it is."""
    if not Path(path).is_file():
        raise ValueError(f"{argument}: expected a state-dict file, got {str(path)!r}, which does not exist")
    try:
        content, left_out = read_file(path)
        weights = bare_weights(content, landmark)
    except ValueError as error:
        got = f", got {error}" if isinstance(error, ForeignFileError) else f": {error}"
        raise ValueError(f"{argument}: expected weights in {path}{got}") from error
    if not weights:
        raise ValueError(f"{argument}: expected weights in {path}, got {describe(content, left_out)}")
    return weights


def misfits(model: nn.Module, weights: Mapping[str, Any]) -> str:
    """The first names and shapes in which a state dict differs from the model's own; empty if it fits exactly."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in own]
    for name in (name for name in own if name in weights):
        shape, expected = getattr(weights[name], "shape", type(weights[name]).__name__), own[name].shape
        if shape != expected:
            problems.append(f"{name}: expected {_size(expected)}, got {_size(shape)}")
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def _size(shape: Any) -> str:
    return str(list(shape)) if isinstance(shape, tuple) else str(shape)
