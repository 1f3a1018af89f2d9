"""CrossMax: a classifier as a multi-resolution self-ensemble, its votes aggregated so that none can win by being extreme.

    Z <- Z - max_k Z          per predictor, over classes            Z [B, N, K]: logits of N predictors
    Z <- Z - max_n Z          per class, over predictors
    out_k = median (or k-th largest) over predictors

The predictors are probes on hidden layers and the network's own head (`SelfEnsemble`), or any models (`crossmax` on their stacked
logits). The network may see the image at several resolutions at once, shifted, recoloured and noised afresh at every pass
(`MultiResolutionInput`, `MultiResolutionClassifier`, `widen_first_conv`). Layers are tapped by hooks, in any CNN or transformer.

What this defends against is in dispute. The paper reports 72 % (CIFAR-10) and 48 % (CIFAR-100) against AutoAttack at 8/255 without
adversarial training. Zhang et al. (2024, arXiv 2411.14834) find gradient masking, from the randomness and from the order statistics
(whose gradient is sparse), and 11 % and 14 % against adaptive attacks. So never give one number: `evaluate_crossmax` puts the
published kind of evaluation and the adaptive one side by side. What it offers besides are perceptually aligned gradients
(`pixel_optimize`) and some hardening against simple and transferred attacks. For worst-case robustness train adversarially.

- `crossmax`, `break_ties`, `mean_log_probs`: aggregation
- `MultiResolutionInput`, `MultiResolutionClassifier`, `widen_first_conv`: the stochastic input
- `SelfEnsemble`, `fit_probes`: the ensemble of layers
- `evaluate_crossmax`, `DisputedRobustnessReport`, `pixel_optimize`: evaluation
- `CrossMax`: the treatment

Source: Fort & Lakshminarayanan, "Ensemble everything everywhere: Multi-scale aggregation for adversarial robustness", 2024,
arXiv 2408.05446.
"""

from surefoot.adversarial.crossmax.aggregation import break_ties, crossmax, mean_log_probs
from surefoot.adversarial.crossmax.ensemble import SelfEnsemble, fit_probes
from surefoot.adversarial.crossmax.evaluation import DisputedRobustnessReport, evaluate_crossmax, pixel_optimize
from surefoot.adversarial.crossmax.inputs import MultiResolutionClassifier, MultiResolutionInput, widen_first_conv
from surefoot.adversarial.crossmax.treatment import CrossMax

__all__ = [
    "CrossMax",
    "DisputedRobustnessReport",
    "MultiResolutionClassifier",
    "MultiResolutionInput",
    "SelfEnsemble",
    "break_ties",
    "crossmax",
    "evaluate_crossmax",
    "fit_probes",
    "mean_log_probs",
    "pixel_optimize",
    "widen_first_conv",
]
