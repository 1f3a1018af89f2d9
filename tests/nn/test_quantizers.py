"""Uniform affine quantizers: the grid, its ranges, and the straight-through gradients."""

import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.nn.quantizers import AffineQuantizer, codes, minmax_range, mse_range, quantize, round_through


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_worked_example_of_two_bits():
    x = torch.tensor([-0.9, -0.4, 0.0, 0.4, 0.9, 5.0])
    width, low = torch.tensor(3.0), torch.tensor(-1.2)  # step 1, lowest value -1
    assert codes(x, width, low, 2).tolist() == [0, 1, 1, 1, 2, 3]
    assert quantize(x, width, low, 2).tolist() == [-1.0, 0.0, 0.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_is_exact_and_quantization_is_idempotent(bits, dtype):
    x = draw(5, 40, seed=bits, dtype=dtype)
    quantizer = AffineQuantizer(bits, 5, dtype=dtype)
    quantizer.measure(x)
    with torch.no_grad():
        once = quantizer(x)
        assert torch.equal(quantizer(torch.zeros_like(x)), torch.zeros_like(x))
        assert torch.equal(quantizer(once), once)
        assert once.dtype == dtype
    # Inside the range the error is half a step; moving z to the grid costs up to half a step more at the ends.
    assert bool(((once - x).abs() <= quantizer.step[:, None] * 1.001).all())
    assert codes(x, quantizer.width, quantizer.low, bits).max() <= 2**bits - 1


def test_per_channel_equals_per_tensor_row_by_row():
    x = draw(4, 3, 3, 3)
    both = AffineQuantizer(3, 4)
    both.measure(x)
    for row in range(4):
        single = AffineQuantizer(3)
        single.measure(x[row])
        assert torch.equal(single(x[row]), both(x)[row])


def test_minmax_range_holds_zero_and_survives_constants():
    width, low = minmax_range(torch.tensor([2.0, 5.0]))
    assert (width.item(), low.item()) == (5.0, 0.0)
    width, low = minmax_range(torch.tensor([-2.0, -1.0]))
    assert (width.item(), low.item()) == (2.0, -2.0)
    quantizer = AffineQuantizer(4)
    quantizer.measure(torch.zeros(7))
    assert torch.equal(quantizer(torch.zeros(7)), torch.zeros(7))


def test_mse_range_is_never_worse_than_minmax_and_better_with_an_outlier():
    x = torch.cat([draw(2000), torch.tensor([30.0])])
    error = {}
    for name, (width, low) in {"minmax": minmax_range(x), "mse": mse_range(x, 3)}.items():
        error[name] = (quantize(x, width, low, 3) - x).square().mean().item()
    assert error["mse"] < 0.5 * error["minmax"]
    width, _ = mse_range(torch.arange(8.0), 3)  # already on the grid: the full range is kept
    assert width.item() == 7.0


def test_gradients_pass_straight_through_and_reach_the_range():
    x = torch.tensor([0.2, 1.4, 9.0], requires_grad=True)
    width, low = torch.tensor(3.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    quantize(x, width, low, 2).sum().backward()
    assert x.grad is not None and width.grad is not None and low.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0]  # clipped values carry none
    # d/ds of q s with the straight-through q: (0 - .2) + (1 - 1.4) + 3, and s = R / 3
    assert width.grad.item() == pytest.approx((-0.2 - 0.4 + 3.0) / 3, abs=1e-6)
    assert low.grad.item() == pytest.approx(1.0)  # only the clipped value moves with the grid


@pytest.mark.parametrize("channels", [None, 4])
def test_the_fused_gradient_is_that_of_the_equations(channels):
    x = draw(4, 30, dtype=torch.float64)
    shape = () if channels is None else (channels,)
    width, low = torch.full(shape, 2.0, dtype=torch.float64), torch.full(shape, -0.9, dtype=torch.float64)
    weight = draw(4, 30, seed=1, dtype=torch.float64)

    def plain(x, width, low):
        step = (width if channels is None else width[:, None]) / 7
        zero = round_through((low if channels is None else low[:, None]) / step) * step
        return round_through(((x - zero) / step).clamp(0, 7)) * step + zero

    found = []
    for function in (lambda x, width, low: quantize(x, width, low, 3), plain):
        inputs = [tensor.clone().requires_grad_(True) for tensor in (x, width, low)]
        found.append(torch.autograd.grad((function(*inputs) * weight).sum(), inputs))
    for ours, reference in zip(*found):
        assert torch.allclose(ours, reference, atol=1e-12)


def test_round_through_gives_exact_integers():
    x = draw(10_000) * 1000
    assert torch.equal(round_through(x), x.round())


def test_rescaling_keeps_the_codes():
    x = draw(6, 50)
    quantizer = AffineQuantizer(3, 6)
    quantizer.measure(x)
    with torch.no_grad():
        on_grid = quantizer(x)
    before = quantizer.codes(on_grid)
    factor = torch.linspace(0.1, 7.0, 6)
    quantizer.rescale_(factor)
    assert torch.equal(quantizer.codes(on_grid * factor[:, None]), before)


@pytest.mark.parametrize("bits", [0, 17, 2.5])
def test_bad_bits_are_refused(bits):
    with pytest.raises(InvalidInput, match="bits must be"):
        AffineQuantizer(bits)


def test_bad_values_are_refused():
    with pytest.raises(InvalidInput, match="empty"):
        minmax_range(torch.zeros(0))
    with pytest.raises(InvalidInput, match="NaN"):
        minmax_range(torch.tensor([1.0, float("nan")]))
    with pytest.raises(InvalidInput, match="rule must be one of"):
        AffineQuantizer(4).measure(torch.ones(3), "percentile")  # type: ignore[arg-type]
