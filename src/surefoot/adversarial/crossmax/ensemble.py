"""The self-ensemble: linear probes on hidden layers of a frozen network, and its own head, as predictors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial.crossmax.aggregation import Rank, crossmax
from surefoot.errors import InvalidInput, check, check_at_least, check_positive
from surefoot.nn.attacks import attacking
from surefoot.nn.modes import evaluating
from surefoot.nn.taps import tapped

Aggregate = Callable[[Tensor], Tensor]  # [B, N, K] -> [B, K]


class Probe(nn.Module):
    """Batch-norm and a linear layer on the flattened feature; maps and tokens beyond `max_features` are averaged down first.

    Flattened early layers of large images would need millions of weights per class.
    """

    def __init__(self, feature: Tensor, num_classes: int, max_features: int) -> None:
        super().__init__()
        self.max_features = max_features
        width = self.flat(feature).shape[1]
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, num_classes)

    def flat(self, feature: Tensor) -> Tensor:  # [B, F]
        if feature[0].numel() > self.max_features:
            if feature.dim() == 4:
                side = max(1, math.isqrt(self.max_features // feature.shape[1]))
                feature = F.adaptive_avg_pool2d(feature, (min(side, feature.shape[2]), min(side, feature.shape[3])))
            elif feature.dim() == 3:  # tokens [B, T, C]
                count = max(1, min(feature.shape[1], self.max_features // feature.shape[2]))
                feature = F.adaptive_avg_pool1d(feature.transpose(1, 2), count)
        return feature.flatten(1)

    def forward(self, feature: Tensor) -> Tensor:
        return self.linear(self.norm(self.flat(feature)))


class SelfEnsemble(nn.Module):
    """Probes on `layers` of `backbone` and the backbone's own logits, aggregated: `[B, N, K]` to `[B, K]`.

    All predictors read one pass through the backbone, hence one draw of its randomness. The backbone stays in evaluation
    mode whatever `train()` says. `layers` are module names (`surefoot.nn.taps.layer_names` lists the useful ones).
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: Sequence[str],
        num_classes: int,
        *,
        example: Tensor,  # [b, ...] inputs whose shape is that of all others
        k: Rank = "median",
        aggregate: Aggregate | None = None,  # in place of CrossMax
        max_features: int = 4096,
    ) -> None:
        super().__init__()
        check(aggregate is not None or len(layers) >= 2, f"CrossMax needs 3 predictors, so at least 2 layers beside the head, got {list(layers)}.")  # fmt: skip
        check_at_least("num_classes", num_classes, 2)
        check(
            k == "median" or 1 <= k <= len(layers) + 1,
            f"k must lie in 1..{len(layers) + 1} (layers and head), got {k}.",
        )
        with evaluating(backbone), torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits, features = tapped(backbone, layers, example[:2])
        check(logits.dim() == 2 and logits.shape[1] == num_classes, f"The backbone must give logits [B, {num_classes}], got {list(logits.shape)}.")  # fmt: skip
        self.backbone, self.layers = backbone, tuple(layers)
        self.probes = nn.ModuleList(Probe(f, num_classes, max_features) for f in features).to(
            logits.device, logits.dtype
        )
        self.aggregate: Aggregate = aggregate or partial(crossmax, k=k)
        self.train(backbone.training)

    def train(self, mode: bool = True) -> SelfEnsemble:
        super().train(mode)
        self.backbone.eval()
        return self

    def predictors(self, x: Tensor) -> Tensor:  # [B, N, K], the head last
        logits, features = tapped(self.backbone, self.layers, x)
        return torch.stack([*(probe(f) for probe, f in zip(self.probes, features, strict=True)), logits], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.aggregate(self.predictors(x))

    def aggregated_by(self, aggregate: Aggregate) -> SelfEnsemble:
        """The same modules under another aggregation, e.g. `mean_log_probs` as the surrogate of an attack."""
        other = copy.copy(self)
        other.aggregate = aggregate
        return other


def fit_probes(
    ensemble: SelfEnsemble,
    x: Tensor,  # [n, ...]
    y: Tensor,  # int64 [n]
    *,
    epochs: int = 1,
    lr: float = 3.3e-5,
    batch_size: int = 128,
    generator: torch.Generator,
) -> list[float]:
    """Train the probes with Adam on cross-entropy, each by itself, in place; the backbone is frozen in evaluation mode.

    A random backbone draws afresh for each batch, seeded from `generator`. The paper's one epoch at 3.3e-5 is for flattened maps of
    hundreds of thousands of features; small networks want 1e-3. Returns the mean loss per probe, epoch by epoch.
    """
    check_at_least("epochs", epochs, 0)
    check_positive("lr", lr)
    check_at_least("batch_size", batch_size, 2)
    check(len(x) >= 2 and len(y) == len(x), f"Probes need at least two labelled examples, got {len(x)} and {len(y)} labels.")  # fmt: skip
    device = next(ensemble.probes.parameters()).device
    optimizer = torch.optim.Adam(ensemble.probes.parameters(), lr)
    batches, history = max(1, len(x) // batch_size), []
    with attacking(ensemble.backbone, "eval", generator, device):
        ensemble.probes.train()
        for _ in range(epochs):
            order, total = torch.randperm(len(x), generator=generator, device=generator.device).cpu(), 0.0
            for index in order.tensor_split(batches):
                inputs, labels = x[index.to(x.device)].to(device), y[index.to(y.device)].to(device)
                with torch.no_grad():
                    features = tapped(ensemble.backbone, ensemble.layers, inputs)[1]
                losses = [F.cross_entropy(p(f), labels) for p, f in zip(ensemble.probes, features, strict=True)]
                loss = torch.stack(losses).sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.item() / len(losses)
            history.append(total / batches)
            if not math.isfinite(history[-1]):
                raise InvalidInput(f"The probes' loss became {history[-1]}; lower lr.")
    optimizer.zero_grad(set_to_none=True)
    ensemble.eval()
    return history
