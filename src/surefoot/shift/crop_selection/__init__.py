"""Crop selection: a classifier that sees the same pixels when the camera moves by one.

A network looks at a window of the scene; one pixel of camera motion brings in new pixels on one side and loses some on the
other, and the decision may flip. Choose instead, within the window, the crop that scores highest under a fixed function of the
crop's own content, and classify that: as long as the best crop stays inside the window, the very same pixels are
classified. For a window H x W, crops h x w, a = H - h + 1 and b = W - w + 1 positions, N = ab:

    S(p)  = | sum_k K(k) grey(p + centre + k) |           K = 256 binomial(5) - binomial(9), integers, no padding
    p*    = argmax S, equal scores ordered by the crops' bytes
    f'(I) = f(crop(I, p*))

A shift (dy, dx) leaves M = (a - |dy|)(b - |dx|) crops shared. If the argmax of the union is uniform over positions,

    P(crop changes)           <= 2 (N - M) / (2N - M)           one pixel sideways: 2 / (b + 1)
    P(any of 8 neighbours)    <= 1 - (a - 2)(b - 2) / ((a + 2)(b + 2))

Integer arithmetic makes the score of a crop the same bit for bit wherever it lies; all cyclic positions instead of the inner ones
(`mode="cyclic"`) make the choice invariant to every cyclic shift. It pays when b is large (bound below the plain model's change rate)
*and* crops are nearly as informative as windows; where the best-scoring crop cuts the object it costs accuracy and gains nothing.

Source: Shifman and Weiss, "Lost in Translation: Modern Neural Networks Still Struggle With Small Realistic Image
Transformations", ECCV 2024, arXiv 2404.07153. The score and the bound's derivation are this library's.
"""

from surefoot.shift.crop_selection.selection import (
    content_ranks,
    crop_change_bound,
    crop_fooled_bound,
    crop_size_for_consistency,
    grey_levels,
    score_map,
    select_positions,
)
from surefoot.shift.crop_selection.translation import (
    TranslationConsistency,
    TranslationReport,
    translation_robustness,
    windows,
)
from surefoot.shift.crop_selection.wrapper import CropSelection, CropSelectionTreatment, RandomCrop

__all__ = [
    "CropSelection",
    "CropSelectionTreatment",
    "RandomCrop",
    "TranslationConsistency",
    "TranslationReport",
    "content_ranks",
    "crop_change_bound",
    "crop_fooled_bound",
    "crop_size_for_consistency",
    "grey_levels",
    "score_map",
    "select_positions",
    "translation_robustness",
    "windows",
]
