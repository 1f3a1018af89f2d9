"""Randomised smoothing: what a classifier says under Gaussian noise, and the L2 radius within which that cannot change.

For a base classifier f, the smoothed one is g(x) = argmax_c P[f(x + sigma e) = c], e ~ N(0, I). If class c has probability
at least pA > 1/2 there, then g is constant in the open L2 ball of radius sigma Phi^-1(pA) around x. `certify` picks c from
n0 draws, bounds pA from below with n *fresh* draws (Clopper-Pearson, one-sided level alpha), and abstains where the bound
does not exceed 1/2; every certificate alone is wrong with probability at most alpha. `predict` only names the class.

Noise is added to the raw input, before any normalisation, and is not clipped. Models run in evaluation mode (flags are
switched and put back). Many inputs are worked on at once; no input is repeated in memory beyond one batch.

Source: Cohen, Rosenfeld, Kolter 2019, arXiv 1902.02918.
"""

from surefoot.nn.smoothing.bounds import (
    binomial_p_value,
    lower_confidence_bound,
    smoothing_radius,
    upper_confidence_bound,
)
from surefoot.nn.smoothing.certificates import (
    ABSTAIN,
    Certificates,
    Looks,
    average_certified_radius,
    certified_accuracy,
    certify,
    correct_radii,
    predict,
)
from surefoot.nn.smoothing.sampling import (
    check_deterministic,
    check_request,
    default_batch,
    joint_vote_counts,
    noisy_batches,
    vote_counts,
)
from surefoot.nn.smoothing.training import consistency_loss, noisy_loss

__all__ = [
    "ABSTAIN",
    "Certificates",
    "Looks",
    "average_certified_radius",
    "binomial_p_value",
    "certified_accuracy",
    "certify",
    "check_deterministic",
    "check_request",
    "consistency_loss",
    "correct_radii",
    "default_batch",
    "joint_vote_counts",
    "lower_confidence_bound",
    "noisy_batches",
    "noisy_loss",
    "predict",
    "smoothing_radius",
    "upper_confidence_bound",
    "vote_counts",
]
