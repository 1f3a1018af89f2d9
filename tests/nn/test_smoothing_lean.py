"""The lean form of a network: the same function to rounding where the chain is known, the model itself everywhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from surefoot.certified.dual_smoothing import DualSmoothedClassifier, HalfClassifier
from surefoot.errors import InvalidInput
from surefoot.nn import smoothing as sm
from surefoot.nn.masks import checkerboard_split
from surefoot.nn.smoothing.lean import lean, split


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


def nested(channels: int = 1, classes: int = 4, seed: int = 0) -> nn.Sequential:
    """Nested Sequentials, one ReLU used three times, batch-norms with statistics, one of them without a convolution before it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        relu = nn.ReLU()
        stem = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), relu)
        body = nn.Sequential(
            nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8, affine=False), relu, Residual(8), nn.BatchNorm2d(8)
        )
        net = nn.Sequential(stem, body, relu, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.normal_()
                part.running_var.uniform_(0.1, 3.0)
        net.eval()
        with torch.no_grad():  # no class far ahead of the others: votes are to be spread, so that differences show
            net[-1].bias -= net(0.5 + torch.randn(200, channels, 8, 8)).mean(0)
    return net


def perceptron() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 4)).eval()


def opaque(model: nn.Module) -> Any:
    """The same model as a plain function, of which nothing is known."""
    return lambda z: model(z)


def reflecting() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")
        return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 4)).eval()


NETS = {
    "reflecting": reflecting,
    "nested": nested,
    "perceptron": perceptron,
    "half": lambda: HalfClassifier(nested(), checkerboard_split((8, 8))[0]).eval(),
    "half, pooled fill": lambda: HalfClassifier(nested(), checkerboard_split((8, 8))[1], "max_pool").eval(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(NETS))
def test_the_lean_form_and_its_parts_give_the_same_logits(name: str, dtype: torch.dtype) -> None:
    net = NETS[name]().to(dtype)
    before = copy.deepcopy(net.state_dict())
    x, e = (torch.randn(9, 1, 8, 8, generator=rng(seed), dtype=dtype) for seed in (1, 2))
    tight: Any = {"rtol": 1e-11, "atol": 1e-11} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    with torch.inference_mode():
        expected = net(x + e)
        leaner: Any = lean(net, x)
        assert leaner is not net
        torch.testing.assert_close(leaner(x + e), expected, **tight)
        parts = split(leaner, x)
        clean = parts.linear(x) if parts.bias is None else parts.linear(x) + parts.bias
        torch.testing.assert_close(parts.rest(clean + parts.linear(e)), expected, **tight)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_batch_norms_are_folded_and_first_steps_found() -> None:
    leaner: Any = lean(nested(), torch.zeros(1, 1, 8, 8))
    kinds = [type(step).__name__ for step in leaner]
    assert kinds == [
        "Conv2d",
        "ReLU",
        "Conv2d",
        "ReLU",
        "Residual",
        "BatchNorm2d",
        "ReLU",
        "AdaptiveAvgPool2d",
        "Flatten",
        "Linear",
    ]
    assert [step.inplace for step in leaner if isinstance(step, nn.ReLU)] == [True] * 3
    assert len(split(leaner, torch.zeros(1, 1, 8, 8)).rest) == 9  # type: ignore[arg-type]
    half = lean(NETS["half"](), torch.zeros(1, 1, 8, 8))
    assert len(split(half, torch.zeros(1, 1, 8, 8)).rest) == 9  # type: ignore[arg-type]  # behind a linear fill
    pooled: Any = lean(NETS["half, pooled fill"](), torch.zeros(1, 1, 8, 8))
    assert split(pooled, torch.zeros(1, 1, 8, 8)).rest is pooled  # a maximum is not linear


class Mine(nn.Sequential):
    """A subclass may do anything."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OtherHalf(HalfClassifier):
    """Inherits `lean_steps`, which says nothing about this forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.flatten(1)[:, :4]


class Lure(nn.Module):
    """Attributes with names that other people use, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.is_linear = nn.Linear(64, 64), True

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)).relu()


def hooked(name: str) -> nn.Module:
    net = nested()
    getattr(net[0][0], name)(lambda *_: None)  # type: ignore[index]
    return net


def untouchable() -> dict[str, nn.Module]:
    patched, weighted = perceptron(), perceptron()
    patched[1].forward = lambda z: z[:, :7] ** 2  # type: ignore[method-assign]
    parametrizations.weight_norm(weighted[1])
    return {
        "pre-hook": hooked("register_forward_pre_hook"), "hook": hooked("register_forward_hook"), "subclass": Mine(*nested()),
        "other half": OtherHalf(nested(), checkerboard_split((8, 8))[0]), "lure": nn.Sequential(Lure(), nn.Linear(64, 4)),
        "patched": patched, "weight norm": weighted,
    }  # fmt: skip


@pytest.mark.parametrize("name", list(untouchable()))
def test_a_first_step_that_is_not_known_is_not_taken_apart(name: str) -> None:
    net = untouchable()[name].eval()
    x = torch.zeros(1, 1, 8, 8)
    leaner: Any = lean(net, x)
    assert split(leaner, x).rest is leaner


@pytest.mark.parametrize("name", list(untouchable()))
def test_such_models_get_the_votes_of_the_ordinary_way(name: str) -> None:
    net = untouchable()[name].double().eval()
    x = torch.rand(3, 1, 8, 8, generator=rng(), dtype=torch.float64)
    options = {"sigma": 0.5, "num_classes": 4, "batch_size": 50, "shared": True}
    expected = sm.vote_counts(opaque(net), x, 120, generator=rng(1), **options)
    assert torch.equal(sm.vote_counts(net, x, 120, generator=rng(1), **options), expected)


def test_a_hook_anywhere_is_called_as_often_as_before() -> None:
    net, seen = nested(), []
    net[1][1].register_forward_hook(lambda _m, z, _y: seen.append(len(z[0])))  # type: ignore[index]
    x = torch.rand(2, 1, 8, 8, generator=rng())
    sm.vote_counts(net, x, 40, sigma=0.5, num_classes=4, generator=rng(), batch_size=40, shared=True)
    assert sum(seen) == 80


def test_what_a_hook_keeps_is_not_overwritten() -> None:
    """Planted mistake: a ReLU in place behind a step whose hook holds on to its output."""
    net, kept = nested().double(), []
    net[1][1].register_forward_hook(lambda _m, _z, y: kept.append(y))  # type: ignore[index]
    x = torch.rand(2, 1, 8, 8, generator=rng(), dtype=torch.float64)
    with torch.inference_mode():
        lean(net, x)(x)
    assert (kept[0] < 0).any()


@pytest.mark.parametrize("kind", ["no statistics", "training", "autocast", "half precision", "global hook"])
def test_what_is_not_plain_evaluation_on_a_cpu_is_left_alone(kind: str) -> None:
    net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh()).eval(), torch.rand(2, 1, 8, 8)
    if kind == "no statistics":
        net[1] = nn.BatchNorm2d(4, track_running_stats=False).eval()
    if kind == "training":
        net.train()
    if kind in ("no statistics", "training"):
        leaner: Any = lean(net, x)
        assert leaner[1] is net[1]
    elif kind == "half precision":
        assert lean(net.bfloat16(), x.bfloat16()) is net
    elif kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert lean(net, x) is net
            assert split(net, x).rest is net
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            assert lean(net, x) is net
        finally:
            handle.remove()


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [8, 24])  # 24: channels last
def test_votes_are_those_of_a_model_nothing_is_known_of(size: int, shared: bool, batch: int) -> None:
    net = nested(channels=2).double()
    x = torch.rand(5, 2, size, size, generator=rng(), dtype=torch.float64)
    options = {"sigma": 0.7, "num_classes": 4, "batch_size": batch, "shared": shared}
    got = sm.vote_counts(net, x, 61, generator=rng(3), **options)
    assert torch.equal(got, sm.vote_counts(opaque(net), x, 61, generator=rng(3), **options))
    assert (got.sum(1) == 61).all()
    assert (got > 0).sum() > 5  # votes are spread, so that a difference could show


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [8, 24])
def test_both_halves_get_the_votes_they_get_alone(size: int, shared: bool) -> None:
    """The same network twice, ReLUs in place and noise in common: neither half may see what the other has left behind."""
    net = nested().double()
    dual = DualSmoothedClassifier(net, net, sigma=0.4, sigma_right=0.9, num_classes=4, shape=(size, size)).double()
    x = torch.rand(3, 1, size, size, generator=rng(), dtype=torch.float64)
    got = dual.vote_counts(x, 70, generator=rng(2), batch_size=32, shared=shared)
    sigma = torch.where(dual.left.mask, 0.4, 0.9)
    options: Any = {"sigma": sigma, "num_classes": 4, "batch_size": 32, "shared": shared}
    for view, half in enumerate((dual.left, dual.right)):
        assert torch.equal(got[view], sm.vote_counts(opaque(half), x, 70, generator=rng(2), **options))


def test_noise_on_dropped_pixels_reaches_no_half_taken_apart() -> None:
    half = NETS["half"]()
    parts = split(lean(half, torch.zeros(1, 1, 8, 8)), torch.zeros(1, 1, 8, 8))
    e, other = torch.randn(2, 20, 1, 8, 8, generator=rng())
    assert torch.equal(parts.linear(e), parts.linear(torch.where(half.mask, e, other)))


def test_many_inputs_with_large_features_go_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from surefoot.nn.smoothing import sampling

    net, x = nested().double(), torch.rand(4, 1, 8, 8, generator=rng(), dtype=torch.float64)
    options = {"sigma": 0.7, "num_classes": 4, "shared": True}
    got = sm.vote_counts(net, x, 50, generator=rng(3), **options)
    monkeypatch.setattr(sampling, "MOST_FEATURES", 1)
    assert torch.equal(got, sm.vote_counts(net, x, 50, generator=rng(3), **options))


def test_infinite_logits_are_told_and_large_ones_are_not() -> None:
    options: Any = {"sigma": 1.0, "num_classes": 2, "generator": rng()}
    x = torch.zeros(1, 2)
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(InvalidInput, match="NaN or infinite logits"):
            sm.vote_counts(lambda z, bad=bad: torch.stack([z[:, 0], torch.full_like(z[:, 0], bad)], 1), x, 5, **options)
    huge = torch.tensor([[3e38, -3e38]])
    assert sm.vote_counts(lambda z: huge.expand(len(z), 2), x, 5, **options).tolist() == [[5, 0]]
    counts = sm.vote_counts(lambda z: z.bfloat16(), x, 50, **options)  # what a model gives under autocast
    assert counts.sum() == 50


def test_under_autocast_the_votes_are_the_models_own() -> None:
    net, x = nested(), torch.rand(2, 1, 8, 8, generator=rng())
    options: Any = {"sigma": 0.5, "num_classes": 4, "shared": True, "batch_size": 64}
    with torch.autocast("cpu", torch.bfloat16):
        got = sm.vote_counts(net, x, 100, generator=rng(1), **options)
        assert torch.equal(got, sm.vote_counts(opaque(net), x, 100, generator=rng(1), **options))


class Keeping(nn.Module):
    """Holds on to what it gives, as a cache or a constant would."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = 2 * x
        return self.kept


@pytest.mark.parametrize("between", [nn.Flatten, nn.Identity, nn.Dropout])
def test_a_relu_behind_a_view_of_what_a_step_keeps_makes_a_new_tensor(between: Any) -> None:
    keeping = Keeping()
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), keeping, between(), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(8, 4, generator=rng())
    leaner: Any = lean(net, x)
    with torch.inference_mode():
        torch.testing.assert_close(leaner(x), net(x))
        leaner(x)
    assert (keeping.kept < 0).any()


class Tripled(nn.Module):
    is_linear_map = True

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x.flip(-1)


def test_linear_steps_ahead_of_the_first_layer_are_part_of_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nn.Sequential(Tripled(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
        convolved = nn.Sequential(Tripled(), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    x, e = (torch.randn(6, 1, 4, 4, generator=rng(seed)) for seed in (1, 2))
    for net in (dense, convolved):
        parts = split(lean(net, x), x)
        assert parts.bias is not None
        with torch.inference_mode():
            whole = parts.rest(parts.linear(x) + parts.bias + parts.linear(e))
            torch.testing.assert_close(whole, net(x + e), rtol=1e-4, atol=1e-5)
