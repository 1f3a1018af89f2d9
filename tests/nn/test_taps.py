"""Layer taps: what they read, what they leave alone, and which layers they find in unlike networks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from surefoot.errors import InvalidInput
from surefoot.models import Normalized, mlp, small_cnn
from surefoot.models.networks import small_resnet
from surefoot.nn.taps import layer_names, spread, tapped


class Functional(nn.Module):
    """ReLUs and a join that no module shows."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.head = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Linear(4, 5),
        )

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + F.relu(self.branch(x))
        return self.head(x.mean((2, 3)))


class TinyViT(nn.Module):
    """Patch embedding by a convolution, two encoder layers, mean of the tokens."""

    def __init__(self, side=8, channels=1, width=16, classes=5):
        super().__init__()
        self.patch = nn.Conv2d(channels, width, 2, 2)
        self.place = nn.Parameter(torch.zeros(1, (side // 2) ** 2, width))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 2, 32, 0.0, batch_first=True) for _ in range(2))
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.blocks(tokens).mean(1))


def test_taps_read_what_the_layers_give_and_carry_gradients():
    model = small_cnn((1, 8, 8), 10).eval()
    x = torch.rand(3, 1, 8, 8, requires_grad=True)
    output, (first, second) = tapped(model, ["2", "5"], x)
    assert torch.equal(output, model(x)) and torch.equal(first, model[:3](x)) and torch.equal(second, model[:6](x))
    assert torch.autograd.grad(second.sum(), x)[0].abs().sum() > 0
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_are_taken_off_when_the_model_fails():
    model = small_cnn((1, 8, 8), 10)
    with pytest.raises(RuntimeError):
        tapped(model, ["2"], torch.rand(3, 2, 8, 8))
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: small_cnn((1, 8, 8), 10), ("2", "5", "10", "12")),
        (lambda: Normalized(small_cnn((1, 8, 8), 10), [0.5], [0.5]), ("model.2", "model.5", "model.10", "model.12")),
        (lambda: mlp((64,), 10), ("2", "4")),
        (Functional, ("stem", "branch")),
    ],
)  # fmt: skip
def test_layers_end_with_their_activation(build, expected):
    model = build()
    x = (
        torch.rand(2, 64)
        if isinstance(model[0] if isinstance(model, nn.Sequential) else model, nn.Flatten)
        else torch.rand(2, 1, 8, 8)
    )
    before, flags = torch.get_rng_state(), [m.training for m in model.modules()]
    assert layer_names(model, x) == expected
    assert torch.equal(before, torch.get_rng_state()) and flags == [m.training for m in model.modules()]


def test_residual_blocks_and_encoder_layers_are_layers():
    x = torch.rand(2, 1, 8, 8)
    names = layer_names(small_resnet((1, 8, 8), 10), x)
    assert {"3", "4"} <= set(names)  # blocks, after their join
    vit = TinyViT()
    names = layer_names(vit, x)
    assert {"blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm2"} <= set(names) and "head" not in names
    _, taps = tapped(vit.eval(), names, x)
    assert all(len(t) == 2 for t in taps)


def test_unknown_and_unused_layers_are_named():
    model = small_cnn((1, 8, 8), 10)
    with pytest.raises(InvalidInput, match="no layer 'conv9'"):
        tapped(model, ["conv9"], torch.rand(1, 1, 8, 8))
    model.idle = nn.Linear(1, 1)
    model.forward = lambda input: nn.Sequential(*list(model)[:-1])(input)
    with pytest.raises(InvalidInput, match="idle takes no part"):
        tapped(model, ["idle"], torch.rand(1, 1, 8, 8))
    rnn = nn.Sequential(nn.Flatten(2), nn.LSTM(64, 4))
    with pytest.raises(InvalidInput, match="returns tuple"):
        tapped(rnn, ["1"], torch.rand(1, 1, 8, 8))


def test_spread_is_even_and_keeps_the_last():
    assert spread("abcdef", 3) == ("b", "d", "f") and spread("ab", 5) == ("a", "b")
