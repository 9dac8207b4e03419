"""Reads the layout of the 2025 challenge: one folder an identity, in it image.* and prompt1.txt, prompt2.txt...

What the challenge does not have: further photos of the identity beside image.*, named image2.*, image3.*...
Knows nothing of the other formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ipt2v.manifest import natural_key
from ipt2v.testsets.checks import Entry, anchored, listing, problem, read_utf8

IMAGE_NAME = re.compile(r"image\.(png|webp|jpg|jpeg)", re.IGNORECASE)
MORE_IMAGE_NAME = re.compile(r"image[0-9]+\.(png|webp|jpg|jpeg)", re.IGNORECASE)
PROMPT_NAME = re.compile(r"prompt[0-9]+\.txt")


def read_tree(path: Path) -> Iterator[Entry]:
    """The entries of a tree. Every folder that is not hidden is an identity; other files are left alone."""
    root = anchored(path)
    if not root.is_dir():
        raise problem(root, "no such folder; a tree is a folder that holds one folder an identity")
    for folder in identity_folders(root):
        image, more_images, prompt_files = _image(folder), _more_images(folder), _prompt_files(folder)
        for prompt_file in prompt_files:
            yield Entry(
                identity=folder.name,
                prompt_id=prompt_file.stem,
                prompt=read_utf8(prompt_file).strip(),
                image=image,
                place=str(prompt_file),
                more_images=more_images,
            )


def identity_folders(root: Path) -> list[Path]:
    """The folders of a tree's identities in natural order; hidden ones, and what macOS adds to a zip, are none."""
    folders = (path for path in root.iterdir() if not path.name.startswith((".", "__MACOSX")) and path.is_dir())
    return sorted(folders, key=lambda folder: natural_key(folder.name))


def is_identity_folder(folder: Path) -> bool:
    """True if a folder holds what only an identity's folder does: image.* or promptK.txt."""
    return any(IMAGE_NAME.fullmatch(path.name) or PROMPT_NAME.fullmatch(path.name) for path in folder.iterdir())


def _image(folder: Path) -> Path:
    images = _matching(folder, IMAGE_NAME)
    if not images:
        raise problem(folder, f"image missing: found {listing(folder)}, expected image.png, .webp, .jpg or .jpeg; add one")
    if len(images) > 1:
        names = ", ".join(image.name for image in images)
        raise problem(folder, f"{len(images)} images found ({names}), expected one; remove the others")
    return images[0]


def _more_images(folder: Path) -> tuple[Path, ...]:
    """image2.*, image3.*... by their numbers, of which some may be left out."""
    by_number: dict[int, Path] = {}
    # not _matching: a link that leads nowhere is to be an error, not one photo less
    for image in sorted(path for path in folder.iterdir() if MORE_IMAGE_NAME.fullmatch(path.name)):
        number = int(image.stem[len("image") :])
        if number < 2:
            raise problem(folder, f"{image.name} found beside image.*; further photos count from image2.* on; rename it")
        if number in by_number:
            names = f"{by_number[number].name}, {image.name}"
            raise problem(
                folder, f"2 images with the number {number} found ({names}), expected one; remove or rename the other"
            )
        by_number[number] = image
    return tuple(by_number[number] for number in sorted(by_number))


def _prompt_files(folder: Path) -> list[Path]:
    prompt_files = _matching(folder, PROMPT_NAME)
    if not prompt_files:
        raise problem(folder, f"no prompts: found {listing(folder)}, expected prompt1.txt, prompt2.txt...; add them")
    return prompt_files


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    files = (path for path in folder.iterdir() if pattern.fullmatch(path.name) and path.is_file())
    return sorted(files, key=lambda path: natural_key(path.name))
