"""When to re-initialize, and the learning rate of a step: pure functions of the step number.

Re-initializations happen at T = {0, t₁, t₂, …} with growing gaps between them,

    t_k = t_{k−1} + gap_k,      gap_k = τ + int(ψ^k),  k = 1, 2, …

(LoQT, arXiv 2405.16528, section 3.3: late in training the factor needs longer to collect an update that survives
quantization.) Step 0 counts: with τ = 100 and ψ = 1.2 there are 39 / 44 / 51 in 10k / 20k / 60k steps.

Learning rate: linear warm-up, then a cosine, a line or a constant (the paper: 10 % warm-up, cosine to 10 %). Optionally
the rate ramps up again after each re-initialization, for an optimizer whose state no longer fits (ReLoRA,
arXiv 2307.05695, section 3).

Departures: `max_gap` clamps a gap. The first public implementation clamps the step number instead, and so stops
re-initializing for good at that step. Everything is in closed form in the step, so that resuming needs no state.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field

REINIT_KINDS = ("exponential", "static", "linear", "never")
LR_KINDS = ("cosine", "linear", "constant", "cosine_rewarmup")

# A gap no run ever reaches the end of; ψ^k overflows a float soon after.
_LARGEST_GAP = 2**62


@dataclass(frozen=True)
class ReinitSchedule:
    """The set T of steps that end with a re-initialization. Raises ValueError for values that make no schedule."""

    kind: str = "exponential"
    """exponential: τ + int(ψ^k); linear: τ + int(k · ψ); static: τ; never: step 0 only (no-merge)."""
    interval: int = 100
    """τ, in steps."""
    growth: float = 1.2
    """ψ; unused by `static` and `never`."""
    max_gap: int | None = None
    """No gap is longer than this many steps; None: no limit."""
    _steps: list[int] = field(default_factory=lambda: [0], init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in REINIT_KINDS:
            raise ValueError(f"loqt.schedule={self.kind!r} does not exist; use one of {', '.join(REINIT_KINDS)}")
        if self.interval < 1:
            raise ValueError(f"loqt.interval={self.interval} is not a number of steps; use at least 1")
        if not (math.isfinite(self.growth) and self.growth >= 0):
            raise ValueError(f"loqt.growth={self.growth} would shrink or lose the gaps; use a finite number, 0 or more")
        if self.max_gap is not None and self.max_gap < 1:
            raise ValueError(f"loqt.max_gap={self.max_gap} is not a number of steps; use at least 1, or null for none")

    def gap(self, k: int) -> int:
        """Steps between the (k−1)-th and the k-th re-initialization after the first, k = 1, 2, …"""
        assert k >= 1, k
        gap = _LARGEST_GAP if self.kind == "never" else self.interval
        if self.kind == "exponential":
            gap += self._power(k)
        elif self.kind == "linear":
            gap += int(min(k * self.growth, _LARGEST_GAP))
        return gap if self.max_gap is None or self.kind == "never" else min(gap, self.max_gap)

    def _power(self, k: int) -> int:
        if self.growth > 1 and k * math.log(self.growth) > math.log(_LARGEST_GAP):
            return _LARGEST_GAP  # growth ** k raises OverflowError from about 1e308 on
        return int(self.growth**k)

    def is_due(self, step: int) -> bool:
        """Whether a re-initialization belongs to this step (0, 1, …)."""
        self._extend(step)
        index = bisect_left(self._steps, step)
        return index < len(self._steps) and self._steps[index] == step

    def steps(self, until: int) -> list[int]:
        """All steps of T below `until`: what a run of `until` steps does."""
        self._extend(until)
        return self._steps[: bisect_left(self._steps, until)]

    def latest_before(self, step: int) -> int | None:
        """The last step of T that is below `step`; None where there is none."""
        self._extend(step)
        index = bisect_left(self._steps, step)
        return self._steps[index - 1] if index else None

    def _extend(self, step: int) -> None:
        # A cache, not a state: it only ever grows, and what it holds does not depend on who asked.
        if self.kind == "never":
            return
        while self._steps[-1] < step:
            self._steps.append(self._steps[-1] + self.gap(len(self._steps)))


@dataclass(frozen=True)
class LRSchedule:
    """The factor on every learning rate. Raises ValueError for values that make no schedule."""

    kind: str = "cosine"
    """cosine, linear, constant, or cosine_rewarmup (the cosine, ramped up from 0 after each re-initialization)."""
    max_steps: int = 1000
    """The step at which the decay reaches `min_ratio`; the last step of a run is one before."""
    warmup_steps: int = 100
    """Steps of linear warm-up: step i has the factor (i + 1) / warmup_steps."""
    min_ratio: float = 0.1
    """Where the decay ends, as a part of the peak."""
    rewarmup_steps: int = 10
    """Length of the ramp of cosine_rewarmup."""
    reinit: ReinitSchedule | None = None
    """When the ramps begin; needed by cosine_rewarmup."""

    def __post_init__(self) -> None:
        if self.kind not in LR_KINDS:
            raise ValueError(f"optim.schedule={self.kind!r} does not exist; use one of {', '.join(LR_KINDS)}")
        if self.max_steps < 1:
            raise ValueError(f"train.max_steps={self.max_steps} is not a number of steps; use at least 1")
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise ValueError(
                f"optim.warmup_steps={self.warmup_steps} does not fit into train.max_steps={self.max_steps}; "
                f"use 0 to {self.max_steps}"
            )
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"optim.min_lr_ratio={self.min_ratio} is not a part of the peak; use 0 to 1")
        if self.kind == "cosine_rewarmup":
            if self.rewarmup_steps < 1:
                raise ValueError(f"optim.rewarmup_steps={self.rewarmup_steps} is not a ramp; use at least 1")
            if self.reinit is None:
                raise ValueError("optim.schedule='cosine_rewarmup' needs to know when re-initializations happen")

    def multiplier(self, step: int) -> float:
        """The factor for the update of step 0, 1, …"""
        if step < self.warmup_steps:
            factor = (step + 1) / self.warmup_steps
        else:
            progress = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
            factor = self.min_ratio + (1 - self.min_ratio) * self._decay(progress)
        return factor * self._ramp(step)

    def _decay(self, progress: float) -> float:
        """From 1 at the end of the warm-up to 0 at max_steps."""
        if self.kind == "constant":
            return 1.0
        if self.kind == "linear":
            return 1.0 - progress
        return 0.5 * (1 + math.cos(math.pi * progress))

    def _ramp(self, step: int) -> float:
        if self.kind != "cosine_rewarmup":
            return 1.0
        assert self.reinit is not None
        # A re-initialization follows the update of its step, so the step itself is still in full swing. The first one,
        # after step 0, is covered by the warm-up.
        start = self.reinit.latest_before(step)
        return min(1.0, (step - start) / self.rewarmup_steps) if start else 1.0
