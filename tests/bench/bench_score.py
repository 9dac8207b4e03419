"""Seconds of each score of a video, and all scores together against each by itself.

    OMP_NUM_THREADS=2 python tests/bench/bench_score.py [--videos 4] [--frames 33] [--size 256] [--weights DIR]

Together: each MP4 is decoded once, meanwhile the one before it is measured, faces are found once for all scores of faces, and
networks are loaded once. Alone: a pass over the videos for each metric, with its own networks. With --weights the published
networks are timed; without, toys: then loading and decoding weigh more than they do for real.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from helpers import noise_frames  # noqa: E402

from ipt2v.config import Metric, ScoreConfig, Scoring  # noqa: E402
from ipt2v.metrics.delivered import Delivered  # noqa: E402
from ipt2v.metrics.toy_weights import write_toy_scores  # noqa: E402
from ipt2v.models.score_weights import METRIC_ROLES, folder_of  # noqa: E402
from ipt2v.mp4 import read_fps, read_mp4, write_mp4  # noqa: E402
from ipt2v.stages.score import ScoreStage  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write_videos(folder: Path, num_videos: int, num_frames: int, size: int) -> list[Path]:
    """Smooth pictures that wander, one after the other."""
    paths = []
    for number in range(num_videos):
        grain = Image.fromarray(noise_frames(1, size // 8, size // 8, seed=number)[0]).resize((size + num_frames, size))
        frames = np.stack([np.asarray(grain)[:, start : start + size] for start in range(num_frames)])
        paths.append(folder / f"{number}.mp4")
        write_mp4(paths[-1], frames, fps=16, crf=18)
    return paths


def stage_of(metrics: Sequence[Metric], weights_dir: Path) -> ScoreStage:
    config = ScoreConfig(metrics=tuple(metrics))
    weights = {folder_of(role, config): "" for metric in metrics for role in METRIC_ROLES[metric]}
    return ScoreStage(scoring=Scoring(config=config, weights=weights), weights_dir=weights_dir, device=DEVICE)


def measure(paths: Sequence[Path], metrics: Sequence[Metric], weights_dir: Path) -> tuple[float, dict[str, float]]:
    """Seconds of a pass over the videos, networks loaded in it; and of each metric, a video, without loading."""
    stage, start = stage_of(metrics, weights_dir), time.monotonic()
    spent: dict[str, list[float]] = {metric: [] for metric in metrics}
    for path in paths:
        frames_THWC = read_mp4(path)
        video = Delivered(
            frames_THWC=torch.from_numpy(frames_THWC),
            fps=read_fps(path),
            prompt="A person walks along a beach.",
            reference_HWC=frames_THWC[0],
            first_frame_HWC=frames_THWC[0],
        )
        for rows in stage.score("a/1", "", video, metrics):
            for row in rows:
                spent[row.metric].append(row.seconds)
    return time.monotonic() - start, {metric: float(np.median(seconds)) for metric, seconds in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights_dir = options.weights or Path(folder) / "weights"
        if options.weights is None:
            write_toy_scores(weights_dir)
        paths = write_videos(Path(folder), options.videos, options.frames, options.size)
        metrics = list(METRIC_ROLES)
        measure(paths[:1], metrics, weights_dir)  # the first use of a library is its slowest
        together, each = measure(paths, metrics, weights_dir)
        alone = {metric: measure(paths, [metric], weights_dir)[0] for metric in metrics}
    print(f"{'metric':<22}{'s a video':>10}{'alone, s a video':>18}")
    for metric in metrics:
        print(f"{metric:<22}{each[metric]:>10.3f}{alone[metric] / options.videos:>18.3f}")
    whole = sum(alone.values())
    print(f"{'all':<22}{together / options.videos:>10.3f}{whole / options.videos:>18.3f}   ratio {together / whole:.2f}")


if __name__ == "__main__":
    main()
