"""A transformers model that the ranks share by DeepSpeed's ZeRO-3, or that lies in the host's memory. Knows no text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ipt2v.config import DecoupleConfig, TextEncoderConfig
from ipt2v.models.deepspeed_start import alone_in_a_group, is_installed, local_rank_of, running_deepspeed
from ipt2v.parallel import Group

# what load_zero3 has loaded and ready_for_zero3 is to free
_LOADED: list[Any] = []
# the blocks of DeepSpeed's settings that say in which type zero.Init makes parameters; float32 needs none
_TYPES: dict[torch.dtype, dict[str, Any]] = {
    torch.bfloat16: {"bf16": {"enabled": True}},
    torch.float16: {"fp16": {"enabled": True}},
    torch.float32: {},
}


def is_shared(settings: DecoupleConfig | TextEncoderConfig, num_ranks: int) -> bool:
    """Whether load_zero3 is to load the model: on one rank only to keep it in the host's memory."""
    return settings.weights_sharding == "zero3" and (num_ranks > 1 or settings.cpu_offload)


@contextmanager
def ready_for_zero3(settings: DecoupleConfig | TextEncoderConfig, group: Group) -> Iterator[None]:
    """Where a model that load_zero3 may load is loaded, used and let go: DeepSpeed finds its surroundings as it needs them.

    So torch has a process group also on one rank, and LOCAL_RANK names the device. All is as before when it ends, and the
    weights are freed.
    """
    with ExitStack() as stack:
        if is_shared(settings, group.world_size):
            stack.enter_context(local_rank_of(group.device))
            if group.world_size == 1:
                stack.enter_context(alone_in_a_group(group.device))
            stack.callback(_free)
        yield


def load_zero3(load: Callable[[], Any], dtype: torch.dtype, device: torch.device, *, cpu_offload: bool) -> Any:
    """The model that `load` gives by from_pretrained in `dtype`, of which each rank keeps a part; gathered layer by layer.

    To be called on all ranks, inside of `ready_for_zero3`; then all must do the same number of forwards. No device ever holds
    it whole: transformers makes and fills it layer by layer. Rank 0 alone reads the values, all files into the host's memory,
    and sends them. Raises ValueError if DeepSpeed is not installed.
    """
    if not is_installed():
        raise ValueError("weights_sharding zero3 needs deepspeed, which is not installed; pip install 'ipt2v[shard]'")
    config = zero3_config(device, cpu_offload=cpu_offload)
    with running_deepspeed(device) as deepspeed:
        shared = HfDeepSpeedConfig(config | _TYPES[dtype])  # transformers keeps a weak reference to it, for all models
        try:
            model = load()
        finally:
            del shared
            unset_hf_deepspeed_config()  # an exception's traceback might keep it alive
        add_hooks(deepspeed, model, config)
    _LOADED.append(model)
    return model


def _free() -> None:
    """Take the hooks and the weights away from all that is loaded.

    After its second forward a model of DeepSpeed 0.19.8 is not freed by itself, for a reason that was not found.
    """
    while _LOADED:
        model = _LOADED.pop()
        model.__dict__.pop("_deepspeed_engine").destroy()
        for parameter in model.parameters():
            parameter.ds_tensor = None
            parameter.data = parameter.data.new_empty(0)


def zero3_config(device: torch.device, *, cpu_offload: bool) -> dict[str, Any]:
    """DeepSpeed's settings for sharing, without training."""
    sharing: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # small parameters, too
        "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear for every model of this process
    }
    if cpu_offload:
        sharing["offload_param"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    # a batch size is asked for, though nothing is trained
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": sharing}


def add_hooks(deepspeed: Any, model: nn.Module, config: dict[str, Any]) -> None:
    """Have `model`, whose parameters ZeRO-3 has shared out, gather those of each layer when it is called; not for training.

    The hooks live as long as the model.
    """
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.eval()
    # DeepSpeed 0.19.8 puts each model at the bottom of this list, and takes none away: so none could ever be freed
    bottom = deepspeed.runtime.zero.parameter_offload.FWD_MODULE_STACK.pop()
    assert bottom is model, "DeepSpeed's list of modules has another on top"
    # it takes its hooks away when it is freed
    model.__dict__["_deepspeed_engine"] = engine
