"""Random pruning before training: draw a mask once, with well-chosen densities per layer, and train sparse from the start.

It is the honest baseline of every other pruning method, and on wide networks often as good as the dense model.

    w <- w * m after every optimizer step, g <- g * m before it (so momentum stays zero there), m fixed for good

With global density D, layer sizes n_l and raw ratios r_l the densities d_l = min(1, eps r_l) meet sum d_l n_l = D sum n_l:

    uniform        d_l = D                              ER    r_l = (n_out + n_in) / (n_out n_in)
    uniform_plus   first convolution dense, last linear layer at max(.2, D), the rest share one density
    ERK            r_l = sum(shape) / prod(shape)       ERK_plus   ERK, the last linear layer at a density of its own
    snip, grasp    shares of the largest |w dL/dw|, or the smallest -w (H dL/dw), on one batch; positions drawn anew

(ERK makes depthwise convolutions nearly dense, as their n_in is 1.) Maskable are the weights of convolution and linear layers;
biases and norms never are. Masks are buffers `<name>_mask` beside their weights while training and are gone afterwards.

In your own loop:

    handle = random_prune_(model, 0.2, rule="erk", generator=generator).attach(optimizer)
    ...                                  # train as always
    model = handle.remove()              # a plain model with the same zeros

Source: Shiwei Liu, Tianlong Chen, Xiaohan Chen, Li Shen, Decebal Constantin Mocanu, Zhangyang Wang, Mykola Pechenizkiy, "The
Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training", ICLR 2022,
arXiv 2202.02643. ER: Mocanu et al. 2018, arXiv 1707.04780. ERK: Evci et al. 2020, arXiv 1911.11134. SNIP: Lee et al. 2019,
arXiv 1810.02340. GraSP: Wang et al. 2020, arXiv 2002.07376.
"""

from surefoot.sparsity.random_pruning.densities import (
    layer_densities,
    maskable_weights,
    score_masks,
    weight_scores,
)
from surefoot.sparsity.random_pruning.masks import (
    MaskHandle,
    SparsityReport,
    apply_masks_,
    finalize_,
    random_masks,
    random_prune_,
    sparsity_report,
)
from surefoot.sparsity.random_pruning.treatment import RandomPruning

__all__ = [
    "MaskHandle",
    "RandomPruning",
    "SparsityReport",
    "apply_masks_",
    "finalize_",
    "layer_densities",
    "maskable_weights",
    "random_masks",
    "random_prune_",
    "score_masks",
    "sparsity_report",
    "weight_scores",
]
