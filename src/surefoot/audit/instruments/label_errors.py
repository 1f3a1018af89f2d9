"""Label errors: which share of the training labels looks wrong, and which ones.

Small proxy networks are trained for a few hundred steps with early-learning regularisation (so that they do not memorise) and
judge only examples they were not trained on: cross-fitting over folds, averaged over repeats. With p(x, k) their mean
probability and y the given label:

    unrelated  tail = { (x, k): p(x, k) <= the 40 % quantile of p over all k != y };  r = P((x, y) in tail) / P((x, k) in tail)
               share = r / (1 + r / (K - 1))
               A label that has nothing to do with its example falls into the tail as often as a random other label does, a
               right one hardly ever, even where the proxies are weak. The denominator allows for wrong labels among the
               references (a random other label of a mislabelled example is the right one once in K - 1).
    at most    disagreement with the proxies on the fifth of each predicted class they are surest of (without temperature)

The value is the first; it misses errors that always go to one look-alike class, because proxies learn those as well. The second
counts them, but the proxies' own confusions too. So the interval runs from the lower end of the first to the upper end of the
second (each with its 95 % sampling interval), and covers the true share if label errors are no commoner among easy examples
than elsewhere and at most of the two kinds. Measured on digits with planted errors, 20 draws each: covered 18, 20 and 19 times at
0, 10 and 40 % uniform errors (values .000, .100, .397 on average), 20 and 20 times at 10 and 40 % errors of the kind k -> k + 1, where
the value itself stays near zero. Suspects are ranked by EL2N, ||p - onehot(y)||, averaged over repeats.

The subject itself is not looked at: it was trained on these labels. Source of the scores: Paul et al. 2021 (arXiv 2107.07075);
of the regulariser: Liu et al. 2020 (arXiv 2007.00151); of cross-fitted label audits: Northcutt et al. 2021 (arXiv 1911.00068).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.finding import Finding, Thumbnails
from surefoot.core.instrument import Instrument
from surefoot.core.statistics import Interval, wilson_interval
from surefoot.core.subject import Subject, predict
from surefoot.core.task import Split, Task, Training
from surefoot.errors import check
from surefoot.models import Normalized, mlp, seeded_build, small_cnn, small_cnn1d
from surefoot.nn.scores import el2n
from surefoot.noisy_labels.elr import ELR
from surefoot.training.loop import fit

TAIL = 0.4  # quantile of the reference labels; from .25 to .6 the estimate moves by about a point on planted noise
SUREST = 0.2
SHOWN = 24


def proxy_network(task: Task, generator: torch.Generator) -> nn.Module:
    """A small network for the task's inputs, with the training data's mean and deviation built in."""
    x, shape, classes = task.train.x, task.input_shape, task.num_classes

    def build() -> nn.Module:
        dims = max(x.dim() - 2, 0)
        if len(shape) == 3 and shape[0] > 1 and min(shape[1:]) >= 8:
            network = small_cnn(shape, classes)
        elif len(shape) == 2 and shape[1] >= 16:
            network = small_cnn1d(shape, classes)
        else:
            network = mlp(shape, classes)
        spread = x.std(unbiased=False).clamp_min(1e-6) if dims else x.std(0, unbiased=False).clamp_min(1e-6)
        return Normalized(network, x.mean() if dims else x.mean(0), spread, dims=dims)

    return seeded_build(build, generator)


def cross_fitted_logits(task: Task, *, folds: int, repeats: int, training: Training) -> Tensor:  # float32 [R, N, K]
    """Logits on every training example by networks that have not seen it."""
    n = len(task.train)
    logits = torch.zeros(repeats, n, task.num_classes)
    for repeat in range(repeats):
        order = torch.randperm(n, generator=task.generator(f"label_errors/folds/{repeat}"))
        fold = torch.empty_like(order)
        fold[order] = torch.arange(n) % folds
        for held in range(folds):
            seen, unseen = (fold != held).nonzero().flatten(), (fold == held).nonzero().flatten()
            generator = task.generator(f"label_errors/model/{repeat}/{held}")
            seed = int(torch.randint(2**31, (), generator=generator))
            part = task.changed(train=task.train.take(seen), seed=seed, augment=())
            run = fit(proxy_network(part, generator), part, training, (ELR(lam=1.0),))
            logits[repeat, unseen] = predict(run.model, task.train.x[unseen])
    return logits


def unrelated_share(
    p: Tensor,  # [N, K], cross-fitted probabilities
    y: Tensor,  # int64 [N]
) -> tuple[float, Interval]:
    """Share of labels that have nothing to do with their example, with a 95 % sampling interval; see the module."""
    n, classes = p.shape
    own = p.gather(1, y.unsqueeze(1)).flatten()
    reference = p[torch.ones_like(p, dtype=torch.bool).scatter(1, y.unsqueeze(1), False)]
    edge = reference.kthvalue(max(1, math.ceil(TAIL * len(reference)))).values
    in_tail, usual = int((own <= edge).sum()), float((reference <= edge).double().mean())

    def share(rate: float) -> float:
        ratio = rate / usual
        return min(1.0, ratio / (1 + ratio / (classes - 1)))

    low, high = wilson_interval(in_tail, n)
    return share(in_tail / n), Interval(share(low), share(high))


def sure_disagreement(p: Tensor, y: Tensor) -> tuple[float, Interval, int]:
    """Share of given labels that differ from the prediction, on the surest fifth of each predicted class."""
    sure, predicted = p.max(1)
    order = sure.argsort(descending=True, stable=True)
    order = order[predicted[order].argsort(stable=True)]  # by class, the surest first
    counts = predicted.bincount(minlength=p.shape[1])
    start = counts.cumsum(0) - counts
    rank = torch.arange(len(y)) - start[predicted[order]]
    chosen = order[rank < (SUREST * counts[predicted[order]]).ceil()]
    wrong = int((predicted != y)[chosen].sum())
    return wrong / len(chosen), wilson_interval(wrong, len(chosen)), len(chosen)


def _pictures(x: Tensor, captions: list[str]) -> tuple[Thumbnails, ...]:
    """Grey or colour images in [0, 1] as bytes; nothing for other data."""
    if x.dim() != 4 or x.shape[1] not in (1, 3) or not captions:
        return ()
    images = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    images = images[..., 0] if images.shape[-1] == 1 else images
    return (Thumbnails(np.ascontiguousarray(images), tuple(captions), "The most suspect training labels, worst first."),)  # fmt: skip


@dataclass
class LabelErrors(Instrument):
    """Cross-fitted proxies against the given training labels; the subject is not used."""

    listed: int = 100

    slug: ClassVar[str] = "label_errors"
    reads_model: ClassVar[bool] = False
    title: ClassVar[str] = "Label errors"
    fix: ClassVar[tuple[str, ...]] = ("elr", "ldr", "data_diet")

    def unfit(self, subject: Subject, task: Task) -> str | None:
        if subject.modality not in self.modalities:
            return super().unfit(subject, task)
        if len(task.train) == 0:
            return "It examines the training labels, and there are no training examples."
        if task.train.y is None:
            return "It examines the training labels, and the training split has none."
        if len(task.train) < 10 * max(task.num_classes, 2):
            return f"It trains proxies on halves of the training data, and {len(task.train)} examples for {task.num_classes} classes are too few."  # fmt: skip
        return None

    def measure(self, subject: Subject, task: Task) -> Finding:
        reason = self.unfit(subject, task)
        check(reason is None, reason or "")
        index, task = self._sample(task)
        folds, repeats = task.pick(quick=(2, 1), standard=(3, 2), thorough=(5, 3))
        steps = task.pick(quick=300, standard=400, thorough=600)
        training = Training(steps=steps, lr=2e-3, batch_size=64)
        logits = cross_fitted_logits(task, folds=folds, repeats=repeats, training=training)
        y = task.train.labels
        p = logits.softmax(-1).mean(0)
        value, (low, high) = unrelated_share(p, y)
        ceiling, (ceiling_low, ceiling_high), n_sure = sure_disagreement(p, y)
        score, suggested = el2n(logits, y).mean(0), p.argmax(1)
        suspects = (suggested != y).nonzero().flatten()
        suspects = suspects[score[suspects].argsort(descending=True, stable=True)][: self.listed]
        names = task.class_names or tuple(str(k) for k in range(task.num_classes))
        captions = [f"given {names[int(y[i])]}, looks like {names[int(suggested[i])]}" for i in suspects[:SHOWN]]
        n = len(y)
        parts = (
            Finding(
                self.slug,
                "labels unrelated to their example",
                value,
                low,
                high,
                "share",
                "lower",
                n,
                f"{value:.1%} of the labels have nothing to do with their example ({low:.1%} to {high:.1%}).",
            ),
            Finding(
                self.slug,
                "disagreement of sure proxies",
                ceiling,
                ceiling_low,
                ceiling_high,
                "share",
                "lower",
                n_sure,
                f"Where proxies are surest, {ceiling:.1%} of the given labels differ from their prediction, their own confusions included.",
            ),
        )
        top = max(high, ceiling_high)
        return Finding(
            instrument=self.slug,
            name="suspected label errors",
            value=value,
            low=low,
            high=top,
            unit="share",
            better="lower",
            n=n,
            sentence=f"About {value:.1%} of {n} training labels look wrong, and at most {top:.1%} if every disagreement with sure proxies is a label error.",
            parts=parts,
            pictures=_pictures(task.train.x[suspects[:SHOWN]], captions),
            fix=self.fix if low > 0.01 else (),
            warnings=_warnings(value, high, ceiling_low, (suggested == y).double().mean().item()),
            details={
                "suspects": [
                    {
                        "index": int(index[i]),
                        "given": int(y[i]),
                        "suggested": int(suggested[i]),
                        "score": float(score[i]),
                    }
                    for i in suspects
                ],
                "proxy_agreement": (suggested == y).double().mean().item(),
                "proxies": folds * repeats,
                "steps": steps,
            },
        )

    def _sample(self, task: Task) -> tuple[Tensor, Task]:
        """At most so many training examples, in float32, images at most 32 wide, and their positions in the training split."""
        at_most = task.pick(quick=2000, standard=5000, thorough=20000)
        n = len(task.train)
        index = torch.randperm(n, generator=task.generator("sample/label_errors"))[:at_most].sort().values
        x, y = task.train.x[index].detach().float().cpu(), task.train.labels[index].cpu()
        check(bool(torch.isfinite(x).all()), "The training inputs have NaN or infinite values; clean them first.")
        check(bool((y.min() >= 0) & (y.max() < task.num_classes)), f"The training labels must lie in [0, {task.num_classes}).")  # fmt: skip
        if x.dim() == 4 and max(x.shape[-2:]) > 32:
            x = F.interpolate(x, size=(32, 32), mode="area")
        train = Split(x, y)
        return index, task.changed(train=train, valid=train.take(slice(0, 0)), test=train)


def _warnings(value: float, high: float, ceiling_low: float, agreement: float) -> tuple[str, ...]:
    warnings = []
    if ceiling_low > high:
        warnings.append("Sure proxies disagree with more labels than look unrelated: either some classes are mistaken for each other systematically, or the classes are hard to tell apart; look at the suspects.")  # fmt: skip
    if agreement < 0.5 and value < 0.3:
        warnings.append(f"The proxies agree with only {agreement:.0%} of the labels, so this task is too hard for them and the list of suspects is weak.")  # fmt: skip
    return tuple(warnings)
