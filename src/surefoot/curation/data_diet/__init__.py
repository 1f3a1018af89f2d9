"""Data diet: score every training example after a few epochs, keep the ones that teach, suspect the ones that are wrong.

    GraNd_t(x, y) = E over runs || grad_w CE(f_{w_t}(x), y) ||_2          all parameters, evaluation mode
    EL2N_t(x, y)  = E over runs || softmax(f_{w_t}(x)) - onehot(y) ||_2

GraNd^2 = || sum_k (p_k - y_k) grad_w f_k ||^2, so that GraNd is proportional to EL2N where the logits' gradients are
orthogonal and of equal length. Train R models for t epochs, average the scores (not the probabilities), keep the highest
(1 - f) n, retrain from scratch *for the same number of steps*. The very highest scores are wrong labels first of all: skip
them by `offset`, or read them off with `suspected_noise`.

    report = score_runs(make_model, train_fn, data, runs=10, epoch=10)
    subset = data.take(report.keep_top(0.5))

What holds and what does not: EL2N after 10 to 20 epochs and GraNd later in training do; GraNd *at initialisation* follows the
norm of the input and prunes no better than chance (Kirsch 2023, arXiv 2303.14753), so epoch 0 brings a warning and each
report the rank correlation with the input norm. Pruning hard examples away from a task the model has not mastered hurts.

Source: Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training", NeurIPS
2021, arXiv 2107.07075. Forgetting: Toneva et al., ICLR 2019, arXiv 1812.05159.
"""

from surefoot.curation.data_diet.gradients import gradient_norms, layer_norms, loop_norms, vmap_norms
from surefoot.curation.data_diet.report import ScoreReport, Window
from surefoot.curation.data_diet.runs import (
    ForgettingTracker,
    el2n_scores,
    grand_scores,
    rank_correlation,
    score,
    score_runs,
    weight_hash,
)
from surefoot.curation.data_diet.treatment import DataDiet

__all__ = [
    "DataDiet",
    "ForgettingTracker",
    "ScoreReport",
    "Window",
    "el2n_scores",
    "gradient_norms",
    "grand_scores",
    "layer_norms",
    "loop_norms",
    "rank_correlation",
    "score",
    "score_runs",
    "vmap_norms",
    "weight_hash",
]
