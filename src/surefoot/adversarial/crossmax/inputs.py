"""The stochastic multi-resolution input: N altered copies of an image, stacked along the channels.

For each resolution rho, afresh for every image and pass: contrast c about the mean brightness, cyclic shift by up to `jitter` pixels,
mix with grey w x + (1 - w) mean_channel(x), shrink to rho (bicubic), noise, enlarge (bicubic), noise, clip to [0, 1]. Clipping
comes last alone: overshoot in between is part of the picture.

Two differences to the published notebook. It overwrites the contrast draw by the grey draw, so that contrast is never above 1 and
always equals w; `compat=True` does the same. The paper speaks of the noise's standard deviation; the notebook adds
one-sided uniform noise, which is the default here too (`noise="normal"` is the paper's wording).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InvalidInput, Refused, check, check_at_least, check_choice, check_non_negative
from surefoot.models import Normalized
from surefoot.nn.modes import evaluating

LUMINANCE = (0.299, 0.587, 0.114)


class MultiResolutionInput(nn.Module):
    """Images `[B, C, H, W]` in [0, 1] to `[B, N C, H, W]`; random in training and in evaluation.

    Without a `generator` it draws from torch's global stream, as dropout does, which the attacks fork and seed; with one, from that,
    on whatever device it lives.
    """

    def __init__(
        self,
        resolutions: Sequence[int] = (32, 16, 8, 4),
        *,
        down_noise: float = 0.2,
        up_noise: float = 0.2,
        jitter: int = 3,
        contrast: tuple[float, float] = (0.7, 1.5),
        grey: tuple[float, float] = (0.5, 1.0),
        noise: Literal["uniform", "normal"] = "uniform",
        compat: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check(len(resolutions) > 0, "resolutions must name at least one size.")
        for size in resolutions:
            check_at_least("resolutions", size, 1)
        check_non_negative("down_noise", down_noise)
        check_non_negative("up_noise", up_noise)
        check_at_least("jitter", jitter, 0)
        check_choice("noise", noise, ("uniform", "normal"))
        for name, (low, high) in (("contrast", contrast), ("grey", grey)):
            check(0 <= low <= high, f"{name} must be (low, high) with 0 <= low <= high, got {(low, high)!r}.")
        check(grey[1] <= 1, f"grey must not exceed 1, got {grey!r}.")
        self.resolutions, self.jitter, self.compat = tuple(int(size) for size in resolutions), jitter, compat
        self.down_noise, self.up_noise, self.contrast, self.grey = down_noise, up_noise, contrast, grey
        self.noise: Literal["uniform", "normal"] = noise
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return torch.cat([self._copy(x, size) for size in self.resolutions], 1)

    def _copy(self, x: Tensor, size: int) -> Tensor:
        height, width = x.shape[2:]
        shift = self._draw(torch.rand, (len(x), 2), x).mul(2 * self.jitter + 1).floor().long() - self.jitter
        grey = self._between(self.grey, x)
        contrast = grey if self.compat else self._between(self.contrast, x)
        mean = brightness(x)
        x = contrast * (x - mean) + mean
        x = roll(x, shift)
        x = grey * x + (1 - grey) * x.mean(1, keepdim=True)
        longest = max(height, width)
        low = (max(1, round(size * height / longest)), max(1, round(size * width / longest)))
        if low != (height, width):
            x = F.interpolate(x, size=low, mode="bicubic", align_corners=False)
        x = x + self.down_noise * self._noise(x)
        if low != (height, width):
            x = F.interpolate(x, size=(height, width), mode="bicubic", align_corners=False)
        return (x + self.up_noise * self._noise(x)).clamp(0, 1)

    def _between(self, ends: tuple[float, float], x: Tensor) -> Tensor:  # [B, 1, 1, 1]
        return ends[0] + (ends[1] - ends[0]) * self._draw(torch.rand, (len(x), 1, 1, 1), x)

    def _noise(self, x: Tensor) -> Tensor:
        return self._draw(torch.rand if self.noise == "uniform" else torch.randn, x.shape, x)

    def _draw(self, kind, shape: Sequence[int], x: Tensor) -> Tensor:
        device = x.device if self.generator is None else self.generator.device
        return kind(*shape, generator=self.generator, device=device, dtype=x.dtype).to(x.device)

    def _check(self, x: Tensor) -> None:
        check(x.dim() == 4 and x.is_floating_point(), f"Images must be floating [B, C, H, W], got {x.dtype} {list(x.shape)}.")  # fmt: skip
        largest = max(self.resolutions)
        check(largest <= max(x.shape[2:]), f"Resolution {largest} is larger than the image, {list(x.shape[2:])}; name smaller ones.")  # fmt: skip
        low, high = x.detach().aminmax() if len(x) else (torch.zeros(()), torch.ones(()))
        check(bool((low >= -1e-4) & (high <= 1 + 1e-4)), f"Images must lie in [0, 1], got [{float(low):.3g}, {float(high):.3g}]; normalise behind this layer.")  # fmt: skip


def brightness(x: Tensor) -> Tensor:  # [B, 1, 1, 1]
    """Mean over the pixels, of the luminance for colour images."""
    if x.shape[1] == 3:
        x = (x * x.new_tensor(LUMINANCE)[:, None, None]).sum(1, keepdim=True)
    return x.mean((1, 2, 3), keepdim=True)


def roll(
    x: Tensor,  # [B, C, H, W]
    shift: Tensor,  # int64 [B, 2], rows and columns
) -> Tensor:
    """Each image shifted cyclically by its own amount, as `torch.roll` does one."""
    height, width = x.shape[2:]
    rows = (torch.arange(height, device=x.device) - shift[:, :1]) % height
    columns = (torch.arange(width, device=x.device) - shift[:, 1:]) % width
    x = x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, width))
    return x.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], height, -1))


def widen_first_conv(
    model: nn.Module,
    copies: int,
    *,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A copy of the model whose first layer, a convolution, takes `copies` times the channels.

    The new kernel is drawn from `generator` as PyTorch initialises a convolution (the paper's way; train it), or, without one, is the
    old kernel tiled and divided by `copies`, so that equal copies give what the model gave. A `Normalized` in front is
    tiled along.
    """
    check_at_least("copies", copies, 1)
    model = copy.deepcopy(model)
    name, conv = _first_layer(model)
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
        raise Refused(f"The first layer of {type(model).__name__} is {type(conv).__name__}; only an ungrouped 2-D convolution can be widened to several copies of an image.")  # fmt: skip
    wide: Any = torch.nn.utils.skip_init(
        nn.Conv2d, copies * conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
        conv.dilation, bias=conv.bias is not None, padding_mode=conv.padding_mode, device=conv.weight.device,
        dtype=conv.weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        wide.weight.copy_(conv.weight.repeat(1, copies, 1, 1) / copies)
        if conv.bias is not None and wide.bias is not None:
            wide.bias.copy_(conv.bias)
        if generator is not None:
            bound = 1 / math.sqrt(wide.weight[0].numel())  # of kaiming_uniform_(a=sqrt(5)) and of the bias alike
            for parameter in wide.parameters():
                noise = torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype, device=generator.device)
                parameter.copy_((2 * noise - 1) * bound)
    wide.train(conv.training)
    if not name:
        return wide
    model.set_submodule(name, wide)
    for module in model.modules():
        if isinstance(module, Normalized) and module.mean.shape[1] == conv.in_channels and conv.in_channels > 1:
            module.mean, module.std = (b.repeat(1, copies, *[1] * (b.dim() - 2)) for b in (module.mean, module.std))
    return model


def _first_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """The first module, in order of registration, that holds a weight matrix or kernel of its own."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() >= 2:
            return name, module
    raise Refused(f"{type(model).__name__} has no layer with weights to widen.")


class MultiResolutionClassifier(nn.Module):
    """A widened network behind its random input."""

    def __init__(self, inputs: MultiResolutionInput, network: nn.Module) -> None:
        super().__init__()
        self.inputs, self.network = inputs, network
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.inputs(x))


def check_widened(model: MultiResolutionClassifier, x: Tensor) -> None:
    """Refuse a widened network that something before its first convolution keeps from taking the copies."""
    stacked = x[:2].repeat(1, len(model.inputs.resolutions), 1, 1)
    try:
        with evaluating(model), torch.no_grad():
            model.network(stacked)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise InvalidInput(f"The widened network does not take {stacked.shape[1]} channels ({str(error).splitlines()[0][:80]}); put its normalisation into surefoot's Normalized.") from error  # fmt: skip
