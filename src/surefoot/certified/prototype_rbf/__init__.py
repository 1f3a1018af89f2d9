"""Classification by components: an interpretable classifier ("these present, those absent") with a closed-form radius.

Components w_k, detected with probability d_k(x) = exp(-||x - w_k|| / s_k) in (0, 1] (or exp(-||x - w_k||^2 / (2 s_k^2))), and for each
class c probabilities of positive and of negative reasoning, all 2K of them together a distribution:

    r+_kc, r-_kc >= 0,  sum_k (r+_kc + r-_kc) = 1                               softmax over 2K numbers a class
    p_c(x) = sum_k r+_kc d_k + r-_kc (1 - d_k)  in [0, 1]                       argmax decides; no softmax across classes

Training: margin loss max(0, max_{c != y} p_c - p_y + m), then robustness loss max(0, gamma - radius(x)).

Certificate (L2; the distances are 1-Lipschitz): for a rival c with D_k = (r+ - r-)_ky - (r+ - r-)_kc and C = sum_k (r-_ky - r-_kc),

    A = sum_{D>0} D_k d_k,   B = sum_{D<0} |D_k| d_k
    p_y - p_c >= A / z - B z + C > 0   for   z = exp(||e|| / s) < z* = (C + sqrt(C^2 + 4AB)) / (2B),   radius = s ln z*, min over c.

A softmax is no certificate of anything here, and neither is half a distance between prototypes; the class-wise sum to one is what
makes p a probability. The certificate itself serves any RBF network, linear in d (`rbf_radius`). Deep form: a backbone's
feature map `[B, Q, H, W]`, softmax over Q, maximum over positions: d `[B, Q]` (`CBCHead`), or components in the penultimate features.
A radius in features divided by the backbone's Lipschitz constant is one in inputs; it is never one by itself.

- `ClassificationByComponents`, `CBCHead`, `ComponentLogits`: the heads; `CBCMarginLoss`, `CBCRobustLoss`, `alignment_loss`, `presence_loss`
- `rbf_radius`, `cbc_radius`, `certify_prototypes`: certificates
- `PrototypeRBF`: the treatment, in place of a model's last linear layer; `Components`: the instrument that draws them

Source: Saralajew, Rana, Villmann & Shaker 2025 (AAAI), arXiv 2412.15499. The older form (`variant="cbc2019"`, with indefinite reasoning
and a normalisation that lets vanishing evidence give probability 1): Saralajew et al. 2019 (NeurIPS). PIP-Net's pre-training losses:
Nauta et al. 2023 (CVPR). Deviations: terms of y and c are merged before the bound (`radius_paper` keeps them apart, and is
smaller); no clamping of d below 0.1 at inference unless asked for, as it changes negative reasoning.
"""

from surefoot.certified.prototype_rbf.certificate import (
    CertifiedPrototypes,
    RadiusReport,
    cbc_radius,
    certify_prototypes,
    rbf_radius,
)
from surefoot.certified.prototype_rbf.components import Components
from surefoot.certified.prototype_rbf.head import (
    CBCHead,
    ClassificationByComponents,
    ComponentLogits,
    Explanation,
    Reasoning,
    alignment_loss,
    kmeans,
    presence_loss,
)
from surefoot.certified.prototype_rbf.training import CBCMarginLoss, CBCRobustLoss, PrototypeRBF

__all__ = [
    "CBCHead",
    "CBCMarginLoss",
    "CBCRobustLoss",
    "CertifiedPrototypes",
    "ClassificationByComponents",
    "ComponentLogits",
    "Components",
    "Explanation",
    "PrototypeRBF",
    "RadiusReport",
    "Reasoning",
    "alignment_loss",
    "cbc_radius",
    "certify_prototypes",
    "kmeans",
    "presence_loss",
    "rbf_radius",
]
