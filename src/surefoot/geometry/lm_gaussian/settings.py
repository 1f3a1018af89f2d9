"""What a run is asked: which contributions of the paper take part, how long, how large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from surefoot.geometry.lm_gaussian.train import Rates

Mode = Literal["360", "forward"]
Progress = Callable[[str, int, int], None]  # stage, step, steps


@dataclass(frozen=True)
class Switches:
    """Every contribution of the paper, on by default."""

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


@dataclass(frozen=True)
class Budget:
    """How long and how large. The defaults are for two CPU cores and pictures of up to 64 pixels; `full` is the paper's."""

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
    rates: Rates = field(default_factory=Rates)

    @classmethod
    def full(cls, mode: Mode) -> Budget:
        """12,000 + 18,000 steps in 360 mode, 3,000 + 9,000 in forward mode; for a GPU."""
        steps, more = (12_000, 18_000) if mode == "360" else (3_000, 9_000)
        return cls(steps=steps, refine_steps=more, splats=200_000, sh_degree=3, confidence=5.0, background_quantile=0.8, jump=0.05, keep_early=50, repair_strength=0.2, path_frames=300, filter_every=100, rates=Rates.full(mode))  # fmt: skip
