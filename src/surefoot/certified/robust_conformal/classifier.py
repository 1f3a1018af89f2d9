"""A classifier that answers with sets: calibrate it once, then predict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surefoot.certified.robust_conformal.scores import (
    MEMORY,
    PostTrainingTransform,
    Score,
    SmoothedScores,
    level_of_two_betas,
    noisy_probabilities,
    smooth_scores,
    true_label,
    uniforms,
)
from surefoot.certified.robust_conformal.sets import BOUNDS, Bound, PredictionSets, calibrate, noise_ratio, robust_sets
from surefoot.errors import InvalidInput, check, check_at_least, check_choice
from surefoot.nn.conformal import conformal_index

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (model, x, y) -> attacked x


@dataclass(frozen=True)
class ConformalReport:
    """Coverage and size of the sets of a labelled data set, one entry per example."""

    covered: Tensor  # bool [N]
    sizes: Tensor  # int64 [N]
    num_classes: int
    guaranteed: bool  # False for `bound="none"` (RSCP): nothing was paid for the finite number of draws

    @property
    def coverage(self) -> float:
        return self.covered.double().mean().item()

    @property
    def size(self) -> float:
        return self.sizes.double().mean().item()

    @property
    def full(self) -> float:
        """Share of sets that hold every label and so say nothing."""
        return (self.sizes == self.num_classes).double().mean().item()


class RobustConformalClassifier:
    """RSCP+ sets on top of `model` (logits `[B, K]`); with a `transform`, RSCP+ with PTT.

    `eps` is the L2 attack size in the units of x, `sigma` the noise (2 eps by default in the paper). The promise holds for
    noise that the attacker does not know: pass generators seeded from entropy in production, never from the image or a constant.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sigma: float,
        eps: float,
        alpha: float = 0.1,
        beta: float = 0.001,
        num_samples: int = 256,
        score: Score = "hps",
        transform: PostTrainingTransform | None = None,
        bound: Bound = "bernstein",
        batch_size: int | None = None,
    ) -> None:
        noise_ratio(eps, sigma)
        level_of_two_betas(alpha, beta)
        check_at_least("num_samples", num_samples, 2)
        check_choice("score", score, ("hps", "aps"))
        check_choice("bound", bound, BOUNDS)
        self.model, self.sigma, self.eps, self.alpha, self.beta = model, sigma, eps, alpha, beta
        self.num_samples, self.transform = num_samples, transform
        self.score: Score = score
        self.bound: Bound = bound
        self.batch_size = batch_size
        self.threshold_: float | None = None
        self._rule: tuple[object, PostTrainingTransform | None] = (None, None)  # what the threshold was calibrated with

    @property
    def calibration_size(self) -> int:
        """The smallest calibration set whose threshold is finite."""
        level = self.alpha if self.bound == "none" else level_of_two_betas(self.alpha, self.beta)
        n = 1
        while conformal_index(n, level) > n:
            n += 1
        return n

    def fit_transform(
        self,
        x: Tensor,  # [H, ...], neither calibration nor test examples
        y: Tensor,  # int64 [H]
        *,
        generator: torch.Generator,
        temperature: float = 1 / 400,
    ) -> RobustConformalClassifier:
        """Fit PTT on held-out examples (one noise draw each) and use it from now on; calibrate afterwards."""
        self.transform, self.threshold_ = None, None
        scores = self._smoothed(x, generator, draws=1).mean
        held = true_label(scores, y.cpu())
        self.transform = PostTrainingTransform.fit(held, temperature=temperature, bias=1.0 - self.alpha)
        return self

    def calibrate(self, x: Tensor, y: Tensor, *, generator: torch.Generator) -> RobustConformalClassifier:
        """Threshold from clean examples the network was not trained on. Fewer than `calibration_size` of them: full sets."""
        means = true_label(self._smoothed(x, generator).mean, y.cpu())
        self.threshold_ = calibrate(means, alpha=self.alpha, beta=self.beta, bound=self.bound)
        self._rule = (self._settings(), self.transform)
        return self

    def predict(self, x: Tensor, *, generator: torch.Generator) -> PredictionSets:
        """The sets of x, attacked or not, under fresh noise."""
        if self.threshold_ is None:
            raise InvalidInput(
                "The classifier has no threshold yet; call calibrate with clean, held-out examples first."
            )
        settings, given = self._rule
        check(settings == self._settings() and given is self.transform, "Settings changed after the calibration, and the promise needs one rule for both; call calibrate again.")  # fmt: skip
        scores = self._smoothed(x, generator)
        return robust_sets(scores, self.threshold_, eps=self.eps, sigma=self.sigma, beta=self.beta, bound=self.bound)

    def evaluate(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        generator: torch.Generator,
        attack: Attack | None = None,
    ) -> ConformalReport:
        """Coverage and size over (x, y) batches, after `attack(model, x, y)` if one is given (see `smooth_pgd`)."""
        covered, sizes, classes = [], [], 0
        for x, y in batches:
            given = x if attack is None else attack(self.model, x, y)
            sets = self.predict(given, generator=generator)
            classes = sets.mask.shape[1]
            covered.append(true_label(sets.mask, y.cpu()))
            sizes.append(sets.sizes)
        check(len(sizes) > 0, "There is nothing to evaluate: no batches were given.")
        return ConformalReport(torch.cat(covered), torch.cat(sizes), classes, self.bound != "none")

    def _settings(self) -> tuple[object, ...]:
        """What must be the same at calibration and at test, beside the transform."""
        return (self.sigma, self.alpha, self.beta, self.num_samples, self.score, self.bound)

    def _smoothed(self, x: Tensor, generator: torch.Generator, draws: int | None = None) -> SmoothedScores:
        draws = draws or self.num_samples
        check(len(x) > 0, "x is empty; give at least one input.")
        step = max(1, MEMORY // (draws * 64))
        parts = []
        for chunk in x.split(step):
            u = uniforms(len(chunk), generator) if self.score == "aps" else None
            probs = noisy_probabilities(
                self.model, chunk, draws, sigma=self.sigma, generator=generator, batch_size=self.batch_size
            )
            parts.append(smooth_scores(probs, score=self.score, u=u, transform=self.transform))
        mean, variance = torch.cat([p.mean for p in parts]), torch.cat([p.variance for p in parts])
        return SmoothedScores(mean, variance, parts[0].n)
