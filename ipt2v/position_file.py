"""A position in the denoising of a video <-> safetensors, which keeps every dtype and runs no code when it is read."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ipt2v.atomic import replacing
from ipt2v.models.vace.position import Position

log = logging.getLogger(__name__)


def save_position(path: Path, position: Position, *, key: str, run_digest: str, seconds: float) -> None:
    """Write a position as a file that is whole or not there. `seconds` were spent on the video so far."""
    facts = {"num_done": position.num_done, "num_steps": position.num_steps, "numbers": position.numbers, "seconds": seconds}
    metadata = {"key": key, "run_digest": run_digest, "facts": json.dumps(facts)}
    tensors = {f"scheduler.{name}": tensor.cpu().contiguous() for name, tensor in position.tensors.items()}
    # clones: a file of safetensors refuses tensors that share memory, as the last sample and the latents may
    tensors = {name: tensor.clone() for name, tensor in (tensors | {"latents": position.latents_BCthw.cpu()}).items()}
    with replacing(path) as scratch:
        save_file(tensors, scratch, metadata)


def load_position(path: Path, *, key: str, run_digest: str) -> tuple[Position, float] | None:
    """(position, seconds spent so far) of a file that save_position has written, on the CPU.

    None if there is none, or none that fits this video of this run: only steps are lost then, so it is no error.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("key"), metadata.get("run_digest")) != (key, run_digest):
                raise ValueError(f"of {metadata.get('key')} in run {metadata.get('run_digest', '')[:12]}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        facts = json.loads(metadata["facts"])
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        log.warning("%s: found %s, expected the saved steps of %s; it starts again at step 0", path, error, key)
        return None
    position = Position(
        num_done=facts["num_done"],
        num_steps=facts["num_steps"],
        latents_BCthw=tensors.pop("latents"),
        tensors={name.removeprefix("scheduler."): tensor for name, tensor in tensors.items()},
        numbers=facts["numbers"],
    )
    return position, facts["seconds"]
