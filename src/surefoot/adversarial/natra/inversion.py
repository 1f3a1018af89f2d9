"""Images into the latent space: an encoder for a frozen generator, batch inverse encoding (BIES), several codes (LCE).

BIES starts at z0 = E(x) for the whole batch and refines all codes at once, z_i = E(x_i) + s + d_i: first the batch-common shift s,
then each image's d_i, by Adam on

    sum_i  mean (G(z_i) - x_i)^2  +  l_p mean (phi(G(z_i)) - phi(x_i))^2  +  l_z mean (z_i - E(x_i))^2

The sum over images (not the mean) keeps an image's path independent of its neighbours once s is fixed. LCE gives each image N
codes and channel weights (`backend.compose`), refined by the same descent; as a * F(z) is bilinear, `restarts` matter there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from surefoot.adversarial.natra.backend import (
    Map,
    check_images,
    compose,
    frozen,
    latent_dim_of,
    resolve_layer,
    split_generator,
    zeros_for,
)
from surefoot.errors import InvalidInput, check, check_at_least, check_non_negative, check_positive
from surefoot.models import seeded_build
from surefoot.models.generators import ImageEncoder

JITTER = 0.3  # std of the codes' spread at the start where an image gets several


@dataclass(frozen=True)
class LatentCodes:
    """Inverted images, computed once; row i belongs to example i of the data set (`take` by index)."""

    codes: Tensor  # [M, N, d]
    weights: Tensor | None  # [M, N, C'], None where the one code is taken as it is
    psnr: Tensor  # [M] dB
    encoded_psnr: Tensor  # [M] dB, of E(x) alone: what the refinement started from
    layer: int | None = None
    shift: Tensor | None = None  # [d], the batch-common part

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, index: Tensor | slice) -> LatentCodes:
        weights = None if self.weights is None else self.weights[index]
        return replace(self, codes=self.codes[index], weights=weights, psnr=self.psnr[index], encoded_psnr=self.encoded_psnr[index])  # fmt: skip

    def images(self, generator_net: Map, shift: Tensor | None = None) -> Tensor:  # [M, C, H, W]
        """Reconstructions; `shift` [M, d] moves every code of an image alike."""
        codes = self.codes if shift is None else self.codes + shift.unsqueeze(1)
        return compose(generator_net, codes, self.weights, self.layer)

    def usable(self, floor: float) -> Tensor:  # bool [M]
        """Images rebuilt with at least `floor` dB. The others must not be moved: what comes out is another image."""
        good = self.psnr >= floor
        if not bool(good.any()):
            low, middle, high = self.psnr.double().quantile(self.psnr.new_tensor([0.05, 0.5, 0.95]).double()).tolist()
            raise InvalidInput(
                f"Every image is rebuilt below the floor of {floor:g} dB (5 %, median, 95 %: {low:.1f}, {middle:.1f}, "
                f"{high:.1f} dB): the generator does not cover these images; train it on them or lower psnr_floor."
            )
        return good


def psnr(first: Tensor, second: Tensor, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Tensor:  # [B]
    """Peak signal-to-noise ratio per image in dB, capped at 100; the peak is the range, or that of `second`."""
    peak = bounds[1] - bounds[0] if bounds is not None else float(second.max() - second.min())
    error = (first - second).flatten(1).square().mean(1)
    return 10 * (peak**2 / error.clamp(min=1e-10 * peak**2)).log10()


def train_encoder(
    generator_net: Map,
    x: Tensor,  # [N, C, H, W], unlabelled images of the domain
    *,
    encoder: nn.Module | None = None,
    steps: int = 400,
    batch_size: int = 64,
    lr: float = 2e-3,
    reconstruction: float = 1.0,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator,
) -> nn.Module:
    """An encoder of a frozen generator: ||E(G(z)) - z||^2 for z ~ N(0, I), plus `reconstruction` times ||G(E(x)) - x||^2.

    `encoder` is trained in place where given; else a small convolutional one is made. It comes back in evaluation mode.
    """
    check_images(x, bounds)
    check_at_least("steps", steps, 1)
    check_positive("lr", lr)
    check_non_negative("reconstruction", reconstruction)
    d, shape = latent_dim_of(generator_net), tuple(x.shape[1:])
    net = seeded_build(lambda: ImageEncoder(shape, d), generator).to(x) if encoder is None else encoder
    _check_shapes(generator_net, x, d)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr)
    net.train()
    with frozen(generator_net):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
            z = torch.randn(batch_size, d, generator=generator, dtype=x.dtype).to(x.device)
            with torch.no_grad():
                drawn = generator_net(z)
            real = x[torch.randint(len(x), (batch_size,), generator=generator).to(x.device)]
            found, code = net(torch.cat([drawn, real])).chunk(2)
            loss = (found - z).square().mean()
            if reconstruction > 0:
                loss = loss + reconstruction * (generator_net(code) - real).square().mean()
            optimizer.zero_grad(set_to_none=True)
            for parameter, slope in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True)):
                parameter.grad = slope  # of the encoder alone: the generator's parameters collect nothing
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return net.eval()


def invert_batch(
    generator_net: Map,
    encoder: Map | None,  # images -> z [B, d]; None starts at z = 0
    x: Tensor,  # [M, C, H, W]
    *,
    steps: int = 200,
    lr: float = 0.05,
    num_codes: int = 1,
    layer: int | None = None,
    channel_weights: bool | None = None,  # learn a_n; by default where num_codes > 1
    shift: bool | Tensor = True,  # learn s in the first fifth of the steps, or s [d] as given, or none
    features: Map | None = None,  # phi
    feature_weight: float = 0.1,  # l_p
    code_weight: float = 1e-3,  # l_z
    restarts: int = 1,
    batch_size: int = 1000,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> LatentCodes:
    """Codes of a whole data set, in batches. No network is changed; the result is to be kept and indexed (`LatentCodes.take`).

    Random are only the starting codes with `num_codes` or `restarts` above 1, the same for all images of the call.
    """
    check_images(x, bounds)
    check_at_least("steps", steps, 0)
    check_positive("lr", lr)
    check_at_least("num_codes", num_codes, 1)
    check_at_least("restarts", restarts, 1)
    check_non_negative("feature_weight", feature_weight)
    check_non_negative("code_weight", code_weight)
    d = latent_dim_of(generator_net)
    _check_shapes(generator_net, x, d)
    learned = num_codes > 1 if channel_weights is None else channel_weights
    check(learned or num_codes == 1, "Several codes an image need channel weights; leave channel_weights out.")
    source = generator if generator is not None else torch.Generator().manual_seed(0)
    spread = JITTER * torch.randn(restarts, num_codes, d, generator=source, dtype=x.dtype).to(x.device)
    spread[0, 0] = 0  # one start is the encoder's code itself
    width = 0
    if learned:
        layer = resolve_layer(generator_net, layer)
        with frozen(generator_net), torch.no_grad():
            width = split_generator(generator_net, layer)[0](zeros_for(generator_net)).shape[1]
    job = _Job(generator_net, encoder, steps, lr, layer, shift, features, feature_weight, code_weight, bounds, spread, width)  # fmt: skip
    with frozen(generator_net, encoder, features):
        return _join([job.run(piece) for piece in x.detach().split(batch_size)])


@dataclass(frozen=True)
class _Job:
    """One inversion's settings; `run` does a batch."""

    generator_net: Map
    encoder: Map | None
    steps: int
    lr: float
    layer: int | None
    shift: bool | Tensor
    features: Map | None
    feature_weight: float
    code_weight: float
    bounds: tuple[float, float] | None
    spread: Tensor  # [R, N, d]
    width: int  # channels that get a weight, 0: none

    def run(self, x: Tensor) -> LatentCodes:
        restarts, num_codes, d = self.spread.shape
        with torch.no_grad():
            start = x.new_zeros(len(x), d) if self.encoder is None else self.encoder(x).detach()
            check(tuple(start.shape) == (len(x), d), f"The encoder must give codes {[len(x), d]}, got {list(start.shape)}.")  # fmt: skip
            encoded = psnr(self.generator_net(start), x, self.bounds)
            target = None if self.features is None else self.features(x)
        common = self._common(x, start, target)
        # restarts stand as more images: [R M, N, d]
        codes = (start + common).repeat(restarts, 1).unsqueeze(1) + self.spread.repeat_interleave(len(x), 0)
        weights = x.new_full((len(codes), num_codes, self.width), 1.0 / num_codes) if self.width else None
        anchor, goal = start.repeat(restarts, 1).unsqueeze(1), x.repeat(restarts, 1, 1, 1)
        aim = None if target is None else target.repeat(restarts, *(1,) * (target.dim() - 1))

        def losses(values: Sequence[Tensor]) -> Tensor:  # [R M]
            made = compose(self.generator_net, values[0], values[1] if len(values) > 1 else None, self.layer)
            return self._loss(made, goal, aim) + self.code_weight * (values[0] - anchor).flatten(1).square().mean(1)

        used = round(0.2 * self.steps) if self.shift is True else 0
        found = _descend([codes] if weights is None else [codes, weights], losses, self.steps - used, self.lr)
        with torch.no_grad():
            best = losses(found).reshape(restarts, len(x)).argmin(0) * len(x) + torch.arange(len(x), device=x.device)
            codes, weights = found[0][best], found[1][best] if len(found) > 1 else None
            rebuilt = psnr(compose(self.generator_net, codes, weights, self.layer), x, self.bounds)
        return LatentCodes(codes, weights, rebuilt, encoded, self.layer, common)

    def _common(self, x: Tensor, start: Tensor, target: Tensor | None) -> Tensor:  # [d]
        if isinstance(self.shift, Tensor):
            return self.shift.to(start)
        if not self.shift:
            return start.new_zeros(start.shape[1])

        def losses(values: Sequence[Tensor]) -> Tensor:
            made = self.generator_net(start + values[0])
            return self._loss(made, x, target) + self.code_weight * values[0].square().mean()

        return _descend([start.new_zeros(start.shape[1])], losses, round(0.2 * self.steps), self.lr)[0]

    def _loss(self, made: Tensor, x: Tensor, target: Tensor | None) -> Tensor:
        loss = (made - x).flatten(1).square().mean(1)
        if target is not None and self.features is not None:
            loss = loss + self.feature_weight * (self.features(made) - target).flatten(1).square().mean(1)
        return loss


def _descend(start: Sequence[Tensor], losses: Callable[[Sequence[Tensor]], Tensor], steps: int, lr: float) -> list[Tensor]:  # fmt: skip
    """Adam with a cosine schedule on the sum of the losses; gradients reach these tensors only."""
    values = [value.clone().requires_grad_() for value in start]
    optimizer = torch.optim.Adam(values, lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        for value, slope in zip(values, torch.autograd.grad(losses(values).sum(), values)):
            value.grad = slope
        optimizer.step()
    return [value.detach() for value in values]


def _check_shapes(generator_net: Map, x: Tensor, d: int) -> None:
    with frozen(generator_net), torch.no_grad():
        made = generator_net(x.new_zeros(1, d))
    check(made.shape[1:] == x.shape[1:], f"The generator makes images {list(made.shape[1:])}, and x holds {list(x.shape[1:])}; resize x or take another generator.")  # fmt: skip


def _join(parts: Sequence[LatentCodes]) -> LatentCodes:
    if len(parts) == 1:
        return parts[0]
    joined = {
        f.name: torch.cat([getattr(part, f.name) for part in parts])
        for f in fields(LatentCodes)
        if f.name in ("codes", "weights", "psnr", "encoded_psnr") and getattr(parts[0], f.name) is not None
    }
    return replace(parts[0], **joined, shift=None)
