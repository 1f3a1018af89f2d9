"""NaTra: train an image classifier on realistic changes (light, style, pose) that a generative model knows.

Pixel noise does not cover what lighting or pose do to a photo; a generator G trained on *unlabelled* images of the domain does.
Four steps, each a plain function:

    codes       invert_batch            z_i with G(z_i) ~ x_i for the whole data set at once (BIES), N codes an image
                                        composed by channel weights (LCE); the PSNR of each image is kept
    directions  attribute_directions    v_k along which G's features change most, without labels (UADM)
                filter_directions       ... and a reference classifier's answer does not
    transform   NaturalTransformation   x(a) = G(z + sum_k a_k scale_k v_k), |a_k| <= alpha_max, in standard deviations
    training    natural_attack,         a* = argmax_a CE(f(x(a)), y) by a few steps in the k amounts, then
                train_natra             min CE(f(x), y) + lambda CE(f(x(a*)), y)

Codes are found once and kept by the example's index; training then costs decoder passes, not inversions. The generator
may be any `nn.Sequential` or an object with `split(layer)`; `surefoot.models.generators` trains a small one in seconds.

What it needs: unlabelled images that *show* the changes the classifier is to survive. A generator trained on the
labelled images alone knows no others, and the method then gains little. What to look at: the PSNR of the codes (an image below the
floor is not moved), the filter's report, and `realism` (moved images that are far from every real one are artefacts).

Source: Wang et al., "Robust Training Using Natural Transformation", 2021, arXiv 2105.04070. No public code was found:
the four steps and their names are the paper's; the two stages of the shift, the filter's thresholds, whitened directions, the
per-direction reach and the residual transfer are this library's reading of it.
"""

from surefoot.adversarial.natra.backend import compose, first_affine, split_generator
from surefoot.adversarial.natra.directions import (
    DirectionReport,
    Directions,
    attribute_directions,
    filter_directions,
)
from surefoot.adversarial.natra.inversion import LatentCodes, invert_batch, psnr, train_encoder
from surefoot.adversarial.natra.transform import (
    NaturalAttack,
    NaturalTransformation,
    Realism,
    natra_loss,
    natural_attack,
    realism,
    train_natra,
)
from surefoot.adversarial.natra.treatment import NaTra, train_reference

__all__ = [
    "DirectionReport",
    "Directions",
    "LatentCodes",
    "NaTra",
    "NaturalAttack",
    "NaturalTransformation",
    "Realism",
    "attribute_directions",
    "compose",
    "filter_directions",
    "first_affine",
    "invert_batch",
    "natra_loss",
    "natural_attack",
    "psnr",
    "realism",
    "split_generator",
    "train_encoder",
    "train_natra",
    "train_reference",
]
