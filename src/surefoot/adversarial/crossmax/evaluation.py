"""Both evaluations of a disputed defence side by side, and images made by ascending a class through it.

Randomised answers are counted by majority over fresh draws in every column: an attack that stops at the first misclassified draw
finds points that the next draw takes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial.crossmax.aggregation import mean_log_probs
from surefoot.adversarial.crossmax.ensemble import SelfEnsemble
from surefoot.core.finding import Chart
from surefoot.core.statistics import wilson_interval
from surefoot.errors import check, check_at_least, check_positive
from surefoot.nn.attacks import (
    MaskingReport,
    Norm,
    SuiteResult,
    ZeroGradient,
    adaptive_suite,
    apgd,
    attacking,
    decide,
    is_random,
    masking_diagnostics,
    pgd_train,
    rand_suite,
    square,
)
from surefoot.nn.attacks.run import Model


@dataclass(frozen=True)
class DisputedRobustnessReport:
    """Accuracies on the same n examples, from the weakest evaluation to the strongest. `robust` survives all of them."""

    eps: float
    clean: Tensor  # bool [n]
    pgd: Tensor  # bool [n] right under PGD, one draw per gradient, last point
    apgd: Tensor  # bool [n] right under APGD-CE, one draw per gradient
    rand_suite: SuiteResult  # the published protocol: APGD-CE and APGD-DLR with EOT
    adaptive: SuiteResult  # EOT, smooth surrogate, components and transfer, longer runs, random search
    black_box: Tensor  # bool [n] right under Square alone
    robust: Tensor  # bool [n]
    masking: MaskingReport | None
    passes: int
    budget: str

    @property
    def accuracies(self) -> dict[str, float]:
        columns = {
            "clean": self.clean, "PGD": self.pgd, "APGD": self.apgd, "rand suite": self.rand_suite.robust,
            "square": self.black_box, "adaptive": self.adaptive.robust, "all together": self.robust,
        }  # fmt: skip
        return {name: mask.double().mean().item() for name, mask in columns.items()}

    @property
    def overstated(self) -> float:
        """What the evaluation without averaging over draws promises beyond what survives everything."""
        return self.pgd.double().mean().item() - self.robust.double().mean().item()

    @property
    def masking_flags(self) -> tuple[str, ...]:
        return () if self.masking is None else tuple(c.name for c in self.masking.checks if c.suspicious)

    @property
    def sentence(self) -> str:
        found = self.accuracies
        return (
            f"At {self.eps:.3g} plain PGD leaves {found['PGD']:.1%} of {len(self.clean)} examples right, the published kind of suite "
            f"{found['rand suite']:.1%}, adaptive attacks {found['adaptive']:.1%}; {found['all together']:.1%} survive everything."
        )

    def chart(self) -> Chart:
        n, found = len(self.clean), self.accuracies
        ends = [wilson_interval(round(v * n), n) for v in found.values()]
        bars = {
            "type": "data", "symmetric": False,
            "array": [high - v for v, (_, high) in zip(found.values(), ends)],
            "arrayminus": [v - low for v, (low, _) in zip(found.values(), ends)],
        }  # fmt: skip
        data = [{"type": "bar", "x": list(found), "y": list(found.values()), "error_y": bars}]
        layout = {"yaxis": {"title": {"text": "accuracy"}, "range": [0, 1.02]}}
        return Chart({"data": data, "layout": layout}, f"The same model under weaker and stronger evaluations ({self.budget}).")  # fmt: skip


class Averaged(nn.Module):
    """Log of the mean probability over `draws` passes: what a random model says on average, differentiable."""

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model, self.draws = model, draws
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        passes = torch.stack([self.model(x).log_softmax(1) for _ in range(self.draws)])
        return passes.logsumexp(0) - torch.tensor(float(self.draws)).log().item()


def evaluate_crossmax(
    model: nn.Module,
    x: Tensor,  # [n, ...] within bounds
    y: Tensor,  # int64 [n]
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    steps: int = 20,
    eot: int = 8,
    adaptive_steps: int = 40,
    restarts: int = 1,
    queries: int = 1000,
    draws: int = 10,
    surrogate: Model | None = None,
    components: Sequence[Model] = (),  # to transfer from, beside a SelfEnsemble's own head
    masking: int = 50,  # examples for the masking checks; 0 leaves them out
    generator: torch.Generator | None = None,
) -> DisputedRobustnessReport:
    """Plain attacks, the published suite and adaptive attacks on the same examples; any model, so that baselines get the same.

    For a `SelfEnsemble` the surrogate is the mean of its predictors' log-probabilities (averaged over draws) and the first component
    its backbone's head, the two cheap attacks that transfer best; `components` adds others. The paper's own claim is the "rand" column.
    """
    check_at_least("draws", draws, 2)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    random = is_random(model, x[:16], generator)
    eot, draws = (eot, draws) if random else (1, 1)
    shared = {"eps": eps, "norm": norm, "bounds": bounds, "generator": generator}
    if isinstance(model, SelfEnsemble):
        smooth = model.aggregated_by(mean_log_probs)
        surrogate = surrogate or (Averaged(smooth, 4) if random else smooth)
        components = (Averaged(model.backbone, 4) if random else model.backbone, *components)

    def right(points: Tensor) -> Tensor:
        return decide(model, points, draws=draws, generator=generator)[0] == y

    clean = right(x)
    plain = clean & right(_or_clean(lambda: pgd_train(model, x, y, steps=steps, **shared), x))
    auto = clean & right(_or_clean(lambda: apgd(model, x, y, steps=steps, early_stop=False, **shared).x, x))
    black = square(model, x, y, queries=queries, early_stop=not random, **shared)
    suite = rand_suite(model, x, y, steps=steps, eot=eot, draws=max(draws, 2), **shared)
    adaptive = adaptive_suite(
        model, x, y, surrogate=surrogate, components=components, steps=adaptive_steps, eot=eot,
        restarts=restarts, queries=queries, draws=draws, **shared,
    )  # fmt: skip
    survived = clean & right(black.x)
    signs = masking_diagnostics(model, x[:masking], y[:masking], steps=10, queries=queries // 2, **shared) if masking else None  # fmt: skip
    passes = 2 * (steps + 1) * len(x) + black.passes + suite.passes + adaptive.passes + 4 * draws * len(x)
    return DisputedRobustnessReport(
        eps, clean, plain, auto, suite, adaptive, survived,
        plain & auto & survived & suite.robust & adaptive.robust, signs, passes + (signs.passes if signs else 0),
        f"PGD and APGD {steps} steps; EOT {eot}; adaptive {adaptive_steps} and {5 * adaptive_steps} steps; "
        f"{queries} queries; majority of {draws}",
    )  # fmt: skip


def _or_clean(attack, x: Tensor) -> Tensor:
    """Where there is no gradient at all the plain attack does nothing, which is its result."""
    try:
        return attack()
    except ZeroGradient:
        return x


def pixel_optimize(
    model: nn.Module,
    target: Tensor,  # int64 [B]
    *,
    shape: tuple[int, int, int],  # C, H, W
    resolutions: Sequence[int] | None = None,  # from the image side down to 1, halving
    start: Tensor | None = None,  # [B, C, H, W]; middle grey
    eps: float | None = None,  # largest change from the start, where it matters
    steps: int = 100,
    lr: float = 0.05,
    generator: torch.Generator | None = None,
) -> Tensor:  # [B, C, H, W] in [0, 1]
    """Images that the model takes for `target`, as a sum of perturbations at several resolutions (Adam on cross-entropy).

    On a network whose gradients are perceptually aligned they look like the class.
    """
    check_at_least("steps", steps, 1)
    check_positive("lr", lr)
    channels, height, width = shape
    sizes = resolutions or [max(height, width) >> k for k in range(max(height, width).bit_length())]
    check(max(sizes) <= max(height, width) and min(sizes) >= 1, f"resolutions must lie in 1..{max(height, width)}, got {list(sizes)}.")  # fmt: skip
    like = next(model.parameters())
    base = like.new_full((len(target), *shape), 0.5) if start is None else start.detach()
    check(
        base.shape == (len(target), *shape), f"start must have shape {[len(target), *shape]}, got {list(base.shape)}."
    )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    with attacking(model, "eval", generator, base.device):
        layers = [base.new_zeros(len(target), channels, min(s, height), min(s, width)).requires_grad_() for s in sizes]
        optimizer = torch.optim.Adam(layers, lr)

        def image() -> Tensor:
            change = sum((F.interpolate(part, size=(height, width), mode="bicubic") for part in layers), torch.zeros_like(base))  # fmt: skip
            return (base + (change if eps is None else change.clamp(-eps, eps))).clamp(0, 1)

        for _ in range(steps):
            loss = F.cross_entropy(model(image()), target, reduction="sum")
            for part, gradient in zip(layers, torch.autograd.grad(loss, layers)):
                part.grad = gradient
            optimizer.step()
        return image().detach()
