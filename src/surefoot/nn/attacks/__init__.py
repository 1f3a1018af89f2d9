"""Adversarial attacks and honest evaluation: the largest harm a small change of the input can do to a classifier.

    max_{||x' - x|| <= eps, x' in bounds} loss(f(x'), y)

- `pgd`, `pgd_train`: projected gradient descent, for evaluation and for the inside of a training loop
- `apgd`: the parameter-free variant; `fab`: the smallest change that breaks; `square`: gradient-free random search
- `standard_suite`: APGD-CE, APGD-T, FAB-T and Square in cascade (the AutoAttack class)
- `rand_suite`, `adaptive_suite`: for models that draw random numbers, and for defences that are more than a trained network
- `attack_target` of the suites: gradients of another model than the one judged (transfer, surrogates)
- `masking_diagnostics`: signs that gradients are hidden and a robust accuracy is too good to be true

Every attack takes `model: Tensor [B, ...] -> logits [B, K]`, raw inputs `x` within `bounds`, int64 labels `y`, and an
explicit `generator`; it leaves weights, buffers, `.grad`, training flags and the global random state as they were, and
works inside `torch.no_grad()`. Without a generator the draws are those of seed 0 at every call: pass one in a training loop.
"""

from surefoot.nn.attacks.adaptive import adaptive_suite
from surefoot.nn.attacks.apgd import apgd, checkpoints
from surefoot.nn.attacks.ball import Ball, Norm
from surefoot.nn.attacks.diagnostics import MaskingCheck, MaskingReport, masking_diagnostics
from surefoot.nn.attacks.fab import fab, plane_step
from surefoot.nn.attacks.losses import cross_entropy, difference, dlr, margin, targeted_dlr
from surefoot.nn.attacks.pgd import pgd, pgd_train
from surefoot.nn.attacks.run import AttackResult, Model, ZeroGradient, attacking
from surefoot.nn.attacks.square import square
from surefoot.nn.attacks.suite import SuiteResult, decide, is_random, rand_suite, standard_suite

__all__ = [
    "AttackResult",
    "Ball",
    "MaskingCheck",
    "MaskingReport",
    "Model",
    "Norm",
    "SuiteResult",
    "ZeroGradient",
    "adaptive_suite",
    "apgd",
    "attacking",
    "checkpoints",
    "cross_entropy",
    "decide",
    "difference",
    "dlr",
    "fab",
    "is_random",
    "margin",
    "masking_diagnostics",
    "pgd",
    "pgd_train",
    "plane_step",
    "rand_suite",
    "square",
    "standard_suite",
    "targeted_dlr",
]
