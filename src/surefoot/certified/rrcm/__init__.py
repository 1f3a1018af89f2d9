"""rRCM: an encoder that has learnt to see through noise, so that a smoothed classifier needs one network pass a noise sample.

Pixels in [0, 1] are mapped to [-1, 1]; a trajectory is x_t = x + t e with ONE e ~ N(0, I) for all noise levels t (variance
exploding). Certification noise sigma on [0, 1] pixels is t = 2 sigma here. The grid (i = 0 noisiest) and the input scale are

    t_i = (tmax^(1/rho) + i/(N-1) (tmin^(1/rho) - tmax^(1/rho)))^rho,     c_in(t) = 1/sqrt(t^2 + 1/4),   rho = 7,

and the encoder z = E(x_t, t) sees c_in(t) x_t and t. With nce(f, g)_i = -s_ii/tau + logsumexp_j s_ij/tau on cosine similarities s,

    contrast    = nce(p(z(v1)), sg p'(z'(v2))) + nce(p(z(v2)), sg p'(z'(v1)))   at tmin, two augmented views, the same e
    consistency = nce(z(x_{t_i}), sg z(x_{t_{i+1}}))   one i a batch, same x and e, no projection head, online target

(sg: no gradient; primes: the moving average of the weights; p: projection head). Neighbours on a trajectory are positives, and
chained over i every noise level is tied to the clean representation. Then `finetune_rrcm` adds a linear head at one noise
level with two noisy copies and consistency tuning; the result is an ordinary base classifier for `surefoot.nn.smoothing.certify`.

In your own loop: `pretrain_rrcm(encoder, x, ...)`, `finetune_rrcm(state.encoder, x, y, sigma=...)`, `certify(model, ...)`. The encoder
is an `RRCMEncoder` (ViT) or a `ClassifierEncoder` made from any classifier that ends in a linear layer; or your own `NoiseEncoder`.

Source: Lei et al. 2025 (ICLR), arXiv 2501.13094; consistency tuning: Jeong, Shin 2020, arXiv 2006.04062; grid: Karras et al.
2022, arXiv 2206.00364.
"""

from surefoot.certified.rrcm.encoders import ClassifierEncoder, NoiseEncoder, RRCMEncoder, input_scale, projection_head
from surefoot.certified.rrcm.finetuning import SmoothableClassifier, consistency_tuning_loss, finetune_rrcm
from surefoot.certified.rrcm.pretraining import (
    RRCMLoss,
    RRCMState,
    affine_jitter,
    nce,
    pretrain_rrcm,
)
from surefoot.certified.rrcm.schedule import RRCMSchedule, karras_sigmas, nearest_time
from surefoot.certified.rrcm.treatment import RRCM

__all__ = [
    "RRCM",
    "ClassifierEncoder",
    "NoiseEncoder",
    "RRCMEncoder",
    "RRCMLoss",
    "RRCMSchedule",
    "RRCMState",
    "SmoothableClassifier",
    "affine_jitter",
    "consistency_tuning_loss",
    "finetune_rrcm",
    "input_scale",
    "karras_sigmas",
    "nce",
    "nearest_time",
    "pretrain_rrcm",
    "projection_head",
]
