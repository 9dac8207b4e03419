"""Each switch for speed, off by default, gives what the transformer gives without it, up to rounding."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanVACETransformer3DModel
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend

from ipt2v.models.vace.hints import make_hints_lazy
from ipt2v.models.vace.speed import Capabilities, attention_backend, choose, compile_blocks, fuse_qkv
from ipt2v.models.vace.step_cache import CacheRule, cache_steps
from ipt2v.models.vace.text import keep_text

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("speed_worker.py")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

Transformer = WanVACETransformer3DModel


def toy(dtype: torch.dtype = torch.float32, *, num_layers: int = 6, vace_layers: tuple[int, ...] = (0, 1, 3, 5)) -> Transformer:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 16, "ffn_dim": 24}
    deep = {"num_layers": num_layers, "vace_layers": list(vace_layers), "rope_max_seq_len": 64}
    return Transformer(**sizes, **deep).eval().requires_grad_(False).to(dtype)


@torch.inference_mode()
def output_of(
    transformer: Transformer, size: tuple[int, int, int] = (3, 4, 6), *, text: torch.Tensor | None = None, step: int = 0
) -> torch.Tensor:
    generator, dtype = torch.Generator().manual_seed(1), transformer.dtype
    shapes = {"hidden_states": (1, 16, *size), "control_hidden_states": (1, 96, *size), "encoder_hidden_states": (1, 20, 32)}
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    scales = torch.linspace(1.0, 0.25, len(transformer.config.vace_layers), dtype=dtype)
    timestep = torch.tensor([500.0 - 100 * step])
    drawn |= {} if text is None else {"encoder_hidden_states": text}
    return transformer(**drawn, control_hidden_states_scale=scales, timestep=timestep, return_dict=False)[0]


def self_attentions(transformer: Transformer) -> list[Any]:
    return [block.attn1 for block in (*transformer.blocks, *transformer.vace_blocks)]


# ---- one product for queries, keys and values


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_fused_projections_differ_by_rounding_at_most(dtype: torch.dtype, limit: float) -> None:
    expected, fused = output_of(toy(dtype)), toy(dtype)
    make_hints_lazy(fused)
    fuse_qkv(fused)
    assert (output_of(fused) - expected).abs().max() <= limit * expected.abs().max()
    assert expected.std() > 0.1


def test_fused_attention_is_one_product_and_no_weight_is_there_twice() -> None:
    plain, fused = toy(), toy()
    old = [weakref.ref(attention.to_k.weight) for attention in self_attentions(fused)]
    fuse_qkv(fused)
    gc.collect()
    assert all(weight() is None for weight in old)
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() for parameter in fused.parameters()
    }
    assert sum(storages.values()) == sum(parameter.nbytes for parameter in plain.parameters())
    calls: list[Any] = []
    for attention in self_attentions(fused):
        attention.to_qkv.register_forward_hook(lambda *_: calls.append(1))
    output_of(fused)
    assert len(calls) == 10


def test_the_names_of_fused_parameters_are_as_documented() -> None:
    plain, fused = toy().state_dict(), toy()
    fuse_qkv(fused)
    state = fused.state_dict()
    attentions = [*(f"blocks.{index}.attn1" for index in range(6)), *(f"vace_blocks.{index}.attn1" for index in range(4))]
    for kind in ("weight", "bias"):
        for attention in attentions:
            rows = [plain.pop(f"{attention}.to_{one}.{kind}") for one in "qkv"]
            assert torch.equal(state.pop(f"{attention}.to_qkv.{kind}"), torch.cat(rows))
    assert list(plain) == list(state)
    assert not any(parameter.requires_grad for parameter in fused.parameters())


def test_a_processor_that_asks_for_three_projections_gets_the_same_numbers() -> None:
    plain, fused = toy(), toy()
    fuse_qkv(fused)
    hidden = torch.randn(1, 18, 24, generator=torch.Generator().manual_seed(3))
    for one, other in zip(self_attentions(plain), self_attentions(fused), strict=True):
        for name in ("to_q", "to_k", "to_v"):
            assert torch.equal(getattr(one, name)(hidden), getattr(other, name)(hidden))


def test_what_cannot_be_fused_is_refused_by_name_and_nothing_is_changed() -> None:
    class Adapted(torch.nn.Linear):
        """As LoRA makes of it."""

    transformer = toy()
    transformer.vace_blocks[3].attn1.to_v = Adapted(24, 24)
    with pytest.raises(ValueError, match=r"vace_blocks\.3\.attn1\.to_v: found Adapted, expected Linear"):
        fuse_qkv(transformer)
    assert not any("to_qkv" in name for name, _ in transformer.named_parameters())
    fused = toy()
    fuse_qkv(fused)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.to_q: found _Rows, expected Linear; fuse once"):
        fuse_qkv(fused)


# ---- compiled blocks


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("is_fused", [False, True])
def test_compiled_blocks_change_no_bit_of_lazy_hints(is_fused: bool) -> None:
    transformers = [toy(), toy()]
    for transformer in transformers:
        make_hints_lazy(transformer)
        if is_fused:
            fuse_qkv(transformer)
    compile_blocks(transformers[1], backend="eager")
    for size in ((3, 4, 6), (2, 4, 4), (3, 4, 6)):
        assert torch.equal(output_of(transformers[1], size), output_of(transformers[0], size))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_blocks_work_with_a_step_cache() -> None:
    transformers = [toy(), toy()]
    outputs = []
    for transformer in transformers:
        make_hints_lazy(transformer)
        cache = cache_steps(transformer, CacheRule(threshold=0.1, num_first_blocks=2, warmup_steps=1))
        if transformer is transformers[1]:
            compile_blocks(transformer, backend="eager")
        cache.reset(3, 1)
        outputs.append(torch.stack([output_of(transformer) for _ in range(3)]))
        assert cache.saved().num_skipped == 2
    assert torch.equal(*outputs)


@pytest.mark.usefixtures("fresh_dynamo")
def test_equal_blocks_share_a_compiled_program_and_a_second_forward_compiles_nothing() -> None:
    transformer, counter = toy(num_layers=12, vace_layers=(0, 2, 4, 6)), CompileCounter()
    make_hints_lazy(transformer)
    compile_blocks(transformer, backend=counter)  # type: ignore[arg-type]
    output_of(transformer)
    compiled = counter.frame_count
    output_of(transformer)
    assert counter.frame_count == compiled <= 4  # a main block, the first VACE block, another


# ---- which attention kernel

HOPPER = {"device_type": "cuda", "compute_capability": (9, 0), "cudnn_version": 91501}
CUDNN, FLASH, EFFICIENT, MATH = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@pytest.mark.parametrize(
    ("found", "order"),
    [
        (HOPPER | {"has_cudnn": True, "has_flash": True, "has_efficient": True}, (CUDNN, FLASH, EFFICIENT, MATH)),
        (HOPPER | {"has_flash": True, "has_efficient": True}, (FLASH, EFFICIENT, MATH)),
        (HOPPER | {"has_cudnn": True, "has_flash": True, "cudnn_version": 91002}, (FLASH, MATH)),
        (HOPPER | {"has_cudnn": True, "has_flash": True, "compute_capability": (8, 0)}, (FLASH, MATH)),
        (HOPPER | {"has_cudnn": True, "has_flash": True, "compute_capability": (9, 4)}, (FLASH, MATH)),
        (HOPPER | {"has_efficient": True}, (EFFICIENT, MATH)),
        (HOPPER, (MATH,)),
        ({"device_type": "cpu", "has_flash": True}, (FLASH, MATH)),
    ],
)
def test_the_best_kernel_that_runs_comes_first(found: dict[str, Any], order: tuple[SDPBackend, ...]) -> None:
    assert choose(Capabilities(**found)).order == order


def test_a_backend_has_a_name_for_the_log() -> None:
    assert choose(Capabilities(**HOPPER, has_cudnn=True)).name == "cuDNN attention"
    assert attention_backend(torch.device("cpu"), torch.float32).name == "flash attention"


def test_on_a_cpu_the_backend_changes_no_bit_and_is_left_again() -> None:
    transformer, backend = toy(), attention_backend(torch.device("cpu"), torch.float32, num_heads=2, head_width=12)
    expected = output_of(transformer)
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    with backend.applied():
        assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == list(backend.order)
        assert torch.equal(output_of(transformer), expected)
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before


def test_single_operations_differ_from_flash_attention_by_rounding() -> None:
    query, key, value = torch.randn(3, 1, 2, 50, 16, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(query, key, value)
    with choose(Capabilities(device_type="cuda")).applied():
        found = F.scaled_dot_product_attention(query, key, value)
    assert 0 < (found - expected).abs().max() < 1e-5


# ---- several ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("speed")
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(WORKER.parent.parent)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(WORKER), "speed", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("switch", ["fused", "compiled"])
@pytest.mark.parametrize("split", ["ulysses", "ring"])
def test_switches_change_a_split_forward_by_rounding_at_most(ranks: list[dict[str, Any]], split: str, switch: str) -> None:
    assert max(rank[split][switch] for rank in ranks) <= 1e-5


def test_weights_that_ranks_share_are_not_fused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "blocks.0.attn1.to_q: found weights that the ranks share, expected whole ones" in rank["refused"]


def test_what_follows_from_the_text_is_computed_once_for_each_text_and_changes_no_bit() -> None:
    plain, keeping = toy(), toy()
    make_hints_lazy(plain)
    make_hints_lazy(keeping)
    counted = [keeping.condition_embedder.text_embedder, keeping.blocks[3].attn2.to_k, keeping.vace_blocks[1].attn2.to_v]
    calls: list[int] = [0] * len(counted)
    for index, module in enumerate(counted):
        module.forward = partial(count_call, calls, index, module.forward)
    keep_text(keeping)
    generator = torch.Generator().manual_seed(9)
    texts = [torch.randn((1, 20, 32), generator=generator) for _ in range(4)]
    for video in range(2):
        for step in range(3):
            for text in texts[2 * video : 2 * video + 2]:
                assert torch.equal(output_of(keeping, text=text, step=step), output_of(plain, text=text, step=step))
    assert calls == [4, 4, 4]
    twin = texts[3].clone()  # equal, but another tensor: nothing is known of it
    assert torch.equal(output_of(keeping, text=twin), output_of(plain, text=twin)) and calls == [5, 5, 5]


def count_call(calls: list[int], index: int, forward: Any, text: torch.Tensor) -> torch.Tensor:
    calls[index] += 1
    return forward(text)
