"""The files that the image names of a COCO file mean, where no file has just that name.

Names come from other systems and other folders: with backslashes, a drive, a URL, in another Unicode form, case or
image format. A file is taken if it is the only one that fits.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tmask.data.images import image_suffixes

Parts = tuple[str, ...]  # of a path below the images folder


def find_image_files(
    folder: Path, images: Sequence[dict[str, Any]], annotation_file: Path, *, allow_missing: bool = False
) -> tuple[dict[int, str], dict[int, str]]:
    """The file of each of `images` that is not there by its ``file_name``: its path below `folder`, by number.

    They are counted in one warning. With `allow_missing` the second value has a message for each image that is not
    there at all, unless none is. Errors: ValueError for such images.
    """
    names = [record["file_name"] for record in images]
    _warn_repeated(images, annotation_file)
    missing = [i for i, name in enumerate(names) if not os.path.isfile(folder / name)]  # False for too long a name
    if not missing:
        return {}, {}
    there = ImageFiles(files_below(folder))
    taken = {os.path.normpath(names[i]) for i in set(range(len(names))).difference(missing)}
    found = there.match({i: names[i] for i in missing}, taken)
    missing = [i for i in missing if i not in found]
    if missing:
        first, number = names[missing[0]], f"(image id {images[missing[0]]['id']})"
        if len(missing) == len(images):
            raise ValueError(
                f"images_folder: none of the {len(images)} images of {annotation_file} is in {folder}, "
                f"first {first} {number}{there.hint(first, taken)}"
            )
        if not allow_missing:
            raise ValueError(
                f"{annotation_file}: {len(missing)} of {len(images)} images do not exist, "
                f"first {folder / first} {number}{there.hint(first, taken)}"
            )
    # A name that is the end of the image's URL was made from it: LVIS names no files, which is no fault.
    renamed = [i for i in found if not str(images[i].get("coco_url")).endswith(f"/{names[i]}")]
    if renamed:
        first, number = renamed[0], images[renamed[0]]["id"]
        warnings.warn(
            f"{annotation_file}: {len(renamed)} of {len(images)} images are there under another name, first "
            f"{names[first]!r}: {found[first]} (image id {number})",
            stacklevel=3,
        )
    return found, {i: f"{folder / names[i]}: no such file (image id {images[i]['id']})" for i in missing}


def _warn_repeated(images: Sequence[dict[str, Any]], annotation_file: Path) -> None:
    """Warn once of images that share a file: each lacks the objects of the other, which would count as background."""
    first: dict[str, int] = {}
    repeated = [record for record in images if first.setdefault(record["file_name"], record["id"]) != record["id"]]
    if repeated:
        name, number = repeated[0]["file_name"], repeated[0]["id"]
        warnings.warn(
            f"{annotation_file}: {len(repeated)} of {len(images)} images have the file of another image, first {name} "
            f"(image ids {first[name]} and {number}): the annotations of one are missing in the other",
            stacklevel=4,
        )


def files_below(folder: Path) -> list[Parts]:
    """The image files below a folder."""
    suffixes = image_suffixes()
    found: list[Parts] = []
    for root, _, names in os.walk(folder):
        above = Path(root).relative_to(folder).parts
        found += [(*above, name) for name in names if os.path.splitext(name)[1].lower() in suffixes]
    return found


class ImageFiles:
    """Finds image files by names that may differ from the names of the files."""

    def __init__(self, files: Sequence[Parts]) -> None:
        self.files = files
        suffixes = image_suffixes()

        def stem(name: str) -> str:
            first, suffix = os.path.splitext(name)
            return _lower(first if suffix.lower() in suffixes else name)

        # From the strictest comparison to the loosest: Unicode form, case, image format.
        self._levels: list[tuple[Callable[[str], str], dict[str, list[Parts]]]] = []
        for key in (_composed, _lower, stem):
            by_name: dict[str, list[Parts]] = {}
            for parts in self.files:
                by_name.setdefault(key(parts[-1]), []).append(parts)
            self._levels.append((key, by_name))

    def find(self, name: str) -> list[Parts]:
        """Return the files that `name` may mean, by the strictest comparison that finds any."""
        for key, by_name in self._levels:
            for wanted in _readings(name):
                found = [
                    (min(len(parts), len(wanted)), parts)
                    for parts in by_name.get(key(wanted[-1]), ())
                    # One path must end as the other does: a/1.png is not b/1.png.
                    if all(_lower(a) == _lower(b) for a, b in zip(parts[-2::-1], wanted[-2::-1], strict=False))
                ]
                if found:
                    longest = max(length for length, _ in found)
                    return sorted(parts for length, parts in found if length == longest)
        return []

    def match(self, names: Mapping[int, str], taken: Collection[str]) -> dict[int, str]:
        """The path of the file for each of `names` that means one file, and no other's.

        `taken` are the files that other images have by their own name, by `os.path.normpath`.
        """
        found = {i: self.find(name) for i, name in names.items()}
        paths = {i: "/".join(files[0]) for i, files in found.items() if len(files) == 1}
        uses = Counter([*paths.values(), *taken])
        return {i: path for i, path in paths.items() if uses[path] == 1}

    def hint(self, name: str, taken: Collection[str]) -> str:
        """What is there in place of `name`, to end an error message; empty if nothing is like it.

        A file that is only like it, and is one of `taken`, is another image's.
        """
        found = ["/".join(parts) for parts in self.find(name)]
        if not found:
            wanted = _readings(name)[-1][-1]
            free = [parts for parts in self.files if "/".join(parts) not in taken]
            near = difflib.get_close_matches(wanted, {parts[-1] for parts in free}, n=1)
            found = ["/".join(parts) for parts in free if near and parts[-1] == near[0]]
        return f"; there is {' and '.join(found[:2])}" if found else ""


def _readings(name: str) -> list[Parts]:
    """Return the paths that a name may mean, without drive, host, and folders above the images folder."""
    texts = [name]
    if "://" in name:
        url = urlsplit(name)
        # Label Studio names local files in the query: /data/local-files/?d=images/1.png
        texts = [unquote(url.path), *(value for _, value in parse_qsl(url.query))]
    elif "%" in name:
        texts.append(unquote(name))
    paths = [[part for part in text.replace("\\", "/").split("/") if part not in ("", ".", "..")] for text in texts]
    return [tuple(parts) for parts in paths if parts] or [(name,)]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _lower(name: str) -> str:
    return _composed(name).casefold()
