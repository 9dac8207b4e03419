"""One rank of test_tensor_parallel.py: the LLM whole and in slices, who asks and who follows; writes what it finds as JSON.

Started by torchrun as `tensor_parallel_worker.py WEIGHTS OUT`; no test by itself.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ipt2v.config import DecoupleConfig
from ipt2v.models.llm import Generate, follow, lead, load_generator
from ipt2v.models.tensor_parallel import own_slice
from ipt2v.parallel import Group, group_from_environment
from ipt2v.records import Answer

MESSAGES = ("a woman walks", "two boys in the park, at night", "色调艳丽", "the dog", "he drives a car")
BATCHES = (MESSAGES[:2], MESSAGES[2:3], MESSAGES[3:])


def load(folder: Path, group: Group, *, num_ranks: int, temperature: float, dtype: str = "float32") -> Generate:
    settings = DecoupleConfig(dtype=dtype, temperature=temperature, max_new_tokens=24, batch_size=3)
    return load_generator(folder, settings, base_seed=7, device=group.device, num_ranks=num_ranks)


def texts(answers: Sequence[Answer]) -> list[tuple[str, bool]]:
    return [(answer.text, answer.finished) for answer in answers]


@contextmanager
def disturbed_logits(group: Group) -> Iterator[None]:
    """On ranks but the first, logits that prefer other tokens than they should."""

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        if type(module).__name__ == "LmHeadLinearAllreduce" and not group.is_first:
            return output.flip(-1)
        return None

    hook = nn.modules.module.register_module_forward_hook(disturb)
    try:
        yield
    finally:
        hook.remove()


def slices(folder: Path, group: Group) -> dict[str, Any]:
    """Sizes of the parameters of the whole model and of this rank's, and what became of the buffers, in bfloat16."""
    whole, model = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for _ in range(2))
    own = own_slice(model, group.device)
    buffers = dict(own.named_buffers())
    return {
        "whole": {name: list(parameter.shape) for name, parameter in whole.named_parameters()},
        "own": {name: list(parameter.shape) for name, parameter in own.named_parameters()},
        "dtypes": sorted({str(parameter.dtype) for parameter in own.parameters()}),
        "buffers": {
            name: [str(buffers[name].dtype), torch.equal(buffers[name], buffer)] for name, buffer in whole.named_buffers()
        },
    }


def three_batches(folder: Path, group: Group) -> dict[str, Any]:
    """What each rank answers if rank 0 asks three batches and an empty one, and when it loads the model."""
    loaded: list[Generate] = []
    answers = []

    def generate(messages: Sequence[str]) -> list[Answer]:
        if not loaded:
            loaded.append(load(folder, group, num_ranks=group.world_size, temperature=0.9))
        answers.append(texts(loaded[0](messages)))
        return [Answer(text=text, finished=finished) for text, finished in answers[-1]]

    if not group.is_first:
        follow(generate, group)
        return {"answers": answers}
    with lead(generate, group) as ask:
        loaded_before = bool(loaded)
        returned = [texts(ask(batch)) for batch in BATCHES]
        empty = ask([])
    return {"answers": answers, "returned": returned, "loaded_before": loaded_before, "empty": empty}


def nothing_to_ask(group: Group) -> str:
    def generate(messages: Sequence[str]) -> list[Answer]:
        raise AssertionError("asked")

    if group.is_first:
        with lead(generate, group):
            pass
    else:
        follow(generate, group)
    return "ended"


def failure_between_batches(group: Group) -> list[str]:
    """What this rank was asked if rank 0 fails after the first batch."""
    asked: list[str] = []

    def generate(messages: Sequence[str]) -> list[Answer]:
        asked.extend(messages)
        return []

    if group.is_first:
        try:
            with lead(generate, group) as ask:
                ask(["first"])
                raise OSError("disk full")
        except OSError as error:
            asked.append(str(error))
    else:
        follow(generate, group)
    return asked


def failure_inside_of_generate(group: Group) -> list[str]:
    """What the collective receives in which the others are when rank 0 alone fails while it generates."""
    received: list[str] = []

    def generate(messages: Sequence[str]) -> list[Answer]:
        if group.is_first:
            raise MemoryError("of rank 0")
        received.append(group.from_first("mine"))
        return []

    if group.is_first:
        try:
            with lead(generate, group) as ask:
                ask(["first"])
        except MemoryError as error:
            received.append(str(error))
        group.from_first("rank 0's next collective")
        group.from_first(list[str]())
    else:
        follow(generate, group)
    return received


def refusal(folder: Path, group: Group) -> str:
    """What load_generator says when one more rank than these asks for a slice."""
    try:
        load(folder, group, num_ranks=3, temperature=0)
    except ValueError as error:
        return str(error)
    return "not refused"


def main(weights: str, out: str) -> None:
    folder = Path(weights) / "Qwen3-8B"
    with group_from_environment() as group:
        found: dict[str, Any] = {}
        for temperature in (0.0, 0.9):
            alone, together = (load(folder, group, num_ranks=n, temperature=temperature) for n in (1, group.world_size))
            found[f"alone {temperature}"] = texts(alone(MESSAGES))
            found[f"together {temperature}"] = texts(together(MESSAGES))
            found[f"again {temperature}"] = texts(together(MESSAGES))
            with disturbed_logits(group):
                found[f"disturbed {temperature}"] = texts(together(MESSAGES))
        half = load(folder, group, num_ranks=group.world_size, temperature=0.9, dtype="bfloat16")
        found |= {
            "bfloat16": texts(half(MESSAGES)),
            "slices": slices(folder, group),
            "refusal": refusal(folder, group),
            "three_batches": three_batches(folder, group),
            "nothing_to_ask": nothing_to_ask(group),
            "failure_between_batches": failure_between_batches(group),
            "failure_inside_of_generate": failure_inside_of_generate(group),
        }
    path = Path(out) / f"{os.environ['RANK']}.json"
    path.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
