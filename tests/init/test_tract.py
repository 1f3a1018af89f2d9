from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F

from surefoot.core.task import Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, Refused, UnsupportedOp
from surefoot.init.tract import (
    TrAct,
    TrActConv2d,
    TrActLinear,
    apply_tract,
    apply_tract_,
    first_layer,
    tract,
    tract_weight_grad,
    unapply_tract,
)
from surefoot.models.networks import Normalized, mlp, small_cnn
from surefoot.nn.patches import patch_moment
from surefoot.training.loop import fit


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def layer_grads(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Weight, bias and input gradient, and the output, for the upstream gradient `g`."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    z = layer(x)
    z.backward(g)
    bias: Any = layer.bias
    assert isinstance(layer.weight, Tensor) and layer.weight.grad is not None and x.grad is not None
    return layer.weight.grad.clone(), None if bias is None else bias.grad.clone(), x.grad, z.detach()


# --- the formula ------------------------------------------------------------------------------------------------------


def test_worked_example() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    g = torch.tensor([[0.5], [-0.25]], dtype=torch.float64)
    assert torch.allclose(x.T @ x / 2, torch.tensor([[5.0, -0.5], [-0.5, 2.5]], dtype=torch.float64))
    grad = tract_weight_grad(x, g, 0.1)
    assert torch.allclose(grad, torch.tensor([[-0.001922, 0.480400]], dtype=torch.float64), atol=5e-7)


def test_one_sample_divides_by_its_energy() -> None:
    x, g = torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    expected = torch.tensor([[0.392157, 0.0, 0.196078]], dtype=torch.float64)
    assert torch.allclose(tract_weight_grad(x, g, 0.1), expected, atol=5e-7)


@pytest.mark.parametrize("rows", [5, 6, 7, 20])
def test_limits_in_lambda(rows: int) -> None:
    x, g = draw(rows, 6), draw(rows, 3, seed=1)
    far = 1e6 * tract_weight_grad(x, g, 1e6)
    assert (far - g.T @ x).norm() < 1e-4 * (g.T @ x).norm()
    near = x @ tract_weight_grad(x, g, 1e-10).T
    projected = rows * (x @ torch.linalg.pinv(x) @ g)
    assert (near - projected).norm() < 1e-4 * projected.norm()


@pytest.mark.parametrize("rows", [7, 8, 9])
def test_both_sides_agree(rows: int) -> None:
    x, g, lam = draw(rows, 8), draw(rows, 3, seed=1), 0.1
    n_side = g.T @ x @ torch.linalg.inv(x.T @ x / rows + lam * torch.eye(8, dtype=torch.float64))
    k = x @ x.T / rows
    eye = torch.eye(rows, dtype=torch.float64)
    woodbury = g.T @ (eye - k @ torch.linalg.inv(k / lam + eye) / lam) @ x / lam
    assert (n_side - woodbury).abs().max() < 1e-8
    assert (tract_weight_grad(x, g, lam) - n_side).abs().max() < 1e-8
    layer = TrActLinear(8, 3, dtype=torch.float64)
    assert (layer_grads(layer, x, g)[0] - n_side).abs().max() < 1e-8


def test_small_batches_keep_precision_in_float32() -> None:
    x, g = draw(16, 300), draw(16, 4, seed=1)
    layer = TrActLinear(300, 4, lam=1e-3)
    exact = tract_weight_grad(x, g, 1e-3)
    assert (layer_grads(layer, x.float(), g.float())[0].double() - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_agree_with_and_without_an_input_gradient(bias: bool) -> None:
    layer, x, g = TrActLinear(40, 3, bias=bias, dtype=torch.float64), draw(2, 5, 40), draw(2, 5, 3, seed=1)
    expected = tract_weight_grad(x.reshape(10, 40), g.reshape(10, 3))
    assert torch.allclose(layer_grads(layer, x, g)[0], expected, atol=1e-12)
    layer.zero_grad()
    z = layer(x)
    z.backward(g)
    assert torch.equal(z, F.linear(x, layer.weight, layer.bias))
    assert layer.weight.grad is not None and torch.allclose(layer.weight.grad, expected, atol=1e-12)
    if bias:
        assert layer.bias.grad is not None and torch.allclose(layer.bias.grad, g.sum((0, 1)), atol=1e-12)
    with pytest.raises(UnsupportedOp, match="create_graph"):
        torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)


def test_rotation_equivariance_and_contrast_invariance() -> None:
    x, g = draw(20, 6), draw(20, 3, seed=1)
    q = torch.linalg.qr(draw(6, 6, seed=2)).Q
    assert torch.allclose(tract_weight_grad(x @ q, g), tract_weight_grad(x, g) @ q, atol=1e-12)
    move = [c * x @ tract_weight_grad(c * x, g, 1e-10).T for c in (1.0, 5.0)]
    assert torch.allclose(move[0], move[1], rtol=1e-6)
    plain = [c * x @ (g.T @ (c * x)).T for c in (1.0, 5.0)]
    assert torch.allclose(25 * plain[0], plain[1])


def test_reference_output_of_the_authors() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, y = torch.randn(30, 8), torch.randn(30, 5)
        plain = nn.Linear(8, 5)
    layer = tract(copy.deepcopy(plain), 0.1)
    for module in (plain, layer):
        (y - module(x)).pow(2).mean().backward()
    assert round(layer.weight.grad[0, 0].item(), 4) == 0.0741  # type: ignore[index,union-attr]
    assert round(layer.bias.grad[0].item(), 4) == -0.1162  # type: ignore[index,union-attr]
    assert round(plain.weight.grad[0, 0].item(), 4) == 0.0715  # type: ignore[index]


# --- layers -----------------------------------------------------------------------------------------------------------


CONVS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "groups": 2, "padding": 1},
    {"kernel_size": 5, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
    {"kernel_size": 4, "stride": 4},
    {"kernel_size": 1},
    {"kernel_size": 2, "stride": 3, "bias": False},
]


def explicit_patches(layer: nn.Conv2d, x: Tensor) -> Tensor:  # [B H' W', C k k]
    pad = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    unfolded = F.unfold(F.pad(x, pad, mode=mode), layer.kernel_size, layer.dilation, 0, layer.stride)
    return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])


@pytest.mark.parametrize("small", [0, 1 << 18], ids=["rows", "whole"])
@pytest.mark.parametrize("options", CONVS, ids=str)
def test_conv_equals_explicit_unfold(options: dict, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surefoot.nn.patches.SMALL", small)
    plain = nn.Conv2d(4, 6, dtype=torch.float64, **options)
    layer = tract(copy.deepcopy(plain), 0.1)
    assert isinstance(layer, TrActConv2d)
    x = draw(3, 4, 9, 8)
    g = draw(*plain(x).shape, seed=1)
    weight, bias, to_input, z = layer_grads(layer, x, g)
    _, plain_bias, plain_input, plain_z = layer_grads(plain, x, g)
    assert torch.equal(z, plain_z) and torch.allclose(to_input, plain_input, atol=1e-12)
    assert (bias is None and plain_bias is None) or torch.allclose(bias, plain_bias, atol=1e-12)  # type: ignore[arg-type]
    patches = explicit_patches(plain, x).chunk(plain.groups, 1)
    grads = g.transpose(0, 1).reshape(6, -1).chunk(plain.groups, 0)
    expected = torch.cat([tract_weight_grad(a, b.T) for a, b in zip(patches, grads, strict=True)])
    assert torch.allclose(weight.reshape(6, -1), expected, atol=1e-10)
    moment, count = patch_moment(x, layer.patches())
    assert count == len(patches[0]) and torch.allclose(moment[0], patches[0].T @ patches[0], atol=1e-10)


def test_kernel_of_the_image_is_a_linear_layer_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x, g = TrActConv2d(2, 5, 3, dtype=torch.float64), draw(40, 2, 3, 3), draw(40, 5, seed=1)
    expected = tract_weight_grad(x.flatten(1), g)
    assert torch.allclose(layer_grads(conv, x, g[..., None, None])[0].flatten(1), expected, atol=1e-12)
    monkeypatch.setattr("surefoot.nn.patches.CHUNK", 100)
    assert torch.allclose(layer_grads(conv, x, g[..., None, None])[0].flatten(1), expected, atol=1e-12)


def test_linear_on_tokens_matches_flattened_rows_and_plain_elsewhere() -> None:
    plain = nn.Linear(6, 4, dtype=torch.float64)
    layer = tract(copy.deepcopy(plain))
    x = draw(6, 5, 7).transpose(0, 2)  # [7, 5, 6], not contiguous
    g = draw(7, 5, 4, seed=1)
    weight, bias, to_input, z = layer_grads(layer, x, g)
    _, plain_bias, plain_input, plain_z = layer_grads(plain, x, g)
    assert torch.equal(z, plain_z) and torch.equal(to_input, plain_input) and torch.equal(bias, plain_bias)  # type: ignore[arg-type]
    assert torch.allclose(weight, tract_weight_grad(x.reshape(-1, 6), g.reshape(-1, 4)), atol=1e-12)


def test_evaluation_mode_and_frozen_weights_are_plain() -> None:
    plain = nn.Conv2d(1, 3, 3)
    layer = tract(copy.deepcopy(plain)).eval()
    x, g = draw(2, 1, 6, 6).float(), draw(2, 3, 4, 4).float()
    assert torch.equal(layer_grads(layer, x, g)[0], layer_grads(plain, x, g)[0])
    layer.train().weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    x = x.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


def test_accumulation_adds_two_tract_gradients() -> None:
    layer, x, g = TrActLinear(4, 2, dtype=torch.float64), draw(20, 4), draw(20, 2, seed=1)
    for half in (slice(0, 10), slice(10, 20)):
        layer(x[half]).backward(g[half])
    halves = tract_weight_grad(x[:10], g[:10]) + tract_weight_grad(x[10:], g[10:])
    assert torch.allclose(layer.weight.grad, halves)  # type: ignore[arg-type]
    assert not torch.allclose(halves, tract_weight_grad(x, g), rtol=1e-3)


def test_all_zero_batch_and_huge_inputs_stay_finite() -> None:
    layer = TrActLinear(50, 3)
    assert torch.equal(layer_grads(layer, torch.zeros(8, 50), torch.ones(8, 3))[0], torch.zeros(3, 50))
    pixels = 255 * torch.rand(64, 50, generator=generator()).round()  # rank one up to noise, lam negligible
    assert layer_grads(layer, pixels.expand(64, 50), torch.ones(64, 3))[0].isfinite().all()


@pytest.mark.parametrize("rows", [40, 4])
def test_autocast_and_half_precision_solve_in_float32(rows: int) -> None:
    x, g = draw(rows, 6).float(), draw(rows, 3, seed=1).float()
    exact = tract_weight_grad(x, g)
    layer = TrActLinear(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
        assert z.dtype == torch.bfloat16
        z.backward(g.bfloat16())
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert (layer.weight.grad - exact).norm() < 0.02 * exact.norm()
    half = TrActLinear(6, 3, dtype=torch.bfloat16)
    grad = layer_grads(half, x.bfloat16(), g.bfloat16())[0]
    assert grad.dtype == torch.bfloat16 and (grad.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("kind", ["linear", "few rows", "conv"])
def test_compiled_equals_eager(kind: str) -> None:
    layer = TrActConv2d(1, 3, 3, stride=2) if kind == "conv" else TrActLinear(6, 3)
    x = draw(4, 1, 9, 9).float() if kind == "conv" else draw(5 if kind == "few rows" else 20, 6).float()
    expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(torch.autograd.grad(compiled(x).square().sum(), layer.weight)[0], expected, rtol=1e-5)


def test_layer_hooks_still_run() -> None:
    layer, seen = nn.Linear(3, 2), []
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    tract(layer)(torch.ones(4, 3)).sum().backward()
    assert seen == ["forward", "backward"]


def _average(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, g = draw(24, 4), draw(24, 2, seed=1)
    layer = TrActLinear(4, 2, dtype=torch.float64, sync=True)
    mine = slice(0, 8) if rank == 0 else slice(8, 24)
    layer(x[mine]).backward(g[mine])
    assert layer.weight.grad is not None
    torch.distributed.all_reduce(layer.weight.grad)
    assert torch.allclose(layer.weight.grad, tract_weight_grad(x, g), atol=1e-12)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has touched CUDA cannot be forked")
def test_synchronised_ranks_equal_one_process(tmp_path: Path) -> None:
    start_processes(_average, (str(tmp_path),), nprocs=2, start_method="fork")


# --- models -----------------------------------------------------------------------------------------------------------


class Backwards(nn.Module):
    """Declares its layers in the wrong order, and runs a linear layer on a constant table first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.position = nn.Linear(2, 8)
        self.table = nn.Parameter(torch.ones(1, 2))
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        offset = self.position(self.table)
        return self.head(self.stem(x).mean((2, 3)) + offset)


def test_first_layer_is_the_first_executed_on_the_input() -> None:
    x = torch.rand(2, 1, 8, 8, generator=generator())
    assert first_layer(Backwards(), x) == "stem.0"
    assert first_layer(Normalized(small_cnn((1, 8, 8), 10), [0.5], [0.2]), x) == "model.0"
    assert first_layer(mlp((1, 8, 8), 10), x) == "1"
    assert first_layer(nn.Linear(8, 2), x) == ""


def test_first_layer_leaves_the_model_untouched() -> None:
    model = small_cnn((1, 8, 8), 10)
    model[1].eval()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    first_layer(model, torch.rand(2, 1, 8, 8, generator=generator()))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert flags == [m.training for m in model.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_apply_and_unapply_round_trip() -> None:
    model, x = Backwards(), torch.rand(2, 1, 8, 8, generator=generator())
    wrapped = apply_tract(model, example_input=x)
    assert isinstance(wrapped.stem[0], TrActConv2d) and type(model.stem[0]) is nn.Conv2d
    assert list(wrapped.state_dict()) == list(model.state_dict())
    assert torch.equal(wrapped(x), model(x))
    assert "TrActConv2d" in repr(wrapped)
    weight = wrapped.stem[0].weight
    plain = unapply_tract(wrapped)
    assert type(plain.stem[0]) is nn.Conv2d and plain.stem[0].weight is weight and not hasattr(plain.stem[0], "lam")
    by_module = apply_tract(model, layer=model.head)
    assert isinstance(by_module.head, TrActLinear)
    assert isinstance(apply_tract(nn.Linear(3, 2), layer=""), TrActLinear)


class Odd(nn.Linear):
    pass


def test_bad_inputs_are_one_sentence() -> None:
    model, x = Backwards(), torch.rand(2, 1, 8, 8, generator=generator())
    for lam in (0.0, -1.0, float("nan")):
        with pytest.raises(InvalidInput, match="lam must be positive"):
            tract(nn.Linear(2, 2), lam)
        with pytest.raises(InvalidInput, match="lam must be positive"):
            tract_weight_grad(torch.ones(1, 1), torch.ones(1, 1), lam)
    for layer in (nn.Conv1d(1, 1, 3), nn.Conv3d(1, 1, 3), nn.BatchNorm2d(3), Odd(2, 2)):
        with pytest.raises(UnsupportedOp, match=type(layer).__name__):
            tract(layer)
    with pytest.raises(InvalidInput, match="complex"):
        tract(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(UnsupportedOp, match="uint8"):
        TrActLinear(2, 2)(torch.ones(1, 2, dtype=torch.uint8))
    with pytest.raises(InvalidInput, match="example_input"):
        apply_tract(model)
    with pytest.raises(InvalidInput, match="no layer named 'stom'"):
        apply_tract(model, layer="stom")
    with pytest.raises(InvalidInput, match="not a module of the model"):
        apply_tract(model, layer=nn.Linear(2, 2))
    with pytest.raises(UnsupportedOp, match="found no"):
        apply_tract(nn.Sequential(nn.Flatten()), example_input=x)
    with pytest.raises(Refused, match="already wrapped"):
        apply_tract(apply_tract(model, example_input=x), example_input=x)
    with pytest.raises(InvalidInput, match="grad_output"):
        tract_weight_grad(torch.ones(3, 2), torch.ones(2, 2))


def test_shared_and_frozen_layers_are_refused() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(Refused, match="shared"):
        apply_tract(nn.Sequential(layer, nn.ReLU(), layer), example_input=torch.ones(1, 4))
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    with pytest.raises(Refused, match="shared"):
        apply_tract(tied, example_input=torch.ones(1, 4))
    with pytest.raises(InvalidInput, match="requires a gradient"):
        apply_tract(nn.Sequential(nn.Linear(4, 4)).requires_grad_(False), example_input=torch.ones(1, 4))


def test_create_graph_is_refused_for_the_weight_and_exact_for_the_input() -> None:
    layer, x = TrActLinear(3, 2, dtype=torch.float64), draw(5, 3).requires_grad_()
    loss = layer(x).square().sum()
    with pytest.raises(UnsupportedOp, match="create_graph"):
        torch.autograd.grad(loss, layer.weight, create_graph=True)
    (to_input,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert torch.allclose(torch.autograd.grad(to_input.sum(), x)[0], (2 * layer.weight.T @ layer.weight).sum(0).expand_as(x))  # fmt: skip


# --- the treatment ----------------------------------------------------------------------------------------------------


def test_treatment_trains_and_returns_a_plain_model() -> None:
    task = digits(0, sizes=(200, 50, 50))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Normalized(small_cnn((1, 8, 8), 10), [0.3], [0.37])
    treatment, training = TrAct(), Training(epochs=1, optimizer="sgd", lr=0.05)
    before = copy.deepcopy(model.state_dict())
    runs = [fit(model, task, training, [treatment]) for _ in range(2)]
    control = fit(model, task, training)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    assert not torch.allclose(states[0]["model.0.weight"], control.model.state_dict()["model.0.weight"])
    assert [type(m) for m in runs[0].model.modules()] == [type(m) for m in model.modules()]
    used = runs[0].treatments[0]
    assert isinstance(used, TrAct) and used.layer_ == "model.0" and treatment.layer_ == ""
    assert used.grad_norms_[0] > 0 and used.grad_norms_[1] > 0
    copied = TrAct()
    copied.load_state_dict(used.state_dict())
    assert copied.grad_norms_ == used.grad_norms_
    assert json.loads(json.dumps(treatment.settings())) == {"lam": 0.1, "layer": None, "sync": False}


def test_treatment_follows_float64_and_a_named_layer() -> None:
    task = digits(0, sizes=(64, 20, 20))
    task = task.changed(train=type(task.train)(task.train.x.double(), task.train.y))
    model = mlp((1, 8, 8), 10, hidden=(16,)).double()
    run = fit(model, task, Training(epochs=1, optimizer="sgd", lr=0.01), [TrAct(layer="3")])
    assert run.treatments[0].layer_ == "3" and run.model[3].weight.dtype == torch.float64  # type: ignore[attr-defined,index,union-attr]
    with pytest.raises(InvalidInput, match="lam"):
        fit(model, task, Training(), [TrAct(lam=0.0)])


def test_first_weight_gradient_of_a_model_is_exact_and_the_rest_plain() -> None:
    model = mlp((8,), 3, hidden=(5, 4)).double()
    wrapped = apply_tract_(copy.deepcopy(model), example_input=torch.ones(1, 8, dtype=torch.float64))
    x, y = draw(30, 8), torch.arange(30) % 3
    for m in (model, wrapped):
        F.cross_entropy(m(x), y).backward()
    for (name, p), q in zip(model.named_parameters(), wrapped.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        if name == "1.weight":
            moment = x.T @ x / 30 + 0.1 * torch.eye(8, dtype=torch.float64)
            assert torch.allclose(q.grad, p.grad @ torch.linalg.inv(moment), atol=1e-12)
        else:
            assert torch.equal(p.grad, q.grad)


def test_treatment_reports_rows_per_input():
    """N / n of the first batch: 32 examples x 16 positions over 9 inputs of a 3x3 convolution with stride 2 on 8x8."""
    task = digits(0, sizes=(64, 20, 20))
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    run: Any = fit(model, task, Training(epochs=1, batch_size=32), [TrAct()])
    assert run.treatments[0].rows_per_input_ == pytest.approx(32 * 16 / 9)
