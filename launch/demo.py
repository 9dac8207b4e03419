"""The demo's input: two photographs that packages ship, three prompts each, and toy weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from ipt2v.metrics.toy_weights import write_all_toy_weights

# All but motion_amplitude, which needs OpenCV. At the demo's size ms and dd have no value, and say why.
SCORES = (
    "score.metrics=[arc_sim, face_rate, oc, aq, iq, ms, dd, motion_pixels, face_arc, face_cur, face_distance, clip_score, "
    "first_frame_arc_sim, drift]"
)
PROMPTS = (
    "The astronaut, dressed in a bulky white space suit, floats through the space station and waves at the camera.",
    "A scientist in a white coat looks up from a microscope in a bright laboratory and begins to smile.",
    "The runner, in light clothes, sprints along a beach at sunset, jaw set, eyes on the horizon.",
)


def prepare_demo(folder: Path) -> tuple[Path, Path]:
    """(test set, weights) below `folder`, written now or found. Raises ValueError if the photographs' packages are missing."""
    testset, weights = folder / "testset", folder / "weights"
    for identity, photo in (("id001", _astronaut()), ("id002", _grace_hopper())):
        (testset / identity).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, testset / identity / f"image{photo.suffix}")
        for number, prompt in enumerate(PROMPTS, 1):
            (testset / identity / f"prompt{number}.txt").write_text(prompt, encoding="utf-8")
    if not weights.is_dir():
        print(f"writing toy weights to {weights}", flush=True)
        write_all_toy_weights(weights)
    return testset, weights


def _astronaut() -> Path:
    """NASA's portrait of Eileen Collins, public domain."""
    return _packaged("skimage", "data/astronaut.png", "scikit-image")


def _grace_hopper() -> Path:
    """The US Navy's portrait of Grace Hopper, public domain."""
    return _packaged("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "matplotlib")


def _packaged(module: str, name: str, distribution: str) -> Path:
    from importlib.util import find_spec

    spec = find_spec(module)  # the package is not imported: only its file is wanted
    if spec is None or spec.origin is None:
        raise ValueError(
            f"demo: package {distribution}, whose photograph it needs, is not installed; pip install 'ipt2v[demo]'"
        )
    return Path(spec.origin).parent / name
