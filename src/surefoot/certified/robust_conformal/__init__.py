"""Prediction sets that keep their coverage when the input is under an L2 attack, with finitely many noise samples.

A base score s(x, y) in [0, 1] says how strange label y is for x; s(x + sigma e, y) averaged over noise is the smoothed score
S(x, y). Phi^-1(S) is 1/sigma-Lipschitz in L2, so an attack of size eps moves it by at most eps/sigma. RSCP (Gendler et al.
2022) widens split-conformal sets by that, but treats a Monte-Carlo mean as if it were S. **RSCP+** pays for the samples:

    tau   = the ceil((n + 1)(1 - alpha + 2 beta))-th smallest of the calibration means        (an order statistic, never interpolated)
    y in set  iff  Phi^-1(max(m - b_low, 0)) - eps/sigma <= Phi^-1(min(tau + b_up, 1))        m = mean of n_MC scores of (x, y)
    b_up  = sqrt(ln(1/beta) / (2 n_MC))                                                       Hoeffding, clean score above its mean
    b_low = sqrt(2 V ln(2/beta) / n_MC) + 7 ln(2/beta) / (3 (n_MC - 1))                       empirical Bernstein, or b_up again

and then P[y in set(x')] >= 1 - alpha for every x' with ||x' - x|| <= eps, over calibration data, test example and noise.
Calibration data are clean, the test noise is drawn after the attacker fixed x', and both use one scoring rule and one n_MC.

**PTT** makes the sets small: each score is replaced, before it is averaged, by its rank among held-out scores, made steep around
the quantile, Q(s) = sigmoid((rank(s) - b) / T). **RCT** trains the last layer for small robust sets directly.

RSCP+ alone often gives the full set, namely wherever tau + b_up >= 1: a mean score can never be certified to lie below 1.
The promise is marginal (over examples, not for each), and L2 only. Stronger sizes by other ideas: CAS, VRCP, BinCP (cited, not here).

Shapes: probabilities of noisy draws `[N, n_MC, K]`, scores `[N, K]`, sets bool `[N, K]`; everything after the network is float64.
Source: Yan, Romano & Weng, "Provably Robust Conformal Prediction with Improved Efficiency", ICLR 2024, arXiv 2404.19651.
RSCP: Gendler, Weng, Daniel & Romano, ICLR 2022. Empirical Bernstein: Maurer & Pontil 2009, arXiv 0907.3740. APS: Romano,
Sesia & Candes 2020, arXiv 2006.02544. Conformal training: Stutz et al. 2022, arXiv 2110.09192. Soft sort: Blondel et al. 2020, arXiv 2002.08871.
"""

from surefoot.certified.robust_conformal.attack import smooth_pgd
from surefoot.certified.robust_conformal.classifier import ConformalReport, RobustConformalClassifier
from surefoot.certified.robust_conformal.instrument import RobustSets
from surefoot.certified.robust_conformal.scores import (
    PostTrainingTransform,
    SmoothedScores,
    aps_score,
    average_scores,
    hps_score,
    noisy_probabilities,
    smooth_scores,
    true_label,
)
from surefoot.certified.robust_conformal.sets import (
    PredictionSets,
    bernstein_slack,
    calibrate,
    hoeffding_slack,
    robust_sets,
)
from surefoot.certified.robust_conformal.training import (
    RobustConformalLoss,
    RobustConformalTraining,
    robust_conformal_loss,
    soft_order_statistic,
    train_rct,
)

__all__ = [
    "ConformalReport",
    "PostTrainingTransform",
    "PredictionSets",
    "RobustConformalClassifier",
    "RobustConformalLoss",
    "RobustConformalTraining",
    "RobustSets",
    "SmoothedScores",
    "aps_score",
    "average_scores",
    "bernstein_slack",
    "calibrate",
    "hoeffding_slack",
    "hps_score",
    "noisy_probabilities",
    "robust_conformal_loss",
    "robust_sets",
    "smooth_pgd",
    "smooth_scores",
    "soft_order_statistic",
    "train_rct",
    "true_label",
]
