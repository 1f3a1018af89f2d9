"""The two steps of training, and the treatment that gives a two-branch model both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from surefoot.certified.crmt.model import MultiModalClassifier, OrthogonalFusion, classifier_in, shapes_of
from surefoot.certified.crmt.robustness import Lipschitz, check_lipschitz, estimate_lipschitz, published_radius
from surefoot.core.task import Task
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import Refused, check, check_at_least, check_choice, check_non_negative, check_positive
from surefoot.nn.modes import evaluating

FLOOR = 1e-5  # inside the logarithm of the margin term


def margin_term(uni_logits: Sequence[Tensor], y: Tensor) -> Tensor:  # M of [B, K], int64 [B] -> [B]
    """log( sum_m sum_{k != y} exp(z^m_k - z^m_y) + 1e-5 ), which no size of z overflows."""
    return mixed_margin_term(uni_logits, y, y, 1.0)


def mixed_margin_term(uni_logits: Sequence[Tensor], y: Tensor, other: Tensor, share: float) -> Tensor:  # [B]
    """The margin term of mixed examples: classes y and `other` are left out, and the margin is to share z_y + (1 - share) z_other."""
    z = torch.stack(list(uni_logits))  # [M, B, K]
    both = torch.stack([y, other], 1)
    own = z.gather(2, both.expand(len(z), -1, -1))
    mixed = share * own[..., :1] + (1 - share) * own[..., 1:]
    kept = (z - mixed).scatter(2, both.expand(len(z), -1, -1), -torch.inf)
    floor = kept.new_full((1, z.shape[1], 1), math.log(FLOOR)).expand(1, -1, 1)
    return torch.cat([kept.transpose(0, 1).flatten(1), floor[0]], 1).logsumexp(1)


class CRMTLoss(nn.Module):
    """Cross-entropy of the whole plus `rho` times the mean margin term of the modalities."""

    def __init__(self, rho: float = 2.0) -> None:
        super().__init__()
        check_non_negative("rho", rho)
        self.rho = rho

    def forward(
        self,
        uni_logits: Sequence[Tensor],  # M of [B, K]
        logits: Tensor,  # [B, K]
        y: Tensor,  # int64 [B]
        other: Tensor | None = None,  # int64 [B], the partners' labels in mixup
        share: float = 1.0,
    ) -> Tensor:
        other = y if other is None else other
        cross_entropy = nn.functional.cross_entropy
        loss = share * cross_entropy(logits, y) + (1 - share) * cross_entropy(logits, other)
        return loss + self.rho * mixed_margin_term(uni_logits, y, other, share).mean()


def joint_adversary(
    model: nn.Module,
    x: Tensor,  # packed [B, n]
    y: Tensor,  # int64 [B]
    *,
    eps: float = 0.1,
    steps: int = 5,
) -> Tensor:  # packed [B, n]
    """`steps` steps of eps / steps along the gradient of the cross-entropy, of length 1 over all modalities together.

    The published clamp of every number to +-2 eps is left out: the steps add up to eps at most, so it never binds. Modules act
    in the mode they are in, but batch-norm does not count the attacked batches.
    """
    check_positive("eps", eps)
    check_at_least("steps", steps, 1)
    point = x.detach()
    with evaluating(model):
        for _ in range(steps):
            point = point.detach().requires_grad_()
            with torch.enable_grad():
                loss = nn.functional.cross_entropy(model(point), y, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, point)
            point = point + eps / steps * gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-12).unsqueeze(1)
    return point.detach()


# ------------------------------------------------------------------------------------------------ step 2


def integrate(
    model: nn.Module,
    train: tuple[Tensor, Tensor],  # packed [N, n], int64 [N]
    lipschitz: Lipschitz,
    *,
    valid: tuple[Tensor, Tensor] | None = None,
    lr: float = 3e-5,  # 0.03 times the published learning rate of step 1
    epochs: int = 10,
    batch_size: int = 64,
    keep_norm: bool = True,
    generator: torch.Generator,
) -> float:
    """Step 2, in place: move the integration weights a, and nothing else, to raise the mean published radius.

    The objective does not change when a and b grow together, so with b frozen it (and the weight decay) would shrink a wherever
    the mean of b_y - b_j is positive: `keep_norm` puts a back to its norm after every step. Of all epochs, the a with the
    best accuracy on `valid` is kept, the later of equals. z is computed once, in evaluation mode. Returns the mean radius.
    """
    _, known = classifier_in(model)
    fusion = known.fusion
    if not isinstance(fusion, OrthogonalFusion):
        raise Refused("Step 2 moves the integration weights of an OrthogonalFusion; this model's head has none.")
    check_positive("lr", lr)
    check_lipschitz(lipschitz, known)
    with torch.no_grad(), evaluating(known):
        z = [torch.stack(known.both(x)[0]) for x in (train[0], *(() if valid is None else (valid[0],)))]
    y, bias, constants = train[1], fusion.bias.detach(), lipschitz.logits.to(fusion.a)
    a = fusion.a.detach().clone().requires_grad_()
    norm, best, best_accuracy = a.detach().norm(), a.detach().clone(), -1.0
    optimizer = torch.optim.SGD([a], lr, momentum=0.9, weight_decay=1e-2)

    def logits(z: Tensor) -> Tensor:
        return (a.unsqueeze(1) * z).sum(0) + bias

    for epoch in range(epochs + 1):
        if valid is not None:
            accuracy = (logits(z[1]).argmax(1) == valid[1]).double().mean().item()
            if accuracy >= best_accuracy:
                best, best_accuracy = a.detach().clone(), accuracy
        if epoch == epochs:
            break
        for pick in torch.randperm(len(y), generator=generator).to(y.device).split(batch_size):
            rival = logits(z[0][:, pick]).detach().scatter(1, y[pick, None], -torch.inf).argmax(1)
            loss = -published_radius(list(z[0][:, pick]), a, bias, constants, y[pick], rival).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if keep_norm:
                with torch.no_grad():
                    a.mul_(norm / a.norm().clamp_min(1e-12))
    chosen = best if valid is not None else a.detach()
    with torch.no_grad():
        fusion.a.copy_(chosen)
        rival = ((chosen.unsqueeze(1) * z[0]).sum(0) + bias).scatter(1, y[:, None], -torch.inf).argmax(1)
        return published_radius(list(z[0]), chosen, bias, constants, y, rival).mean().item()


# ------------------------------------------------------------------------------------------------ the plug


@torch.no_grad()
def _inputs_of(known: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    """What `known` gets to see when the model reads x: normalisation may stand before it."""
    caught: list[Tensor] = []
    handle = known.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    try:
        with evaluating(model):
            for part in x.split(512):
                model(part)
    finally:
        handle.remove()
    return torch.cat(caught)


@dataclass
class CRMT(Treatment):
    """Both steps on a `MultiModalClassifier`: its head becomes an `OrthogonalFusion`, trained with the margin term, then balanced.

    `adversarial` > 0 trains on joint adversaries of that L2 size (CRMT-AT), `mixup` mixes examples (CRMT-mix). `integrate_lr` 0
    leaves step 2 out. `a_init` 1 suits small encoders, 0.1 (published) the features of a ResNet.
    """

    rho: float = 2.0
    orthogonal: Literal["full", "row"] = "full"
    a_init: float = 1.0
    adversarial: float = 0.0
    mixup: bool = False
    integrate_lr: float = 1e-3
    integrate_epochs: int = 10
    in_dims_: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)

    slug: ClassVar[str] = "crmt"
    finish_order: ClassVar[int] = -5  # while encoders and head can still be told apart

    def __post_init__(self) -> None:
        check_non_negative("rho", self.rho)
        check_choice("orthogonal", self.orthogonal, ("full", "row"))
        check_positive("a_init", self.a_init)
        check_non_negative("adversarial", self.adversarial)
        check_non_negative("integrate_lr", self.integrate_lr)
        check_at_least("integrate_epochs", self.integrate_epochs, 0)
        check(not (self.mixup and self.adversarial), "mixup and adversarial are two variants of the method; choose one.")  # fmt: skip

    def check(self, model: nn.Module, task: Task) -> None:
        shapes_of(model, task.input_shape)
        _, known = classifier_in(model)
        self._dims(known, task)

    def _dims(self, known: MultiModalClassifier, task: Task) -> tuple[int, ...]:
        like = next(known.parameters())
        with torch.no_grad(), evaluating(known):
            dims = tuple(phi.shape[1] for phi in known.features(task.train.x[:2].to(like.device, like.dtype)))
        OrthogonalFusion(dims, task.num_classes, orthogonal=self.orthogonal)  # says what does not fit
        return dims

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        _, known = classifier_in(model)
        self.in_dims_ = self._dims(known, task)
        like = next(known.parameters())
        known.fusion = self._head(task.num_classes, task.generator("crmt/head")).to(like.device, like.dtype)
        return model, task

    def _head(self, num_classes: int, generator: torch.Generator | None = None) -> OrthogonalFusion:
        return OrthogonalFusion(
            self.in_dims_, num_classes, orthogonal=self.orthogonal, a_init=self.a_init, generator=generator
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        _, known = classifier_in(model)
        x, y, other, share = batch.x, batch.y, None, 1.0
        if self.adversarial > 0:
            x = joint_adversary(model, x, y, eps=self.adversarial)
        if self.mixup:  # lambda ~ Beta(1, 1)
            share = float(torch.rand((), generator=batch.generator, device=batch.generator.device))
            partner = torch.randperm(len(x), generator=batch.generator, device=batch.generator.device).to(y.device)
            x, other = share * x + (1 - share) * x[partner], y[partner]
        caught: list[list[Tensor]] = []
        handle = known.fusion.register_forward_hook(lambda module, inputs, output: caught.append(output[0]))
        try:
            logits = model(x)
        finally:
            handle.remove()
        return CRMTLoss(self.rho)(caught[0], logits, y, other, share)

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        if self.integrate_lr == 0 or self.integrate_epochs == 0:
            return model
        _, known = classifier_in(model)
        splits = [s for s in (task.train, task.valid) if len(s)]
        seen = [(_inputs_of(known, model, s.x.to(task.device)), s.labels.to(task.device)) for s in splits]
        constants = estimate_lipschitz(known, list(seen[0][0].split(256)))
        if bool((constants.logits > 0).all()):  # a class that an encoder ignores has no radius to raise
            integrate(
                known, seen[0], constants, valid=seen[1] if len(seen) > 1 else None, lr=self.integrate_lr,
                epochs=self.integrate_epochs, generator=task.generator("crmt/integrate"),
            )  # fmt: skip
        return model

    def structure(self) -> dict[str, Any]:
        return {"in_dims": list(self.in_dims_)}

    def rebuild(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        _, known = classifier_in(model)
        self.in_dims_ = tuple(structure["in_dims"])
        known.fusion = self._head(len(known.fusion.bias))
        return model
