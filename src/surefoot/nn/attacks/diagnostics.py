"""Signs that a model hides its gradients, so that a robust accuracy is too good to be true (Athalye, Carlini & Wagner,
2018, arXiv 1802.00420; Carlini et al., 2019, arXiv 1902.06705).

Each check is a boolean with its numbers. One point is 0.01 of accuracy; counts below two examples never raise a check.

`more_steps` asks whether the attack has converged (Carlini et al., section 4). Coarse steps leave a few honest examples unbroken at
the boundary, so one lengthening proves little: on undefended nets 20 steps of PGD against 100 were seen to differ by up to three points.
Lengthened again, an honest attack gains nothing; one whose gradients are hidden goes on. So the survivors are attacked further from where
they ended, to 5 and then to 25 times the steps. Losses are nested: k of n examples hold out to one length and fall by the next, a binomial
count without exchanges. With the exact (Clopper-Pearson) lower limit of that share, the alarm is raised where the first lengthening surely
takes over 5 points, or both surely take over one (of 100 examples, 12 or 5). Each limit errs with at most 0.5 %, so a model whose true
gains lie below these marks is warned falsely at most once in a hundred audits, whatever the number of examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from surefoot.errors import check_at_least
from surefoot.nn.attacks.apgd import apgd
from surefoot.nn.attacks.ball import Ball, Bounds, Norm
from surefoot.nn.attacks.losses import cross_entropy
from surefoot.nn.attacks.pgd import pgd
from surefoot.nn.attacks.run import (
    Model,
    ZeroGradient,
    attacking,
    check_inputs,
    default_generator,
    loss_and_gradient,
    wrong,
)
from surefoot.nn.attacks.square import square
from surefoot.nn.smoothing.bounds import lower_confidence_bound

POINT = 0.01  # of accuracy
LENGTHEN = 5  # the steps of an attack, at each look for convergence
COARSE = 0.05  # of accuracy: more than too few steps cost on an honest net
FALSE_ALARM = 0.005  # of each of the two limits


@dataclass(frozen=True)
class MaskingCheck:
    name: str
    suspicious: bool
    numbers: Mapping[str, float]
    sentence: str  # what the check looks for


@dataclass(frozen=True)
class MaskingReport:
    checks: tuple[MaskingCheck, ...]
    passes: int
    n: int

    @property
    def suspicious(self) -> bool:
        return any(check.suspicious for check in self.checks)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence per raised check, with its numbers."""
        return tuple(
            f"Gradient masking? {c.sentence} ({', '.join(f'{k} {v:.3g}' for k, v in c.numbers.items())})"
            for c in self.checks
            if c.suspicious
        )


def masking_diagnostics(
    model: Model,
    x: Tensor,  # [N, ...] within bounds
    y: Tensor,  # int64 [N]
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    steps: int = 20,
    queries: int = 500,
    undefended: Model | None = None,
    generator: torch.Generator | None = None,
) -> MaskingReport:
    """Eight checks on the examples given (about 100 are enough); transfer needs an `undefended` model.

    The large-radius check, eps = 0.5 of the range, is for Linf and bounded inputs.
    """
    check_inputs(x, y, eps, norm, bounds)
    check_at_least("steps", steps, 2)
    generator, n = default_generator(generator), len(x)
    lab = _Lab(model, x.detach(), y, {"norm": norm, "bounds": bounds, "generator": generator})
    clean = lab.clean()
    multi = lab.white_box(eps, steps)
    single = lab.white_box(eps, 1)
    lengths, hidden = lab.lengthened(eps, steps)
    more = lengths[max(lengths)]
    noise = lab.noise(eps, steps)
    strongest = min(multi, more, lab.accuracy(apgd, eps=eps, steps=steps, loss="margin"))
    least = max(2 / n, POINT)  # one point, and at least two examples
    checks = [
        MaskingCheck("single_step", single < multi - least / 2, {"single": single, "multi": multi},
                     "One gradient step breaks more than many."),
        MaskingCheck("noise", noise <= clean - least and noise <= multi, {"noise": noise, "pgd": multi, "clean": clean},
                     "Random noise is as strong as gradient descent."),
        MaskingCheck("more_steps", hidden, {f"steps {count}": left for count, left in lengths.items()},
                     "More steps still lower the accuracy by over one point, however many there were."),
    ]  # fmt: skip
    if norm == "linf" or (x.dim() == 4 and min(x.shape[2:]) >= 5):
        black = lab.accuracy(square, eps=eps, queries=queries)
        checks.append(MaskingCheck("black_box", black <= strongest - least, {"square": black, "white box": strongest}, "Random search beats gradient attacks."))  # fmt: skip
    if norm == "linf" and bounds is not None:
        far = 0.5 * (bounds[1] - bounds[0])
        wide = min(lab.accuracy(apgd, eps=far, steps=steps, loss=loss) for loss in ("margin", "ce"))
        checks.append(MaskingCheck("large_radius", wide > 0.05 + least, {"accuracy": wide}, "At half the range of the inputs, where anything can be painted, accuracy is not near zero."))  # fmt: skip
    zero, cosine = lab.gradients()
    checks.append(MaskingCheck("zero_gradient", zero > 0.05, {"share": zero}, "The loss has an exactly zero gradient at over 5 % of the examples."))  # fmt: skip
    checks.append(MaskingCheck("gradient_noise", cosine < 0.2, {"cosine": cosine}, "Two draws of the gradient hardly agree."))  # fmt: skip
    if undefended is not None:
        moved = pgd(undefended, lab.x, y, eps=eps, steps=steps, early_stop=False, **lab.shared)
        lab.passes += moved.passes
        transfer = lab.right(moved.x)
        checks.append(MaskingCheck("transfer", transfer <= strongest - least, {"transfer": transfer, "white box": strongest}, "Points made on an undefended model beat gradient attacks on this one."))  # fmt: skip
    return MaskingReport(tuple(checks), lab.passes, n)


@dataclass
class _Lab:
    """Accuracies of one model on one set of examples; counts the passes."""

    model: Model
    x: Tensor
    y: Tensor
    shared: dict
    passes: int = 0
    wrong_already: Tensor = field(init=False)  # [N], known once `clean` was asked

    def errors(self, at: Tensor) -> Tensor:  # bool [N]
        with attacking(self.model, "eval", self.shared["generator"], at.device), torch.no_grad():
            self.passes += len(at)
            return wrong(self.model(at), self.y)

    def right(self, at: Tensor) -> float:
        return 1.0 - self.errors(at).double().mean().item()

    def clean(self) -> float:
        self.wrong_already = self.errors(self.x)
        return 1.0 - self.wrong_already.double().mean().item()

    def accuracy(self, attack, **settings) -> float:
        """Clean errors stay errors: an attack's own random start must not repair them."""
        try:
            found = attack(self.model, self.x, self.y, **settings, **self.shared)
        except ZeroGradient:
            return self.clean()
        self.passes += found.passes
        return 1.0 - (found.broken | self.wrong_already).double().mean().item()

    def white_box(self, eps: float, steps: int) -> float:
        return self.accuracy(pgd, eps=eps, steps=steps, random_start=False)

    def lengthened(self, eps: float, steps: int) -> tuple[dict[int, float], bool]:
        """Accuracy by number of steps, each attack going on where the one before ended, and whether that is an alarm.

        The second lengthening is made only where the first leaves the question open. Broken is what a fresh draw of the model gets
        wrong as well.
        """
        alive, points, n = torch.arange(len(self.x), device=self.x.device), self.x, len(self.x)
        lengths, left, spent, hidden = (steps, LENGTHEN * steps, LENGTHEN**2 * steps), dict[int, float](), 0, False
        for look, total in enumerate(lengths):
            held = self._hold(alive, points, eps, total - spent)
            fell = len(alive) - len(held[0])
            (alive, points), spent = held, total
            left[total] = len(alive) / n
            if look == 0:
                continue
            surely = lower_confidence_bound(torch.tensor(fell), n, FALSE_ALARM).item()
            hidden = surely > (COARSE if look == 1 else POINT)
            if hidden or surely <= POINT:
                break
        return left, hidden

    def _hold(self, index: Tensor, points: Tensor, eps: float, steps: int) -> tuple[Tensor, Tensor]:
        """Which of the examples at `index`, attacked from `points`, are still right, and where their attack ended."""
        if not len(index):
            return index, points
        try:
            found = pgd(self.model, self.x[index], self.y[index], eps=eps, steps=steps, start=points, **self.shared)
            self.passes, points = self.passes + found.passes, found.x
        except ZeroGradient:
            pass  # nothing moves
        with attacking(self.model, "eval", self.shared["generator"], points.device), torch.no_grad():
            self.passes += len(index)
            held = (~wrong(self.model(points), self.y[index])).nonzero()[:, 0]
        return index[held], points[held]

    def noise(self, eps: float, draws: int) -> float:
        """Accuracy under the worst of `draws` points from the ball."""
        ball = Ball.around(self.x, eps, self.shared["norm"], self.shared["bounds"])
        broken = torch.zeros_like(self.y, dtype=torch.bool)
        with attacking(self.model, "eval", self.shared["generator"], self.x.device), torch.no_grad():
            for _ in range(draws):
                broken |= wrong(self.model(ball.sample(self.shared["generator"])), self.y)
        self.passes += draws * len(self.x)
        return 1.0 - broken.double().mean().item()

    def gradients(self) -> tuple[float, float]:
        """Share of exactly zero gradients, and mean cosine between two draws (1 where one of them is zero)."""
        with attacking(self.model, "eval", self.shared["generator"], self.x.device):
            try:
                first, second = (
                    loss_and_gradient(self.model, self.x, self.y, cross_entropy)[2].flatten(1) for _ in range(2)
                )
            except ZeroGradient:
                return 1.0, 1.0
        self.passes += 2 * len(self.x)
        zero = (first == 0).all(1)
        cosine = torch.nn.functional.cosine_similarity(first.double(), second.double(), eps=1e-300)
        return zero.double().mean().item(), torch.where(zero, 1.0, cosine).mean().item()
