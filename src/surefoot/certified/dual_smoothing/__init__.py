"""Dual randomised smoothing: split the image into two halves, smooth each in its own lower dimension, add the votes.

Each 2x2 block of pixels is split along its diagonal (checkerboard masks M_l + M_r = 1), so that either half alone still
shows the whole image. Base classifiers f_l, f_r see only their own noisy half (the other half is filled in from it), and

    G(x)_c = P[f_l(x_l + e_l) = c] + P[f_r(x_r + e_r) = c],   e ~ N(0, sigma^2 I),   prediction argmax_c G(x)_c.

With lower bounds a <= P_l(c), b <= P_r(c), each at level alpha/2, A = Phi^-1(a), B = Phi^-1(b):

    R = (A + B) / sqrt(1/sigma_l^2 + 1/sigma_r^2)       (= sigma (A + B)/sqrt(2) for one sigma), if A + B > 0, else abstain.

Why: an attack of norms (s, t) on the halves leaves G(c) >= Phi(A - s/sigma_l) + Phi(B - t/sigma_r), which beats every other
class (they get at most 2 - G(c)) iff s/sigma_l + t/sigma_r < A + B; R is the distance of that line from the origin. A half
with B < 0 counts with its sign. At a = b = p the radius is sqrt(2) times plain smoothing's: the gain shows where plain
smoothing is near its cap sigma Phi^-1(alpha^(1/n)), i.e. on redundant images at small sigma; at large sigma half the
evidence per network costs more. (Not "Dual Randomized Smoothing" of arXiv 2512.01782, which varies sigma by input.)

Shapes: x `[B, C, H, W]` in raw scale; masks bool, broadcastable to one input; logits `[B, K]`.
Source: Xia, Yu, Ding, Jiang, Chen 2024 (ICLR), arXiv 2404.09586.
"""

from surefoot.certified.dual_smoothing.certificate import DualCertificate, as_certificates, dual_radius
from surefoot.certified.dual_smoothing.classifier import (
    DualSmoothedClassifier,
    HalfClassifier,
    SmoothingReport,
    certify_dual,
)
from surefoot.certified.dual_smoothing.treatment import DualSmoothing

__all__ = [
    "DualCertificate",
    "DualSmoothedClassifier",
    "DualSmoothing",
    "HalfClassifier",
    "SmoothingReport",
    "as_certificates",
    "certify_dual",
    "dual_radius",
]
