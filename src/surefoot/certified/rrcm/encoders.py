"""Encoders that know the noise level: the ViT of the paper, and one made from any classifier that ends in a linear layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surefoot.errors import Refused, check, check_at_least
from surefoot.nn.modes import evaluating

SIGMA_DATA = 0.5


def input_scale(t: Tensor) -> Tensor:
    """c_in(t) = 1/sqrt(t^2 + sigma_data^2): x_t has second moment about 1 after it when x has deviation 0.5."""
    return (t.square() + SIGMA_DATA**2).rsqrt()


def time_features(
    t: Tensor,  # [...], noise levels
    dim: int,
) -> Tensor:  # [..., dim]
    """Cosines and sines of 250 ln(t + 1e-44) at `dim`/2 frequencies from 1 to 1/10000."""
    half = dim // 2
    scaled = 250.0 * torch.log(t.double() + 1e-44)  # in float32 the angle is off by up to 1e-4
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = scaled[..., None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], -1).to(t.dtype)


class NoiseEncoder(nn.Module):
    """What rRCM trains: `encoder(x_t, t) -> z [B, embed_dim]`, x_t `[B, C, H, W]` noisy pixels in the [-1, 1] scale.

    `t` is the noise level, a number or a tensor `[]` or `[B]`. A subclass implements `represent`, which gets the scaled input
    c_in(t) x_t and t as `[B]`, and may name its `stages` from the input on for layer-wise learning rates.
    """

    embed_dim: int

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:  # [B, embed_dim]
        check(x.dim() == 4, f"An encoder takes images [B, C, H, W], got shape {list(x.shape)}.")
        levels = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        return self.represent(input_scale(levels).view(-1, 1, 1, 1) * x, levels)

    def represent(self, x: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def stages(self) -> list[list[nn.Parameter]]:
        """The parameters in groups, first the nearest to the input."""
        return [list(self.parameters())]


class RRCMEncoder(NoiseEncoder):
    """The paper's ViT: patch, class and time tokens with learned positions; z is the class token after the last norm.

    Paper: patch 4, width 768, depth 12, heads 12 (CIFAR-10).
    """

    def __init__(
        self, image_size: int, patch_size: int, in_channels: int, embed_dim: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        check(image_size % patch_size == 0, f"image_size {image_size} must be a multiple of patch_size {patch_size}.")
        check(embed_dim % num_heads == 0 and embed_dim % 2 == 0, f"embed_dim {embed_dim} must be even and a multiple of num_heads {num_heads}.")  # fmt: skip
        check_at_least("depth", depth, 1)
        self.image_size, self.embed_dim = image_size, embed_dim
        self.patches = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)
        self.time = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.class_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.positions = nn.Parameter(torch.zeros(1, 2 + (image_size // patch_size) ** 2, embed_dim))
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                embed_dim, num_heads, 4 * embed_dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)

    def represent(self, x: Tensor, t: Tensor) -> Tensor:
        check(x.shape[-1] == x.shape[-2] == self.image_size, f"This encoder takes images of {self.image_size}x{self.image_size}, got {list(x.shape[-2:])}.")  # fmt: skip
        time = self.time(time_features(t, self.embed_dim)).unsqueeze(1)
        pixels = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), time, pixels], 1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]

    def stages(self) -> list[list[nn.Parameter]]:
        first = [self.class_token, self.positions, *self.patches.parameters(), *self.time.parameters()]
        return [first, *(list(block.parameters()) for block in self.blocks), list(self.norm.parameters())]


class ClassifierEncoder(NoiseEncoder):
    """A classifier of raw [0, 1] images as encoder: what its last linear layer gets is z; that layer is dropped.

    The network sees 0.5 + c_in(t) x_t / 4, which is the image itself at t = 0 and keeps its spread at every t, so that
    pre-trained weights keep their meaning. t enters as a scale and shift of the input channels and of z, zero at first.
    """

    def __init__(self, model: nn.Module, num_classes: int, input_shape: Sequence[int], *, time_dim: int = 32) -> None:
        """`model` is copied. `input_shape` is (C, H, W)."""
        super().__init__()
        check(len(input_shape) == 3, f"input_shape must be (C, H, W), got {tuple(input_shape)}.")
        name, head = last_linear(model, num_classes)
        self.channels, self.embed_dim, self.time_dim = int(input_shape[0]), head.in_features, time_dim
        holder = nn.ModuleDict({"model": copy.deepcopy(model)})  # the model itself may be the linear layer
        holder.set_submodule(f"model.{name}" if name else "model", nn.Identity())
        self.backbone = holder["model"]
        like = head.weight
        last = nn.Linear(time_dim, 2 * (self.channels + self.embed_dim))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.time = nn.Sequential(nn.Linear(time_dim, time_dim), nn.SiLU(), last).to(like)
        self._check_head(model, head, input_shape)

    def represent(self, x: Tensor, t: Tensor) -> Tensor:
        modulation = self.time(time_features(t, self.time_dim))
        c = self.channels
        scale, shift, z_scale, z_shift = modulation.split([c, c, self.embed_dim, self.embed_dim], 1)
        image = 0.5 + 0.5 * SIGMA_DATA * x
        z = self.backbone(image * (1.0 + scale[..., None, None]) + shift[..., None, None])
        return z * (1.0 + z_scale) + z_shift

    def stages(self) -> list[list[nn.Parameter]]:
        parts = [list(part.parameters()) for part in _units(self.backbone)]
        first, *rest = [p for p in parts if p] or [[]]
        return [[*self.time.parameters(), *first], *rest]

    def _check_head(self, model: nn.Module, head: nn.Linear, input_shape: Sequence[int]) -> None:
        """The model must be its head after the features: else something after the head would be lost."""
        like = head.weight
        probe = torch.linspace(0, 1, 2 * math.prod(input_shape), dtype=like.dtype, device=like.device)
        probe = probe.view(2, *input_shape)
        with evaluating(model, self), torch.no_grad():
            z = self.backbone(probe)
            if z.shape == (2, self.embed_dim) and torch.allclose(model(probe), head(z), rtol=1e-3, atol=1e-4):
                return
        raise Refused("rrcm replaces the model's last linear layer, and this model's answer is not that layer's output; give a model whose last step is a Linear layer.")  # fmt: skip


def last_linear(model: nn.Module, num_classes: int) -> tuple[str, nn.Linear]:
    """Name and module of the last linear layer with `num_classes` outputs, or a refusal."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    if not found:
        raise Refused(f"rrcm needs a model that ends in a Linear layer with {num_classes} outputs, and this one has none.")  # fmt: skip
    return found[-1]


def _units(module: nn.Module) -> list[nn.Module]:
    """The children of the innermost chain of single children: the stages of a wrapped network."""
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    own = any(True for _ in module.parameters(recurse=False))
    if own or not children:
        return [module]
    return _units(children[0]) if len(children) == 1 else children


def projection_head(embed_dim: int, hidden_dim: int = 2048, output_dim: int = 256) -> nn.Sequential:
    """Three linear layers without bias, batch-norm and ReLU between, none after the last."""
    return nn.Sequential(
        nn.Linear(embed_dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(),
        nn.Linear(hidden_dim, output_dim, bias=False),
    )  # fmt: skip
