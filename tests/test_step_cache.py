"""Steps that change little are skipped as the rule says, nothing else changes, and all ranks of a video skip the same steps.

The ranks are processes of speed_worker.py over gloo, started once; the tests read what they found.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanVACETransformer3DModel

from ipt2v.models.vace.hints import make_hints_lazy
from ipt2v.models.vace.step_cache import CacheRule, StepCache, cache_steps

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("speed_worker.py")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

Transformer = WanVACETransformer3DModel
NUM_LAYERS, VACE_LAYERS, NUM_FIRST = 6, (0, 1, 3, 5), 2  # the last main block takes a hint, too
NUM_BLOCKS = NUM_LAYERS + len(VACE_LAYERS)
FIRST = ["main0", "vace0", "main1", "vace1"]
ALL = [*FIRST, "main2", "main3", "vace2", "main4", "main5", "vace3"]
ALWAYS = CacheRule(threshold=math.inf, num_first_blocks=NUM_FIRST, warmup_steps=1, max_skips=100)


def toy(dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 16, "ffn_dim": 24}
    deep = {"num_layers": NUM_LAYERS, "vace_layers": list(VACE_LAYERS), "rope_max_seq_len": 64}
    return Transformer(**sizes, **deep).eval().to(dtype)


def cached(rule: CacheRule, dtype: torch.dtype = torch.float32) -> tuple[Transformer, StepCache]:
    transformer = toy(dtype)
    make_hints_lazy(transformer)
    return transformer, cache_steps(transformer, rule)


def inputs_of(step: float, text: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The latents of a step wander from one draw to another; the text of a pass and the condition stay."""
    generator = torch.Generator().manual_seed(1)
    start, end, control = (torch.randn((1, size, 3, 4, 6), generator=generator) for size in (16, 16, 96))
    texts = torch.randn((2, 1, 20, 32), generator=generator)
    return {
        "hidden_states": torch.lerp(start, end, 0.1 * step).to(dtype),
        "control_hidden_states": control.to(dtype),
        "encoder_hidden_states": texts[text].to(dtype),
        "control_hidden_states_scale": torch.linspace(1.0, 0.25, len(VACE_LAYERS), dtype=dtype),
        "timestep": torch.tensor([900.0 - 50 * step]),
        "return_dict": False,
    }


@torch.inference_mode()
def output_of(transformer: Transformer, **inputs: Any) -> torch.Tensor:
    return transformer(**inputs)[0]


def video_of(transformer: Transformer, num_steps: int, num_passes: int = 1) -> list[torch.Tensor]:
    return [output_of(transformer, **inputs_of(step, text)) for step in range(num_steps) for text in range(num_passes)]


def calls_of(transformer: Transformer) -> list[str]:
    """Grows by main0, vace0, ... as blocks run in the forwards to come."""
    calls: list[str] = []
    for kind, blocks in (("main", transformer.blocks), ("vace", transformer.vace_blocks)):
        for index, block in enumerate(blocks):
            block.register_forward_hook(lambda *_, name=f"{kind}{index}": calls.append(name))
    return calls


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# ---- nothing skipped


@pytest.mark.parametrize("num_passes", [1, 2])
@pytest.mark.parametrize("num_first", range(1, NUM_LAYERS))
def test_with_threshold_0_no_bit_changes(num_first: int, num_passes: int) -> None:
    transformer, cache = cached(CacheRule(threshold=0, num_first_blocks=num_first, warmup_steps=1))
    cache.reset(4, num_passes)
    assert equal(video_of(transformer, 4, num_passes), video_of(toy(), 4, num_passes))
    assert cache.saved().num_skipped == 0


def test_in_half_precision_no_bit_changes_either() -> None:
    dtype = torch.bfloat16
    transformer, cache = cached(CacheRule(threshold=0, num_first_blocks=2, warmup_steps=1), dtype)
    cache.reset(3, 1)
    stock = toy(dtype)
    for step in range(3):
        inputs = inputs_of(step, dtype=dtype)
        assert torch.equal(output_of(transformer, **inputs), output_of(stock, **inputs))


def test_every_hint_is_added_after_its_own_main_block() -> None:
    transformer, cache = cached(CacheRule(threshold=0, num_first_blocks=2, warmup_steps=1))
    calls = calls_of(transformer)
    cache.reset(1, 1)
    video_of(transformer, 1)
    assert calls == ALL


# ---- what is skipped


@pytest.mark.parametrize("num_passes", [1, 2])
def test_with_an_infinite_threshold_all_but_the_warm_up_runs_the_first_blocks_only(num_passes: int) -> None:
    transformer, cache = cached(ALWAYS)
    calls = calls_of(transformer)
    cache.reset(5, num_passes)
    video_of(transformer, 5, num_passes)
    assert calls == num_passes * ALL + 4 * num_passes * FIRST
    assert len(calls) == cache.saved().num_block_runs - cache.saved().num_saved_runs


@pytest.mark.parametrize(
    ("warmup_steps", "max_skips", "expected"),
    [(1, 100, "0111111"), (3, 100, "0001111"), (1, 1, "0101010"), (1, 2, "0110110"), (2, 3, "0011101"), (1, 0, "0000000")],
)
def test_the_warm_up_and_the_limit_on_skips_hold(warmup_steps: int, max_skips: int, expected: str) -> None:
    rule = CacheRule(threshold=math.inf, num_first_blocks=2, warmup_steps=warmup_steps, max_skips=max_skips)
    assert skipped(rule, [float(step) for step in range(7)]) == expected


def skipped(rule: CacheRule, places: list[float]) -> str:
    """A 1 for each step that is skipped, of a video whose latents go through these places."""
    transformer, cache = cached(rule)
    cache.reset(len(places), 1)
    found = ""
    for place in places:
        before = cache.saved().num_skipped
        output_of(transformer, **inputs_of(place))
        found += str(cache.saved().num_skipped - before)
    return found


def change_between(step: float, other: float) -> float:
    """The relative change of what the first blocks give."""
    first, second = (first_and_last(toy(), inputs_of(place))[0].double() for place in (step, other))
    return ((second - first).abs().sum() / first.abs().sum()).item()


def test_a_step_is_skipped_if_it_changes_less_than_the_threshold_against_the_last_computed_one() -> None:
    # against the last step each change would be below; against the last computed one every third is not
    changes = [change_between(0, other) for other in (0.1, 0.2, 0.3)]
    assert changes == sorted(changes)
    threshold = (changes[1] + changes[2]) / 2
    rule = CacheRule(threshold=threshold, num_first_blocks=2, warmup_steps=1, max_skips=100)
    assert skipped(rule, [0, 0.1, 0.2, 0.3]) == "0110"
    assert skipped(rule, [0, 3, 0, 3]) == "0000"
    assert skipped(rule, [0, 0.3, 0.3]) == "001"


def test_what_is_no_number_is_never_skipped() -> None:
    transformer, cache = cached(ALWAYS)
    cache.reset(2, 1)
    video_of(transformer, 1)
    inputs = inputs_of(1)
    output_of(transformer, **(inputs | {"hidden_states": inputs["hidden_states"] * math.nan}))
    assert cache.saved().num_skipped == 0


# ---- what a skipped step gives


@torch.inference_mode()
def first_and_last(transformer: Transformer, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out of the first blocks of a forward without a cache, and out of the last block."""
    seen: list[torch.Tensor] = []

    def see(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0])

    handles = [module.register_forward_pre_hook(see) for module in (transformer.blocks[NUM_FIRST], transformer.norm_out)]
    transformer(**inputs)
    for handle in handles:
        handle.remove()
    first, last = seen
    return first, last


def output_with(last: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """The output of a forward without a cache, if this had come out of its last block."""
    transformer = toy()
    transformer.norm_out.register_forward_pre_hook(lambda *_: (last,))
    return output_of(transformer, **inputs)


def test_a_skipped_step_gives_its_own_first_blocks_plus_what_the_others_added_in_the_last_computed_step() -> None:
    rule = CacheRule(threshold=math.inf, num_first_blocks=2, warmup_steps=2, max_skips=100)
    transformer, cache = cached(rule)
    cache.reset(4, 2)
    found = video_of(transformer, 4, 2)
    for text in (0, 1):  # each pass with its own residual
        first, last = first_and_last(toy(), inputs_of(1, text))
        for step in (2, 3):
            inputs = inputs_of(step, text)
            expected = output_with(first_and_last(toy(), inputs)[0] + (last - first), inputs)
            assert torch.equal(found[2 * step + text], expected)
            assert (found[2 * step + text] - output_of(toy(), **inputs)).abs().max() > 1e-3


# ---- one video after another


def test_two_videos_in_a_row_do_not_see_each_other() -> None:
    transformer, cache = cached(ALWAYS)
    outputs = []
    for _ in range(2):
        cache.reset(3, 2)
        outputs.append(video_of(transformer, 3, 2))
    assert equal(*outputs)
    cache.reset(2, 1)
    video_of(transformer, 1)  # and one that was given up in the middle
    cache.reset(3, 2)
    assert equal(video_of(transformer, 3, 2), outputs[0])
    assert (cache.saved().num_forwards, cache.saved().num_skipped) == (6, 4)


def test_after_the_last_forward_nothing_is_kept() -> None:
    transformer, cache = cached(ALWAYS)
    cache.reset(3, 2)
    video_of(transformer, 2, 2)
    kept = [cache.reference_BsD, *cache.residuals_BsD.values()]
    assert len(kept) == 3 and all(isinstance(one, torch.Tensor) for one in kept)
    video_of(transformer, 1, 2)
    assert (cache.reference_BsD, cache.first_BsD, cache.residuals_BsD) == (None, None, {})


def test_a_forward_that_reset_was_not_told_of_is_a_bug() -> None:
    transformer, cache = cached(ALWAYS)
    with pytest.raises(AssertionError, match="more forwards than reset"):
        video_of(transformer, 1)
    cache.reset(1, 1)
    with pytest.raises(AssertionError, match="more forwards than reset"):
        video_of(transformer, 2)


def test_hints_must_be_lazy_before() -> None:
    transformer = toy()
    cache = cache_steps(transformer, ALWAYS)
    make_hints_lazy(transformer)
    cache.reset(1, 1)
    with pytest.raises(AssertionError, match="make_hints_lazy comes first"):
        video_of(transformer, 1)


@pytest.mark.parametrize(("num_first", "warmup", "said"), [(0, 1, "1 to 5 of 6"), (6, 1, "1 to 5 of 6"), (1, 0, "1 or more")])
def test_a_rule_that_does_not_fit_is_refused(num_first: int, warmup: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cache_steps(toy(), CacheRule(threshold=0.1, num_first_blocks=num_first, warmup_steps=warmup))


def test_outside_a_forward_the_transformer_is_as_it_was_also_after_one_that_failed() -> None:
    transformer, cache = cached(ALWAYS)
    names = [name for name, _ in transformer.named_modules()]

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of it")

    handle = transformer.blocks[4].register_forward_pre_hook(fail)
    cache.reset(2, 1)
    with pytest.raises(RuntimeError, match="in the middle of it"):
        video_of(transformer, 1)
    handle.remove()
    assert isinstance(transformer.blocks, torch.nn.ModuleList) and isinstance(transformer.vace_blocks, torch.nn.ModuleList)
    assert [name for name, _ in transformer.named_modules()] == names == [name for name, _ in toy().named_modules()]
    cache.reset(1, 1)
    assert equal(video_of(transformer, 1), video_of(toy(), 1))


def test_what_was_saved_is_told_in_one_line() -> None:
    transformer, cache = cached(ALWAYS)
    cache.reset(5, 2)
    video_of(transformer, 5, 2)
    # of each skipped forward main2 to main5, and the two VACE blocks whose hints they would have taken
    assert str(cache.saved()) == "step cache: 8 of 10 forwards skipped, 48 of 100 block runs saved"


# ---- several ranks


@pytest.fixture(scope="module")
def spawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    def spawn(what: str) -> list[dict[str, Any]]:
        out = tmp_path_factory.mktemp(what)
        environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(WORKER.parent.parent)}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, str(WORKER), what, str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads((out / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]

    return spawn


@pytest.fixture(scope="module")
def ranks(spawn: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return spawn("step_cache")


SPLITS = ("ulysses", "ring")


@pytest.mark.parametrize("split", SPLITS)
def test_ranks_skip_alike_where_each_alone_would_not(ranks: list[dict[str, Any]], split: str) -> None:
    changes = [rank[split]["own_change"] for rank in ranks]
    calm, moving = sorted(changes)
    assert calm < ranks[0][split]["low"] < ranks[0][split]["high"] < moving  # one rank on either side of both thresholds
    for rank in ranks:
        assert rank[split]["skipped_at_low"] == [False, False]
        assert rank[split]["skipped_at_high"] == [False, True]


@pytest.mark.parametrize("split", [*SPLITS, "cfg"])
def test_a_video_skips_the_same_steps_however_ranks_share_it(ranks: list[dict[str, Any]], split: str) -> None:
    for rank in ranks:
        assert rank[split]["pattern"] == rank["alone"]["pattern"]
        assert rank[split]["difference_to_alone"] <= (1e-4 if split == "ring" else 0)
    assert "1" in ranks[0]["alone"]["pattern"] and "0" in ranks[0]["alone"]["pattern"][2:]


def test_a_cached_video_differs_from_an_uncached_one(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["alone"]["difference_to_uncached"] > 1e-4


def test_blocks_that_share_their_weights_are_skipped_alike(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["fsdp2"]["pattern"] == rank["alone"]["pattern"] and rank["fsdp2"]["difference_to_alone"] == 0
