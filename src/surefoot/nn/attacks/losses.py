"""What an attack raises: one loss per example, larger where the model is closer to an error.

    cross-entropy   -log softmax(z)_y
    margin          max_{k != y} z_k - z_y                                   > 0 exactly where the example is misclassified
    DLR             -(z_y - max_{k != y} z_k) / (z_pi1 - z_pi3 + 1e-12)       pi sorts z in descending order
    difference      z_t - z_y
    targeted DLR    -(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2 + 1e-12)

DLR (Croce & Hein, 2020, arXiv 2003.01690) does not change when logits are shifted or scaled, so that it has gradients where
softmax saturates. It needs three classes (four when targeted); with fewer the margin is used instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surefoot.errors import check_choice

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits [B, K], y int64 [B]) -> [B]
TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # and a class to go to, int64 [B]
_EPS = 1e-12  # keeps 0 / 0 of constant logits at 0


def cross_entropy(
    logits: Tensor,  # [B, K]
    y: Tensor,  # int64 [B]
) -> Tensor:  # [B]
    return torch.nn.functional.cross_entropy(logits, y, reduction="none")


def margin(
    logits: Tensor,  # [B, K]
    y: Tensor,  # int64 [B]
) -> Tensor:  # [B]
    """Largest other logit minus the true one."""
    top, order = logits.topk(2)
    other = torch.where(order[:, 0] == y, top[:, 1], top[:, 0])
    return other - _pick(logits, y)


def dlr(
    logits: Tensor,  # [B, K]
    y: Tensor,  # int64 [B]
) -> Tensor:  # [B]
    """Difference of logits ratio; `margin` for two classes."""
    if logits.shape[1] < 3:
        return margin(logits, y)
    top, order = logits.topk(3)
    other = torch.where(order[:, 0] == y, top[:, 1], top[:, 0])
    return (other - _pick(logits, y)) / (top[:, 0] - top[:, 2] + _EPS)


def difference(
    logits: Tensor,  # [B, K]
    y: Tensor,  # int64 [B]
    target: Tensor,  # int64 [B]
) -> Tensor:  # [B]
    """How far class `target` leads the true one."""
    return _pick(logits, target) - _pick(logits, y)


def targeted_dlr(
    logits: Tensor,  # [B, K]
    y: Tensor,  # int64 [B]
    target: Tensor,  # int64 [B]
) -> Tensor:  # [B]
    """Difference of logits ratio towards `target`; the plain difference z_t - z_y with fewer than four classes."""
    lead = difference(logits, y, target)
    if logits.shape[1] < 4:
        return lead
    top = logits.topk(4).values
    return lead / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + _EPS)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def get_loss(loss: str | Loss) -> Loss:
    """The loss of that name ("ce", "margin", "dlr"), or the function itself."""
    if callable(loss):
        return loss
    check_choice("loss", loss, LOSSES)
    return LOSSES[loss]


def loss_note(loss: str | Loss, num_classes: int) -> tuple[str, ...]:
    """What must be recorded about a loss on so many classes."""
    if loss == "dlr" and num_classes < 3:
        return ("DLR needs 3 classes; the margin was used instead.",)
    return ()


def _pick(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None])[:, 0]
