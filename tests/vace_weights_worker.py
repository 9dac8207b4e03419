"""One rank of test_vace_weights.py: loads the transformer in each way and writes what it finds as JSON.

Started as `vace_weights_worker.py FOLDER LARGE BROKEN OUT`, with torch's environment of one of four ranks on two nodes; no test
by itself. FOLDER is a published folder, LARGE a transformer's, BROKEN one that lacks a tensor.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch.distributed.tensor import DTensor

TIMEOUT_SECONDS = 230
NUM_READ: dict[str, int] = {}  # bytes of each tensor that this rank has read
WAYS = {
    "none": {"weights_sharding": "none"},
    "fsdp2": {"weights_sharding": "fsdp2"},
    "zero3": {"weights_sharding": "zero3"},
    "zero3 offload": {"weights_sharding": "zero3", "cpu_offload": True},
}
real_safe_open = safetensors.safe_open


class CountingSlice:
    def __init__(self, name: str, inner: Any) -> None:
        self.name, self.inner = name, inner

    def __getitem__(self, rows: Any) -> torch.Tensor:
        return counted(self.name, self.inner[rows])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class CountingFile:
    """safetensors' safe_open, which notes what is read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.inner = real_safe_open(*args, **kwargs)

    def __enter__(self) -> CountingFile:
        self.inner.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.inner.__exit__(*args)

    def get_tensor(self, name: str) -> torch.Tensor:
        return counted(name, self.inner.get_tensor(name))

    def get_slice(self, name: str) -> CountingSlice:
        return CountingSlice(name, self.inner.get_slice(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def counted(name: str, tensor: torch.Tensor) -> torch.Tensor:
    NUM_READ[name] = NUM_READ.get(name, 0) + tensor.nbytes
    return tensor


safetensors.safe_open = CountingFile  # before anybody imports it

from diffusers import WanVACETransformer3DModel  # noqa: E402
from split_worker import first_frame_of  # noqa: E402

from ipt2v.config import VideoConfig  # noqa: E402
from ipt2v.models.vace.degrees import Degrees  # noqa: E402
from ipt2v.models.vace.load import load_animator  # noqa: E402
from ipt2v.models.vace.sharding import load_weights  # noqa: E402
from ipt2v.parallel import Group, group_from_environment, release  # noqa: E402


def settings(way: str, dtype: str = "float32") -> VideoConfig:
    small = {"width": 80, "height": 48, "num_frames": 17, "num_inference_steps": 3, "max_text_tokens": 32}
    return VideoConfig.model_validate({"dtype": dtype, "guidance_scale": 5.0, **small, **WAYS[way]})


@contextmanager
def whole(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """A parameter's value, put together of all ranks' parts."""
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    else:
        yield parameter


def own_part(parameter: torch.Tensor) -> int:
    """Number of elements that this rank keeps of a parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.ds_tensor.numel() if hasattr(parameter, "ds_id") else parameter.numel()


def parameters(folder: Path, group: Group, way: str, dtype: str) -> dict[str, Any]:
    """What was read, and how the parameters and buffers differ from those of from_pretrained."""
    expected = WanVACETransformer3DModel.from_pretrained(folder, dtype=getattr(torch, dtype))
    NUM_READ.clear()
    found = load_weights(folder, settings(way, dtype), group)
    read = dict(NUM_READ)
    wanted, different = expected.state_dict(), []
    for name, parameter in found.named_parameters():
        with whole(parameter) as value:
            if value.dtype != wanted[name].dtype or not torch.equal(value, wanted[name]):
                different.append(name)
    buffers = dict(found.named_buffers())
    return {
        "read": read,
        "different": different,
        "same_names": {name for name, _ in found.named_parameters()} == set(wanted),
        "same_buffers": all(torch.equal(buffers[name], buffer) for name, buffer in expected.named_buffers()),
        "trained": any(parameter.requires_grad for parameter in found.parameters()) or found.training,
        "part": sum(map(own_part, found.parameters())) / sum(parameter.numel() for parameter in wanted.values()),
    }


def videos(folder: Path, group: Group, dtype: str) -> dict[str, Any]:
    """Largest difference of a video's latents, for each way on a CFG pair of two Ulysses ranks, to those of one rank alone."""
    first_frame = first_frame_of(80, 48)
    alone = Group(rank=0, world_size=1, num_nodes=1, device=group.device)
    expected = load_animator(folder, settings("none", dtype), alone).animate(first_frame, 5)
    differences: dict[str, Any] = {"largest": float(np.abs(expected).max())}
    for way in WAYS if dtype == "float32" else ("fsdp2", "zero3"):
        animate = load_animator(folder, settings(way, dtype), group, Degrees(cfg=2, ulysses=2)).animate
        latents = [animate(first_frame, 5) for _ in range(2)]
        differences[way] = max(float(np.abs(one - expected).max()) for one in latents)
        del animate
        release(group.device)
    return differences


@contextmanager
def peak_of_private_memory(found: dict[str, float]) -> Iterator[None]:
    """Bytes by which the memory that is this process's alone grew, at most, in `found`."""

    def private_bytes() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def sample() -> None:
        while not stop.wait(0.003):
            samples.append(private_bytes())

    samples, stop = [private_bytes()], threading.Event()
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        found |= {"peak": max(samples) - samples[0], "after": private_bytes() - samples[0]}


def memory(folder: Path, group: Group, way: str) -> dict[str, float]:
    found: dict[str, float] = {}
    release(group.device)
    group.meet()
    with peak_of_private_memory(found):
        transformer = load_weights(folder, settings(way), group)
    found["whole"] = 4 * sum(getattr(one, "ds_numel", one.numel()) for one in transformer.parameters())
    return found


def refusal(folder: Path, group: Group, way: str) -> str:
    try:
        load_weights(folder, settings(way), group)
    except ValueError as error:
        return str(error)
    return "not refused"


def main(folder_name: str, large: str, broken: str, out: str) -> None:
    environment = dict(os.environ)
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS, exit=True)  # a rank that waits for ever says where
    folder = Path(folder_name)
    transformer = folder / "transformer"
    with group_from_environment() as group:
        found: dict[str, Any] = {"nodes": group.num_nodes}
        for dtype in ("float32", "bfloat16"):
            found[dtype] = {way: parameters(transformer, group, way, dtype) for way in WAYS}
        # after the small one, so that what is imported and started does not count
        found["memory"] = {way: memory(Path(large), group, way) for way in ("fsdp2", "zero3")}
        found["videos"] = {dtype: videos(folder, group, dtype) for dtype in ("float32", "bfloat16")}
        seen = Path(broken) if group.rank == 3 else transformer
        found["refusals"] = {way: refusal(seen, group, way) for way in WAYS}
    found["environment_changed"] = sorted(
        key for key in {**environment, **os.environ} if environment.get(key) != os.environ.get(key)
    )
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
