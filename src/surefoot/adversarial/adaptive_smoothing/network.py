"""The adaptive weight: a small network that reads features of both bases and says how far to trust the robust one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial.adaptive_smoothing.mixing import Composite, MixedClassifier, mix_log_probs
from surefoot.errors import check, check_at_least
from surefoot.nn.modes import evaluating
from surefoot.nn.taps import check_names, tapped

CLAMP = 0.6  # standard deviations around the batch mean to which raw gammas are cut in training


def as_map(feature: Tensor) -> Tensor:  # [B, C, H, W]
    """Feature maps as they are; tokens [B, T, C] and signals as a map of one column, vectors [B, C] as one of a single cell."""
    if feature.dim() == 4:
        return feature
    if feature.dim() == 3:
        return feature.transpose(1, 2)[..., None]
    return feature.flatten(1)[:, :, None, None]


def matched(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps of one size, the finer one averaged down to the coarser; pooling a map to its own size would cost a third of the network."""
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    first, second = (F.adaptive_avg_pool2d(m, size) if m.shape[2:] != size else m for m in (first, second))
    return first, second


class PreActBlock(nn.Module):
    """Pre-activation residual block: x + conv relu bn conv relu bn x, with a 1x1 projection where shapes differ."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = stride == 1 and channels == width
        self.skip = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu_(self.norm1(x))
        rest = x if isinstance(self.skip, nn.Identity) else self.skip(active)
        return rest + self.conv2(torch.relu_(self.norm2(self.conv1(active))))


class MixingNetwork(nn.Module):
    """Raw gamma `[B, 1]` from two stages of features of both bases.

    The first stages, on top of each other, pass two residual blocks (stride 2), the second stages join by a 1x1 convolution,
    further blocks halve the size once per width; global pooling; a linear layer without bias.
    """

    def __init__(
        self,
        channels_g: Sequence[int],  # channels of the accurate base's two stages
        channels_h: Sequence[int],  # of the robust base's
        *,
        widths: Sequence[int] | None = None,  # one per group of blocks; both second stages' channels, and twice that
        blocks: int = 2,
    ) -> None:
        super().__init__()
        check(
            len(channels_g) == len(channels_h) == 2, "channels_g and channels_h name the channels of two stages each."
        )
        check_at_least("blocks", blocks, 1)
        both = channels_g[1] + channels_h[1]
        widths = (both, 2 * both) if widths is None else tuple(widths)
        check(len(widths) >= 1, "widths must name at least one group of blocks.")
        groups, channels = [], channels_g[0] + channels_h[0]
        for width in widths:
            group = [PreActBlock(channels if k == 0 else width, width, 2 if k == 0 else 1) for k in range(blocks)]
            groups.append(nn.Sequential(*group))
            channels = width
        self.groups = nn.ModuleList(groups)
        self.join = nn.Conv2d(both, widths[0], 1, bias=False)
        self.linear = nn.Linear(channels, 1, bias=False)

    def forward(self, features_g: Sequence[Tensor], features_h: Sequence[Tensor]) -> Tensor:  # [B, 1]
        pairs = (matched(as_map(g), as_map(h)) for g, h in zip(features_g, features_h, strict=True))
        first, second = (torch.cat(pair, 1) for pair in pairs)
        hidden, side = matched(self.groups[0](first), self.join(second))
        hidden = hidden + side
        for group in self.groups[1:]:
            hidden = group(hidden)
        return self.linear(hidden.mean((2, 3)))


@torch.no_grad()
def feature_sizes(model: nn.Module, names: Sequence[str], x: Tensor) -> tuple[int, ...]:
    """Channels of the named layers' outputs, as the mixing network counts them."""
    with evaluating(model):
        return tuple(as_map(f).shape[1] for f in tapped(model, names, x[:2])[1])


class AdaptiveSmoothingClassifier(Composite):
    """The mixture with its own weight for each input: `forward` gives log-probabilities, `mix` gamma and alpha with them.

        gamma = scale * batchnorm(raw) + bias        (scale, bias) in training and evaluation: `gamma_train`, `gamma_eval`
        alpha = sigmoid(gamma) in training, low + (high - low) sigmoid(gamma) in evaluation, (low, high) = `alpha_range`

    However the mixing network is fooled, alpha stays at `low` or above, and with it every certificate for `low`.
    `momentum` of gamma's batch-norm is small in the paper; runs of a few hundred steps need 0.1.
    """

    def __init__(
        self,
        accurate: nn.Module,
        robust: nn.Module,
        mixing: nn.Module,
        *,
        feature_modules: tuple[Sequence[str], Sequence[str]],  # two layers of each base
        alpha_range: tuple[float, float] = (0.84, 0.99),
        accurate_scale: float = 1.0,
        robust_scale: float = 1.0,
        gamma_train: tuple[float, float] = (2.0, 0.4),
        gamma_eval: tuple[float, float] = (2.0, 1.3),
        momentum: float = 0.01,
        certify: bool = True,  # ask that `low` carries a certificate
    ) -> None:
        super().__init__(accurate, robust, accurate_scale=accurate_scale, robust_scale=robust_scale)
        low, high = alpha_range
        check(
            0 <= low <= high <= 1, f"alpha_range must be (low, high) with 0 <= low <= high <= 1, got {alpha_range!r}."
        )
        check(low >= 0.5 or not certify, f"alpha_range starts at {low!r}; below 1/2 nothing is certified (certify=False allows it).")  # fmt: skip
        names_g, names_h = feature_modules
        check(len(names_g) == len(names_h) == 2, "feature_modules names two layers of each base.")
        check_names(accurate, names_g)
        check_names(robust, names_h)
        self.mixing, self.gamma_norm = mixing, nn.BatchNorm1d(1, affine=False, momentum=momentum)
        self.names_g, self.names_h, self.alpha_range = tuple(names_g), tuple(names_h), (low, high)
        self.gamma_train, self.gamma_eval = gamma_train, gamma_eval

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # log-probabilities [B, K], gamma [B], alpha [B]
        self.check_mode()
        logits_g, features_g = tapped(self.accurate, self.names_g, x)
        logits_h, features_h = tapped(self.robust, self.names_h, x)
        gamma = self.mixing(features_g, features_h)
        if self.training:
            check(len(x) >= 2, "Training the mixing network needs batches of at least two.")
            centre, spread = gamma.detach().mean(), CLAMP * gamma.detach().std()
            gamma = torch.minimum(torch.maximum(gamma, centre - spread), centre + spread)
        scale, bias = self.gamma_train if self.training else self.gamma_eval
        gamma = scale * self.gamma_norm(gamma) + bias
        alpha = torch.sigmoid(gamma)
        if not self.training:
            low, high = self.alpha_range
            alpha = (low + (high - low) * alpha).clamp(low, high)  # the sum may round past an end
        mixed = mix_log_probs(self.accurate_scale * logits_g, self.robust_scale * logits_h, alpha)
        return mixed, gamma[:, 0], alpha[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)[0]

    def fixed(self, alpha: float) -> MixedClassifier:
        """The same bases with that weight for every input."""
        return MixedClassifier(
            self.accurate, self.robust, alpha=alpha, accurate_scale=self.accurate_scale, robust_scale=self.robust_scale
        )
