"""What a run is asked: which contributions of the paper take part, how long, how large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from surefoot.errors import check_at_least, check_choice
from surefoot.geometry.lm_gaussian.train import Rates

Mode = Literal["360", "forward"]
Progress = Callable[[str, int, int], None]  # stage, step, steps
DepthScope = Literal["unsure", "all"]


@dataclass(frozen=True)
class Switches:
    """Every contribution of the paper, on by default, and three options that are off by default."""

    depth_guidance: bool = True  # C1b, in the alignment
    cleaning: bool = True  # C1c, geometric and by confidence
    cross_view: bool = True  # C1c', support and flying pixels
    background: bool = True  # C1d
    depth_loss: bool = True  # C2b
    normal_loss: bool = True  # C2c
    virtual_views: bool = True  # C2d
    repair: bool = True  # C3a, C3b
    distance_weight: bool = True  # C3c
    rounds: int = 3  # C3d
    enhancement: bool = True  # C4
    depth_scope: DepthScope = "unsure"  # which pixels the depth guidance may move; "all" is the original
    adaptor: bool = False  # each pair of the alignment may also stretch its depth against its width
    mask_unreliable: bool = False  # repaired pixels whose low-pass image moved much train nothing

    def __post_init__(self) -> None:
        check_choice("depth_scope", self.depth_scope, ("unsure", "all"))
        check_at_least("rounds", self.rounds, 1)


@dataclass(frozen=True)
class Budget:
    """How long and how large. The defaults are for two CPU cores and pictures of up to 64 pixels; `full` is the paper's; `of` chooses.

    `steps` and `refine_steps` are those of stages 1 and 2. `depth_normal_from` is the step from which forward mode couples normals with those of
    the depth map. `distill_steps` feeds the enhanced frames of stage 3 back into the splats, as targets of weight `distill_weight`.
    """

    align_steps: int = 500
    steps: int = 350
    refine_steps: int = 150
    splats: int = 4000
    sh_degree: int = 0
    virtual_per_gap: int = 10
    point_radius: float = 1.0
    confidence: float = 3.0
    background_confidence: float = 1.5
    background_quantile: float = 0.6
    jump: float = 0.08
    tol: float = 0.03
    keep_early: int = 6
    repair_strength: float = 0.3
    path_frames: int = 60
    filter_every: int | None = None
    depth_normal_from: int = 6000
    distill_steps: int = 0
    distill_weight: float = 0.2
    rates: Rates = field(default_factory=Rates)

    @classmethod
    def full(cls, mode: Mode = "360") -> Budget:
        """12,000 + 18,000 steps in 360 mode, 3,000 + 9,000 in forward mode; for a GPU."""
        check_choice("mode", mode, ("360", "forward"))
        steps, more = (12_000, 18_000) if mode == "360" else (3_000, 9_000)
        return cls(steps=steps, refine_steps=more, splats=200_000, sh_degree=3, confidence=5.0, background_quantile=0.8, jump=0.05, keep_early=50, repair_strength=0.2, path_frames=300, filter_every=100, rates=Rates.full(mode))  # fmt: skip

    @classmethod
    def of(
        cls, mode: Mode = "360", *, steps: int | None = None, device: torch.device | str = "cpu", refined: bool = True
    ) -> Budget:
        """The default for where splats are trained: 500 steps on a CPU, the paper's on a GPU. With `steps` every schedule is scaled to so many in
        all (see `scaled`), and the learning rates go with the length (`Rates.of`)."""
        base = cls() if torch.device(device).type == "cpu" else cls.full(mode)
        if steps is None:
            return base
        whole = cls.full(mode)
        rates = Rates.of(steps, mode, full_steps=whole.steps + whole.refine_steps)
        return replace(base.scaled(steps, refined=refined), rates=rates)

    def scaled(self, steps: int, *, refined: bool = True) -> Budget:
        """This budget in `steps` training steps: where stage 2 begins, the rounds within it, where terms set in and how often the filter is renewed
        all scale (rounded); at least one step is left to each stage. Without repaired views (`refined=False`) stage 1 has them all."""
        check_at_least("steps", steps, 2)
        factor = steps / (self.steps + self.refine_steps)
        first = min(steps - 1, max(1, round(self.steps * factor))) if refined else steps
        every = None if self.filter_every is None else max(1, round(self.filter_every * factor))
        return replace(self, steps=first, refine_steps=steps - first, filter_every=every, depth_normal_from=round(self.depth_normal_from * factor))  # fmt: skip
