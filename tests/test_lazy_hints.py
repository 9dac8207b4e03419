"""VACE's hints one at a time: the same forward, bit for bit, with never more than one hint alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanVACETransformer3DModel

from ipt2v.models.vace.hints import make_hints_lazy

pytestmark = pytest.mark.slow

MODELS = ("Wan2.1-VACE-14B-diffusers", "Wan2.1-VACE-1.3B-diffusers")

Transformer = WanVACETransformer3DModel


@pytest.fixture(scope="module")
def load(toy_weights: Path) -> Callable[..., Transformer]:
    def load(name: str = MODELS[0], dtype: torch.dtype = torch.float32) -> Transformer:
        return Transformer.from_pretrained(toy_weights / name / "transformer", dtype=dtype).eval()

    return load


def deep(num_layers: int = 9, vace_layers: tuple[int, ...] = (0, 1, 4, 8)) -> Transformer:
    """More hints than the toy weights have."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 16, "ffn_dim": 24}
    return Transformer(**sizes, num_layers=num_layers, vace_layers=list(vace_layers), rope_max_seq_len=64).eval()


def inputs_of(transformer: Transformer, size: tuple[int, int, int] = (3, 4, 6)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (1, 16, *size), "control_hidden_states": (1, 96, *size), "encoder_hidden_states": (1, 20, 32)}
    drawn = {name: torch.randn(shape, generator=generator).to(transformer.dtype) for name, shape in shapes.items()}
    scales = torch.linspace(1.0, 0.25, len(transformer.config.vace_layers), dtype=transformer.dtype)
    return {**drawn, "control_hidden_states_scale": scales, "timestep": torch.tensor([500.0]), "return_dict": False}


@torch.inference_mode()
def output_of(transformer: Transformer, **changes: Any) -> torch.Tensor:
    return transformer(**(inputs_of(transformer) | changes))[0]


def calls_of(transformer: Transformer) -> list[str]:
    """Grows by main0, vace0, ... as blocks run in the forwards to come."""
    calls: list[str] = []
    for kind, blocks in (("main", transformer.blocks), ("vace", transformer.vace_blocks)):
        for index, block in enumerate(blocks):
            block.register_forward_hook(lambda *_, name=f"{kind}{index}": calls.append(name))
    return calls


def most_alive(transformer: Transformer) -> list[int]:
    """Grows, as each block starts in the forwards to come, by the number of hints that are alive then."""
    hints: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []
    for block in (*transformer.blocks, *transformer.vace_blocks):
        block.register_forward_pre_hook(lambda *_: counts.append(sum(hint() is not None for hint in hints)))
    for block in transformer.vace_blocks:
        block.register_forward_hook(lambda _module, _args, output: hints.append(weakref.ref(output[0])))
    return counts


# ---- the same forward


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lazy_hints_change_no_bit(load: Callable[..., Transformer], name: str, dtype: torch.dtype) -> None:
    transformer = load(name, dtype)
    expected = output_of(transformer)
    make_hints_lazy(transformer)
    for _ in range(2):  # the second forward must not see the first
        assert torch.equal(output_of(transformer), expected)
    assert expected.isfinite().all() and expected.std() > 0.1


@pytest.mark.parametrize("changes", [{}, {"control_hidden_states_scale": None}, {"return_dict": True}])
def test_other_ways_to_call_the_forward_give_the_same(changes: dict[str, Any]) -> None:
    eager, lazy = deep(), deep()
    make_hints_lazy(lazy)
    assert torch.equal(output_of(lazy, **changes), output_of(eager, **changes))
    assert torch.equal(output_of(lazy, timestep=torch.tensor([20.0])), output_of(eager, timestep=torch.tensor([20.0])))


def test_every_hint_has_its_own_scale(load: Callable[..., Transformer]) -> None:
    transformer = load()
    make_hints_lazy(transformer)
    outputs = [output_of(transformer, control_hidden_states_scale=torch.tensor(scales)) for scales in ((1.0, 0.5), (0.5, 1.0))]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


# ---- one hint at a time


def test_a_vace_block_runs_when_the_main_block_that_takes_its_hint_has_run() -> None:
    transformer = deep(num_layers=6, vace_layers=(0, 1, 4))
    calls = calls_of(transformer)
    output_of(transformer)
    assert calls[:4] == ["vace0", "vace1", "vace2", "main0"]  # as diffusers has it
    calls.clear()
    make_hints_lazy(transformer)
    output_of(transformer)
    assert calls == ["main0", "vace0", "main1", "vace1", "main2", "main3", "main4", "vace2", "main5"]


def test_no_two_hints_are_alive_at_once() -> None:
    eager, lazy = deep(), deep()
    make_hints_lazy(lazy)
    counts = {name: most_alive(transformer) for name, transformer in (("eager", eager), ("lazy", lazy))}
    output_of(eager), output_of(lazy)
    assert max(counts["eager"]) == 4
    assert max(counts["lazy"]) == 0  # when a block starts, the hint before it has been added and is gone


def test_the_first_hidden_states_are_gone_once_the_first_hint_is_there() -> None:
    transformer = deep()
    make_hints_lazy(transformer)
    first: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    transformer.blocks[0].register_forward_pre_hook(lambda _module, args: first.append(weakref.ref(args[0])))
    transformer.blocks[1].register_forward_pre_hook(lambda *_: alive.append(first[-1]() is not None))
    output_of(transformer)
    assert alive == [False]


# ---- nothing else is touched


def test_parameters_and_their_names_stay_as_they_are(load: Callable[..., Transformer]) -> None:
    stock, lazy = load(), load()
    make_hints_lazy(lazy)
    output_of(lazy)
    assert list(lazy.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in lazy.named_modules()] == [name for name, _ in stock.named_modules()]
    assert all(torch.equal(one, other) for one, other in zip(lazy.parameters(), stock.parameters(), strict=True))


def test_outside_a_forward_vace_blocks_are_modules_also_after_one_that_failed(load: Callable[..., Transformer]) -> None:
    transformer = load()
    blocks = list(transformer.vace_blocks)
    make_hints_lazy(transformer)
    expected = output_of(transformer)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of it")

    handle = transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle of it"):
        output_of(transformer)
    handle.remove()
    assert list(transformer.vace_blocks) == blocks
    assert isinstance(transformer.vace_blocks, torch.nn.ModuleList)
    assert torch.equal(output_of(transformer), expected)


def test_hooks_of_a_block_run_when_it_runs_and_may_change_what_it_sees() -> None:
    eager, lazy = deep(), deep()
    make_hints_lazy(lazy)
    for transformer in (eager, lazy):
        for index, block in enumerate(transformer.vace_blocks):
            block.register_forward_pre_hook(lambda _m, args, by=index: (*args[:2], args[2] * (1 + by), *args[3:]))
            block.register_forward_hook(lambda _m, _args, output: (output[0] * 0.5, output[1]))
    assert torch.equal(output_of(lazy), output_of(eager))


def test_blocks_may_be_compiled_one_by_one() -> None:
    eager, lazy = deep(num_layers=2, vace_layers=(0, 1)), deep(num_layers=2, vace_layers=(0, 1))
    make_hints_lazy(lazy)
    for block in (*lazy.blocks, *lazy.vace_blocks):
        block.compile(backend="eager")  # traces, and needs no compiler of C++
    assert torch.equal(output_of(lazy), output_of(eager))
