"""Certified robustness for a model that can only be asked: a denoiser and an autoencoder before it, trained by queries alone.

    F(x) = f(dec(enc(D(x)))),    min over D, enc of  E CE(F(x + sigma e), argmax f(x)),    e ~ N(0, I)

f answers scores and gives neither gradients nor weights. Only the scalar loss is asked for: with z = enc(D(x + sigma e)) in R^q
and l(z) = CE(f(dec(z)), .) of ONE sample, a zeroth-order estimate g of dl/dz is made from queries, and the white-box part gets
the gradient of mean_b <z_b, sg g_b> by the chain rule:

    CGE   g_k = [l(z + mu e_k) - l(z - mu e_k)] / (2 mu), all k                                 2 q queries a sample
    RGE   g = 1/q' sum_i (d/mu) [l(z + mu u_i) - l(z)] u_i, u_i uniform on the sphere, d = dim z    q' + 1 queries a sample

The variance of RGE is about d times |dl/dz|^2, and exact CGE costs 2 d queries: the autoencoder, pre-trained without any
query and with a decoder that stays as it is, makes d small. Without it (`encoder=None`) the estimate is made at the pixels (DS).
D starts as the identity and is not pre-trained. With hard labels alone the differences vanish; scores are needed.

`BlackBox` wraps any callable (an ONNX session, an HTTP client, a scikit-learn model), counts each row it is asked for and stops
at a budget. `RobustifiedModel` is the base classifier for `surefoot.nn.smoothing.certify`: certificates are in pixels, by pure
queries, and cost n0 + n queries an image (16 more a call for the check that f is deterministic). `train_fo_denoiser` is the
first-order twin, for models that do give gradients.

Shapes: x `[N, C, H, W]` in [0, 1]; z `[B, q]`; scores `[B, K]`. Source: Zhang et al. 2022 (ICLR), arXiv 2203.14195.
"""

from surefoot.certified.zo_smoothing.autoencoder import (
    Autoencoder,
    LatentAutoencoder,
    mnist_autoencoder,
    pretrain_autoencoder,
)
from surefoot.certified.zo_smoothing.blackbox import BlackBox, BlackBoxMap
from surefoot.certified.zo_smoothing.gradients import ZOEstimate, surrogate, zo_gradient, zo_queries
from surefoot.certified.zo_smoothing.pipeline import (
    ReconstructionStability,
    RobustifiedModel,
    reconstruction_stability,
    ssim,
)
from surefoot.certified.zo_smoothing.training import FrontReport, train_fo_denoiser, train_zo_denoiser
from surefoot.certified.zo_smoothing.treatment import ZOSmoothing

__all__ = [
    "Autoencoder",
    "BlackBox",
    "BlackBoxMap",
    "FrontReport",
    "LatentAutoencoder",
    "ReconstructionStability",
    "RobustifiedModel",
    "ZOEstimate",
    "ZOSmoothing",
    "mnist_autoencoder",
    "pretrain_autoencoder",
    "reconstruction_stability",
    "ssim",
    "surrogate",
    "train_fo_denoiser",
    "train_zo_denoiser",
    "zo_gradient",
    "zo_queries",
]
