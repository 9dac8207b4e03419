"""Steps that change little take the first blocks only: for the rest of the blocks, what they last added is added again.

DBCache (https://github.com/vipshop/cache-dit) with its Fn first and no last blocks; with one first block, the first-block cache
of ParaAttention (https://github.com/chengzeyi/ParaAttention). Both compare what the first blocks add to their input; here it is
what comes out of them, so their thresholds mean other numbers here. As with cache-dit's cfg_diff_compute_separate=False the
guided pass decides for the unguided one, too: so the steps that are skipped do not depend on how ranks share a video.

The forward's code stays as it is: for its duration the instance has lists of callables in place of its blocks. A main block
that is skipped hands on what it gets, and a hint that is skipped is neither computed nor added; each other hint is added after
its own main block. Must not know settings, schedulers or guidance.
Legend: B batch, s tokens of this rank, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from diffusers import WanVACETransformer3DModel

from ipt2v.models.vace.ring import num_valid_keys

if TYPE_CHECKING:
    from ipt2v.xdit import Subgroups


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRule:
    """When a step is skipped. The defaults of all but the threshold are cache-dit's (DBCacheConfig), with a limit on skips."""

    threshold: float  # below this relative change; 0 never skips
    num_first_blocks: int = 8  # main blocks that always run, with the VACE blocks whose hints they take
    warmup_steps: int = 8  # the first steps, which lay out the picture, are all computed
    max_skips: int = 3  # in a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What a video's cache has saved until now, on this rank."""

    num_forwards: int
    num_skipped: int
    num_block_runs: int  # main and VACE blocks, as they would be without a cache
    num_saved_runs: int

    def __str__(self) -> str:
        return (
            f"step cache: {self.num_skipped} of {self.num_forwards} forwards skipped, "
            f"{self.num_saved_runs} of {self.num_block_runs} block runs saved"
        )


def cache_steps(transformer: WanVACETransformer3DModel, rule: CacheRule, groups: Subgroups | None = None) -> StepCache:
    """Let `transformer` skip by the rule; each video starts with the result's reset(). Once, after make_hints_lazy.

    `groups` are those of a split: its ranks decide alike, all in the same step. Raises ValueError if the rule does not fit.
    """
    num_layers = transformer.config.num_layers
    if not 1 <= rule.num_first_blocks < num_layers:
        raise ValueError(
            f"step cache: found num_first_blocks {rule.num_first_blocks}, expected 1 to {num_layers - 1} of {num_layers} blocks"
        )
    if rule.warmup_steps < 1:
        raise ValueError(f"step cache: found warmup_steps {rule.warmup_steps}, expected 1 or more; the first step is computed")
    cache = StepCache(transformer, rule, _Ranks(groups))
    transformer.register_forward_pre_hook(cache.begin)
    transformer.rope.register_forward_pre_hook(cache.see_latents)
    transformer.norm_out.register_forward_pre_hook(cache.see_last)
    transformer.register_forward_hook(cache.end, always_call=True)
    return cache


class StepCache:
    """What is kept from the last computed step of a video: two hidden states, and one more for a second pass."""

    def __init__(self, transformer: WanVACETransformer3DModel, rule: CacheRule, ranks: _Ranks) -> None:
        self.rule, self.ranks = rule, ranks
        self.patch_size: tuple[int, int, int] = transformer.config.patch_size
        num_main, vace_layers = transformer.config.num_layers, transformer.config.vace_layers
        self.num_blocks = num_main + len(vace_layers)
        self.num_skippable = num_main + len(vace_layers) - rule.num_first_blocks
        self.num_skippable -= sum(layer < rule.num_first_blocks for layer in vace_layers)
        self.num_tokens = 0  # of all ranks, in this forward
        self.reference_BsD: torch.Tensor | None = None  # what the first blocks gave in the last computed step
        self.first_BsD: torch.Tensor | None = None  # what they gave in this forward, while it is computed
        self.residuals_BsD: dict[int, torch.Tensor] = {}  # what the other blocks added in the last computed step, by pass
        self.reset(num_steps=0, num_passes=1)

    # ---- for whoever makes videos

    def reset(self, num_steps: int, num_passes: int) -> None:
        """Forget everything; a video of so many steps begins, each of one forward, or of a guided and an unguided one in turn.

        After its last forward what was kept is let go. A forward without a reset, or one too many, is an AssertionError.
        """
        self.num_forwards, self.num_skipped, self.skips_in_a_row = 0, 0, 0
        self.num_passes, self.num_expected = num_passes, num_steps * num_passes
        self.skips_step, self.skipping = False, False  # the decision, and whether this forward is past the first blocks with it
        self._let_go()

    def saved(self) -> Saved:
        return Saved(
            num_forwards=self.num_forwards,
            num_skipped=self.num_skipped,
            num_block_runs=self.num_forwards * self.num_blocks,
            num_saved_runs=self.num_skipped * self.num_skippable,
        )

    # ---- hooks, in the order in which a forward comes to them

    def begin(self, transformer: WanVACETransformer3DModel, _args: Any) -> None:
        assert self.num_forwards < self.num_expected, "step cache: more forwards than reset() was told of"
        # eager hints would be computed for nothing, and hints made lazy only now would not pass through here
        assert "vace_blocks" in transformer.__dict__, "step cache: make_hints_lazy comes first"
        self.skipping, self.first_BsD = False, None
        transformer.__dict__["blocks"] = [
            self._main(index, block) for index, block in enumerate(transformer._modules["blocks"])
        ]
        transformer.__dict__["vace_blocks"] = [self._vace(promise) for promise in transformer.__dict__["vace_blocks"]]

    def see_latents(self, _rope: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.num_tokens = math.prod(size // patch for size, patch in zip(args[0].shape[2:], self.patch_size, strict=True))

    def see_last(self, _norm_out: Any, args: tuple[torch.Tensor, ...]) -> None:
        """What comes out of the last block, in float32, is what the first blocks gave plus what the others have added."""
        if self.first_BsD is not None:
            residual_BsD = args[0].to(self.first_BsD.dtype) - self.first_BsD
            self.residuals_BsD[self.num_forwards % self.num_passes], self.first_BsD = residual_BsD, None

    def end(self, transformer: WanVACETransformer3DModel, _args: Any, _output: Any) -> None:
        transformer.__dict__.pop("blocks", None)
        transformer.__dict__.pop("vace_blocks", None)
        self.num_forwards += 1
        self.num_skipped += self.skipping
        if self.num_forwards == self.num_expected:
            self._let_go()  # decoding needs the memory

    # ---- within a forward

    def _main(self, index: int, block: Any) -> Callable[..., torch.Tensor]:
        first_skippable = self.rule.num_first_blocks

        def call(hidden_BsD: torch.Tensor, *rest: Any) -> torch.Tensor:
            if index == first_skippable:
                self._decide(hidden_BsD)
                if self.skipping:
                    return hidden_BsD + self.residuals_BsD[self.num_forwards % self.num_passes]
            return hidden_BsD if self.skipping else block(hidden_BsD, *rest)

        return call

    def _vace(self, promise: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[_Hint, Any]]:
        def call(*args: Any) -> tuple[_Hint, Any]:
            hint, control = promise(*args)
            return _Hint(hint, self), control

        return call

    def _decide(self, first_BsD: torch.Tensor) -> None:
        """From here on this forward is skipped, or computed and kept. The first pass of a step decides, on its ranks."""
        step_index, pass_index = divmod(self.num_forwards, self.num_passes)
        if pass_index == 0:
            # the same on all ranks, so that either all come to the collectives or none
            may_skip = step_index >= self.rule.warmup_steps and self.skips_in_a_row < self.rule.max_skips
            self.skips_step = may_skip and self._is_close(first_BsD)
            self.skips_in_a_row = self.skips_in_a_row + 1 if self.skips_step else 0
            if not self.skips_step and self.ranks.decide:
                self.reference_BsD = first_BsD
        self.skipping = self.skips_step
        if not self.skipping:
            self.residuals_BsD.pop(pass_index, None)  # before the blocks need the memory
            self.first_BsD = first_BsD

    def _is_close(self, first_BsD: torch.Tensor) -> bool:
        change, size = self.ranks.agree(self._sums(first_BsD) if self.ranks.decide else None, first_BsD.device)
        return change < self.rule.threshold * size  # False also where one of them is no number

    def _sums(self, first_BsD: torch.Tensor) -> torch.Tensor:
        """[2] float64: L1 norms of the change and of the last computed step, over this rank's tokens, without the pads."""
        assert self.reference_BsD is not None, "the warm-up has a first step, which is computed"
        num_own = self.ranks.num_own(self.num_tokens, first_BsD.shape[1])
        own_BsD, reference_BsD = first_BsD[:, :num_own], self.reference_BsD[:, :num_own]
        return torch.stack([_l1(own_BsD - reference_BsD), _l1(reference_BsD)])

    def _let_go(self) -> None:
        self.reference_BsD, self.first_BsD = None, None
        self.residuals_BsD.clear()


@dataclass(slots=True)
class _Hint:
    """Stands for a promised hint: the forward calls `hidden + hint.to(device) * scale`."""

    promised: Any
    cache: StepCache

    def to(self, device: torch.device) -> _Hint:
        self.promised = self.promised.to(device)
        return self

    def __mul__(self, scale: torch.Tensor) -> Any:
        return _Nothing() if self.cache.skipping else self.promised * scale


class _Nothing:
    """Added to a tensor, leaves it as it is, also its negative zeros."""

    def __radd__(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@dataclass(frozen=True, slots=True)
class _Ranks:
    """The ranks that share a video, or one alone."""

    groups: Subgroups | None

    @property
    def decide(self) -> bool:
        """Whether this rank sees the pass that decides; in a CFG pair, rank 0 runs the guided one."""
        return self.groups is None or dist.get_rank(self.groups.cfg) == 0

    def num_own(self, num_tokens: int, num_local: int) -> int:
        """How many of a rank's rows are no padding."""
        if self.groups is None:
            return num_local
        num_ranks, rank = dist.get_world_size(self.groups.sequence), dist.get_rank(self.groups.sequence)
        return num_valid_keys(num_tokens, num_local, num_ranks)[rank]

    def agree(self, sums: torch.Tensor | None, device: torch.device) -> tuple[float, float]:
        """The sums over all tokens, equal bit for bit on every rank; to be called by all. None from ranks that do not decide.

        A rank that went its own way would leave the others waiting in the next attention, or for its part of the weights.
        """
        agreed = torch.zeros(2, dtype=torch.float64, device=device) if sums is None else sums
        if self.groups is not None:
            if sums is not None and dist.get_world_size(self.groups.sequence) > 1:
                dist.all_reduce(agreed, group=self.groups.sequence)
            if dist.get_world_size(self.groups.cfg) > 1:
                dist.broadcast(agreed, group=self.groups.cfg, group_src=0)
        change, size = agreed.tolist()
        return change, size


def _l1(x_BsD: torch.Tensor) -> torch.Tensor:
    """The sum of absolute values: of each token in float32, over tokens in float64, so that splits agree to the last digits."""
    return torch.linalg.vector_norm(x_BsD, ord=1, dim=-1, dtype=torch.float32).sum(dtype=torch.float64)
