"""Adaptive smoothing: an accurate and a robust classifier mixed, with most of both kept and a certificate inherited.

    f(x) = ln( (1 - a) softmax(s_g g(x)) + a softmax(s_h h(x)) )          g accurate, h robust, a in [0, 1]

Probabilities are mixed, not logits: a robust net is surer where it is right than where it is wrong, so that on clean inputs g
corrects h's low-margin errors, while under attack every point that h holds with a margin p1 - p2 >= (1 - a)/a keeps its class
whatever g says. That margin also carries h's certificate over to f. The weight is fixed, or a(x) in a bounded range comes from
a small mixing network that reads features of both nets and tells attacked inputs from clean ones. It adds no guarantee: an
attacker fools it too, so that it is trained against attacks on the whole composite and only its lower end is certified.

- `mix_log_probs`, `MixedClassifier`, `Amplified` (MixedNUTS's transform of h's logits), `Resized`: the fixed mixture
- `fit_alpha`, `confidence_gap`, `probability_margins`: choosing the weight, and whether the premise holds at all
- `mixed_radius`, `certify_mixed`, `required_margin`: certificates
- `MixingNetwork`, `AdaptiveSmoothingClassifier`, `train_mixing_network`, `attack_composite`: the adaptive mixture
- `trades_loss`, `AdversarialTraining`: robust nets to mix, and the strong baseline on the same trade-off
- `AdaptiveSmoothing`: the treatment

Attack a mixture end to end (`surefoot.nn.attacks.standard_suite`, `adaptive_suite`): attacks on h alone, or with a detached mixing
network, find less. Whether g is much more accurate than h has to be looked at first: where robust training costs little clean
accuracy, as on small grey digits, there is nothing for the mixture to win back.

Source: Bai, Anderson, Kim & Sojoudi, "Improving the Accuracy-Robustness Trade-Off of Classifiers via Adaptive Smoothing",
SIAM Journal on Mathematics of Data Science 2024, arXiv 2301.12554. MixedNUTS: Bai et al. 2024, arXiv 2402.02263.
TRADES: Zhang et al. 2019, arXiv 1901.08573. Adversarial training: Madry et al. 2018, arXiv 1706.06083.
"""

from surefoot.adversarial.adaptive_smoothing.certificate import certify_mixed, mixed_radius, required_margin
from surefoot.adversarial.adaptive_smoothing.mixing import (
    Amplified,
    GapReport,
    MixedClassifier,
    Resized,
    check_bases,
    confidence_gap,
    fit_alpha,
    mix_log_probs,
    probability_margins,
)
from surefoot.adversarial.adaptive_smoothing.network import AdaptiveSmoothingClassifier, MixingNetwork, feature_sizes
from surefoot.adversarial.adaptive_smoothing.training import (
    AdversarialTraining,
    attack_composite,
    trades_loss,
    train_mixing_network,
)
from surefoot.adversarial.adaptive_smoothing.treatment import AdaptiveSmoothing

__all__ = [
    "AdaptiveSmoothing",
    "AdaptiveSmoothingClassifier",
    "AdversarialTraining",
    "Amplified",
    "GapReport",
    "MixedClassifier",
    "MixingNetwork",
    "Resized",
    "attack_composite",
    "certify_mixed",
    "check_bases",
    "confidence_gap",
    "feature_sizes",
    "fit_alpha",
    "mix_log_probs",
    "mixed_radius",
    "probability_margins",
    "required_margin",
    "trades_loss",
    "train_mixing_network",
]
