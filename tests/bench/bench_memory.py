"""Peak memory of array 1, against that of each of its models alone: they follow each other, so the largest sets the peak.

    python tests/bench/bench_memory.py

Toy checkpoints are enlarged to some hundred MB each (float32), one item is made on the CPU, and each model's step is also run
by itself, every time in a new process. Measured: resident memory (VmRSS of /proc/self/status, sampled every 5 ms; it counts
the mapped pages of checkpoint files) above what the process holds after its imports. malloc is told to give large blocks back
at once (MALLOC_MMAP_THRESHOLD_), as otherwise its pools hide what was freed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("LLM", "text encoder", "HyperLoRA", "painter")


def enlarge(weights: Path) -> None:
    """Toy weights with larger networks under the same tokenizers."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import AutoConfig, AutoModelForCausalLM, UMT5EncoderModel

    from ipt2v.models.hyperlora.toy import write_toy_hyperlora
    from ipt2v.models.toy import write_toy_weights

    write_toy_weights(weights)
    folder = weights / "Qwen3-8B"
    config = AutoConfig.from_pretrained(folder)
    config.update({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "layer_types": None})
    config.layer_types = ["full_attention"] * 8
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    folder = weights / "Wan2.1-VACE-14B-diffusers" / "text_encoder"
    config = AutoConfig.from_pretrained(folder)
    config.update({"d_ff": 4096, "num_layers": 6, "d_kv": 256, "d_model": 1024})
    UMT5EncoderModel(config).save_pretrained(folder)
    folder = weights / "RealVisXL_V4.0" / "unet"
    sizes = {"block_out_channels": (64, 128, 640), "attention_head_dim": (2, 4, 10)}
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder) | sizes)
    unet.save_pretrained(folder)
    write_toy_hyperlora(weights / "HyperLoRA larger", unet, seed=0)


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def peak_mb(act: Callable[[], object]) -> float:
    """Highest resident memory while `act` runs, above that before."""
    before, peak, done = resident_mb(), 0.0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_mb())
            time.sleep(0.005)

    sampler = threading.Thread(target=sample)
    sampler.start()
    act()
    done.set()
    sampler.join()
    return peak - before


def child(step: str, weights: Path) -> float:
    """Peak of one step, or of all of array 1."""
    import torch

    from ipt2v.config import RunConfig, load_settings
    from ipt2v.models.sdxl import load_painter
    from ipt2v.parallel import Group
    from ipt2v.records import Answer, Item
    from ipt2v.stages import first_frame, painting  # here, because imports are not what is measured

    config = load_settings(
        RunConfig, ROOT / "configs/demo.yaml", ("hyperlora.model=HyperLoRA larger", "decouple.max_new_tokens=8")
    )
    photo, device = weights / "photo.png", torch.device("cpu")
    digest = hashlib.sha256(photo.read_bytes()).hexdigest()
    item = Item(identity="a", prompt_id="1", prompt="She walks.", reference=str(photo), reference_sha256=digest)

    alone = Group(rank=0, world_size=1, num_nodes=1, device=device)

    def ask_all(messages: Sequence[str], generate: Callable[[Sequence[str]], list[Answer]]) -> list[Answer]:
        return generate(messages)

    if step == "all":
        return peak_mb(lambda: list(first_frame.make([item], config, weights, alone, ask_all)))
    if step == "LLM":
        return peak_mb(lambda: first_frame.split_prompts([("She walks.", "A woman")], config, weights, alone, ask_all))
    if step == "text encoder":
        return peak_mb(lambda: first_frame.embed(["She walks."], config, weights, alone))
    if step == "painter":
        folder = weights / config.first_frame.model
        return peak_mb(lambda: load_painter(folder, config.first_frame, device=device).paint("a beach", 1))
    photos, _ = first_frame.read_photos([item])
    analyse = first_frame.load_face_analysis(weights / config.faces.model)
    portraits = first_frame.portray_all(photos, config, weights, device, analyse)
    return peak_mb(lambda: painting.load_identities(portraits, config, weights, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(child(options.child, options.weights))
        return
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder)
        enlarge(weights)
        Image.effect_noise((256, 256), 80).convert("RGB").save(weights / "photo.png")
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        peaks = {}
        for step in (*STEPS, "all"):
            command = [sys.executable, __file__, "--child", step, "--weights", folder]
            lines = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
            peaks[step] = float(lines[-1])
            print(f"{'array 1, whole' if step == 'all' else step + ' alone':<20} {peaks[step]:8.0f} MB")
    alone = [peaks[step] for step in STEPS]
    print(f"array 1 / largest alone {peaks['all'] / max(alone):6.2f}")
    print(f"array 1 / sum           {peaks['all'] / sum(alone):6.2f}")


if __name__ == "__main__":
    main()
