"""Small true things that many tests need: a test set, a weights folder that nothing loads, records, a run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ipt2v.config import RunConfig, load_settings
from ipt2v.models.catalogue import folders, needed_files
from ipt2v.models.weight_files import Record, write_record
from ipt2v.records import Attempt, FirstFrame, Item, Provenance, TextEmbedding, VideoLatents
from ipt2v.run_dir import RunDir
from launch.freeze import freeze, prepare

ROOT = Path(__file__).resolve().parents[1]
NUM_HEADS = 4
SDXL_UNET = {  # unet/config.json of stabilityai/stable-diffusion-xl-base-1.0
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VACE_14B = {  # transformer/config.json of Wan2.1-VACE-14B-diffusers
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "text_dim": 4096,
    "vace_in_channels": 96,
    "vace_layers": [0, 5, 10, 15, 20, 25, 30, 35],
}


def skip_if(missing: Collection[str], packages: str) -> None:
    """Skip a test for which something is missing; `packages` is the list of what to install. In CI that is a failure."""
    if missing:
        reason = f"missing {', '.join(missing)}: apt-get install -y --no-install-recommends $(cat {packages})"
        if os.environ.get("IPT2V_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def write_tree(folder: Path, identities: tuple[str, ...] = ("id001", "id002"), num_prompts: int = 2) -> Path:
    """A test set in the layout of the 2025 challenge."""
    for index, identity in enumerate(identities):
        (folder / identity).mkdir(parents=True)
        Image.new("RGB", (32, 24), (40 * index % 256, 90, 200)).save(folder / identity / "image.png")
        for number in range(1, num_prompts + 1):
            (folder / identity / f"prompt{number}.txt").write_text(f"{identity} walks, {number}\n", encoding="utf-8")
    return folder


def demo_config(testset: Path, *overrides: str) -> RunConfig:
    return load_settings(RunConfig, ROOT / "configs" / "demo.yaml", (f"testset.path={testset}", *overrides))


def write_fake_weights(folder: Path, num_heads: int = NUM_HEADS) -> Path:
    """Every file that a run of configs/demo.yaml needs, with nothing in it that a model could load."""
    config = demo_config(folder)
    for role, name in folders(config).items():
        for path in needed_files(role, folder / name, config):
            path.parent.mkdir(parents=True, exist_ok=True)
            sizes = VACE_14B | {"num_attention_heads": num_heads, "of": f"{role} {path.name}"}
            path.write_text(json.dumps(sizes), encoding="utf-8")
        fakes = [path.relative_to(folder / name).as_posix() for path in needed_files(role, folder / name, config)]
        write_record(folder / name, Record(files=dict.fromkeys(fakes)))  # they are neither as published nor tensors
    return folder


def frozen_run(tmp_path: Path, *overrides: str, num_shards: int | None = None) -> RunDir:
    """A run folder of two identities with two prompts each, nothing made yet."""
    testset, weights = tmp_path / "testset", tmp_path / "weights"
    if not testset.exists():
        write_tree(testset)
    if not weights.exists():
        write_fake_weights(weights)
    config = demo_config(testset, *overrides)
    return freeze(prepare(config, weights_dir=weights, runs_dir=tmp_path / "runs", num_shards=num_shards))


def provenance(run_digest: str) -> Provenance:
    return Provenance(
        run_digest=run_digest,
        code_version="0.1.0+00000000",
        weights={"Qwen3-8B": "0" * 32},
        packages={"torch": "2.6"},
        seed=7,
        seconds=1.5,
        device="cpu",
        num_ranks=1,
        created="2025-01-01T00:00:00.000+00:00",
    )


def first_frame(
    key: str, *, similarity: float | None = 0.5, negative: str = "blurry", spatial_prompt: str = "a coat"
) -> FirstFrame:
    random = np.random.default_rng(len(key))
    return FirstFrame(
        key=key,
        subject="A woman",
        spatial_prompt=spatial_prompt,
        temporal_prompt=f"She walks as {key}.",
        image_HWC=random.integers(0, 256, (64, 96, 3), dtype=np.uint8),
        reference_HWC=random.integers(0, 256, (20, 30, 3), dtype=np.uint8),
        similarity=similarity,
        attempts=(Attempt(seed=7, similarity=None), Attempt(seed=8, similarity=0.25)),
        notes=("temporal prompt: the answer is empty",),
        temporal=TextEmbedding(text=f"She walks as {key}.", embedding_LD=random.normal(size=(7, 16)).astype(np.float32)),
        negative=TextEmbedding(text=negative, embedding_LD=np.arange(48, dtype=np.uint16).reshape(3, 16) + 0x3F80),
    )


def video_latents(key: str) -> VideoLatents:
    random = np.random.default_rng(len(key))
    return VideoLatents(key=key, latents_CTHW=random.normal(size=(16, 5, 8, 12)).astype(np.float32))


def noise_frames(num_frames: int = 17, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """[T,H,W,3] uint8 RGB."""
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def run_python(code: str, *arguments: str) -> str:
    """What `code` prints in a new process."""
    return run_command(sys.executable, "-c", code, *arguments).stdout


def run_command(*command: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240, check=False)
    assert done.returncode == expect, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def keys_of(items: Iterable[Item]) -> list[str]:
    return [item.key for item in items]
