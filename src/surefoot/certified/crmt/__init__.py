"""Multi-modal robustness by modality preference (CRMT): two-input classifiers that stand when one input is attacked or missing.

How two inputs travel: packed into one tensor `[B, n_1 + n_2]`, flattened one after the other (`pack`); the model cuts it by its `shapes`.
Whatever has `shapes` and takes packed inputs is a `TwoBranch` (wrap your own `forward(a, b)` in `Packed`).

Model: encoders phi_m(x_m) in R^{D_m}, W^m with orthonormal rows, class-wise integration weights a^m:

    z^m = W^m phi_m  [B, K]          h = sum_m a^m * z^m + b

Theorem, per rival j: with L_m the Lipschitz constant of phi_m, no change of both inputs shorter (joint L2) than

    radius_j = (h_y - h_j) / sqrt( sum_m (L_m ||a^m_y W^m_y - a^m_j W^m_j||)^2 )

turns y into j; of modality m alone: only its term in the sum. With orthonormal rows the norm is sqrt(a_y^2 + a_j^2). The published
form has |a_y| T_y + |a_j| T_j in its place, T^m_k the Lipschitz constant of z^m_k: up to sqrt 2 smaller. Only L or T from a bound that
holds everywhere (`method="product"`) certify; the largest gradient seen on data (`"empirical"`) only estimates.

Training: step 1 minimises cross-entropy + rho mean log( sum_m sum_{k != y} exp(z^m_k - z^m_y) + 1e-5 ), whose gradient goes to the
modality with the smaller margins; step 2 moves a alone, to raise the mean radius of the published form.

- `pack`, `unpack`, `Packed`, `MultiModalClassifier`, `ConcatFusion`, `OrthogonalFusion`: models
- `CRMTLoss`, `margin_term`, `joint_adversary`, `integrate`: the two steps
- `estimate_lipschitz`, `multimodal_radius`, `modality_preference`: theory
- `evaluate_multimodal`: attacks on one modality or both, missing modalities; `CRMT` the treatment, `Modalities` the instrument
- `two_view_digits`, `two_branch`: data and a small model to try it on

Source: Yang, Wei, Chen & Hu 2024 (ICLR), arXiv 2402.06244. Deviations from the published code: rows orthonormal to each other and not only of
unit length (`orthogonal="row"` gives the latter); Lipschitz constants of z, each by its own gradient; |a| in the denominator;
step 2 in evaluation mode, with the norm of a kept and the best a on validation; exp(z), not z, left out in the mixed margin.
"""

from surefoot.certified.crmt.data import two_branch, two_view_digits
from surefoot.certified.crmt.instrument import Modalities
from surefoot.certified.crmt.model import (
    ConcatFusion,
    MultiModalClassifier,
    OrthogonalFusion,
    Packed,
    TwoBranch,
    pack,
    shapes_of,
    unpack,
)
from surefoot.certified.crmt.robustness import (
    Lipschitz,
    MultiModalRadius,
    MultiModalReport,
    PreferenceReport,
    attack_modalities,
    estimate_lipschitz,
    evaluate_multimodal,
    modality_preference,
    multimodal_radius,
    published_radius,
)
from surefoot.certified.crmt.training import CRMT, CRMTLoss, integrate, joint_adversary, margin_term, mixed_margin_term

__all__ = [
    "CRMT",
    "CRMTLoss",
    "ConcatFusion",
    "Lipschitz",
    "Modalities",
    "MultiModalClassifier",
    "MultiModalRadius",
    "MultiModalReport",
    "OrthogonalFusion",
    "Packed",
    "PreferenceReport",
    "TwoBranch",
    "attack_modalities",
    "estimate_lipschitz",
    "evaluate_multimodal",
    "integrate",
    "joint_adversary",
    "margin_term",
    "mixed_margin_term",
    "modality_preference",
    "multimodal_radius",
    "pack",
    "published_radius",
    "shapes_of",
    "two_branch",
    "two_view_digits",
    "unpack",
]
