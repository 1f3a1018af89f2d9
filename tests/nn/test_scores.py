import math

import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.nn.scores import el2n, error_l1, margins

SURE = 60.0


def test_el2n_worked_numbers():
    uniform = torch.zeros(1, 10, dtype=torch.float64)
    assert el2n(uniform, torch.tensor([3])).item() == pytest.approx(0.948683, abs=1e-6)
    sure = SURE * torch.eye(3, dtype=torch.float64)
    assert el2n(sure, torch.tensor([0, 1, 2])).abs().max().item() == pytest.approx(0.0, abs=1e-12)
    assert el2n(sure, torch.tensor([1, 2, 0])).tolist() == pytest.approx([math.sqrt(2)] * 3)


def test_mean_of_scores_is_not_the_score_of_the_mean():
    runs = SURE * torch.eye(3, dtype=torch.float64)[[1, 2]].unsqueeze(1)  # two runs of one example, y = 0
    y = torch.tensor([0])
    assert el2n(runs, y).mean(0).item() == pytest.approx(1.414214, abs=1e-6)
    mean_logits = runs.softmax(-1).mean(0).clamp_min(1e-300).log()
    assert el2n(mean_logits, y).item() == pytest.approx(1.224745, abs=1e-6)


def test_closed_forms_and_class_permutation():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 50, 7, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 7, (50,), generator=generator)
    right = logits.softmax(-1).gather(-1, y.expand(4, 50).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(error_l1(logits, y), 2 * (1 - right))
    torch.testing.assert_close(margins(logits, y, reduce="sum"), 1 - 7 * right)
    wrong = margins(logits, y) > 0
    assert torch.equal(wrong, logits.argmax(-1) != y)
    order = torch.randperm(7, generator=generator)
    for score in (el2n, error_l1, margins):
        torch.testing.assert_close(score(logits[..., order], order.argsort()[y]), score(logits, y))


@pytest.mark.parametrize("score", [el2n, error_l1, margins])
def test_bad_input_is_one_sentence(score):
    logits = torch.zeros(2, 3)
    with pytest.raises(InvalidInput, match="labels for 2 rows"):
        score(logits, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InvalidInput, match=r"\[0, 3\)"):
        score(logits, torch.tensor([0, 3]))
    with pytest.raises(InvalidInput, match="int64"):
        score(logits, torch.zeros(2))
    with pytest.raises(InvalidInput, match="not finite in row 1"):
        score(torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]), torch.tensor([0, 1]))
