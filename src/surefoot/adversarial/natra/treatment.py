"""NaTra in the training loop: a generator of its own, codes, directions, the filter, then the natural-adversarial loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.adversarial.natra.backend import Map
from surefoot.adversarial.natra.directions import (
    DirectionReport,
    Method,
    attribute_directions,
    filter_directions,
    restrict,
)
from surefoot.adversarial.natra.inversion import invert_batch
from surefoot.adversarial.natra.transform import Mode, NaturalTransformation, natra_loss
from surefoot.core.task import Augment, Task
from surefoot.core.treatment import Batch, Treatment
from surefoot.errors import Refused, check, check_at_least, check_choice, check_non_negative, check_positive
from surefoot.models import seeded_build, small_cnn
from surefoot.models.generators import train_vae

FILTERED_ON = 500  # images on which the directions are tested


class ContrastFree(nn.Module):
    """`model` on images of mean 0 and deviation 1 each: a judge that brightness and contrast cannot fool."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
        return self.model((x - mean) / (std + 1e-3))


def train_reference(task: Task, *, steps: int, augment: Sequence[Augment] = (), generator: torch.Generator) -> nn.Module:  # fmt: skip
    """The classifier that judges whether a direction keeps the class: small, trained on the labels at hand, contrast-free.

    It must not fail at the very changes that training is to cover, or the filter drops what matters; hence the per-image
    normalisation, and `augment` for what else is known to keep the class.
    """
    x, y = task.train.x.to(task.device), task.train.labels.to(task.device)
    net = ContrastFree(seeded_build(lambda: small_cnn(task.input_shape, task.num_classes), generator)).to(x)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    noise = torch.Generator(task.device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
    net.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, 2 * (1 - step / steps))
        index = torch.randint(len(x), (64,), generator=generator).to(task.device)
        batch = x[index]
        for function in augment:
            batch = function(batch, noise)
        loss = F.cross_entropy(net(batch), y[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return net.eval()


@dataclass
class NaTra(Treatment):
    """Train on natural-adversarial images beside the clean ones; brings the training loss.

    `prepare` trains a small generator on the training images (or on `using(pool=...)`), inverts them, finds directions and
    drops those that change the class. A generator of your own comes in by `using(generator_net=..., encoder=...)`.
    What happened stands in `report_` (the directions) and `dropped_` (images inverted below `psnr_floor`, trained clean only).
    """

    alpha_max: float = 2.0  # standard deviations of the codes along a direction
    weight: float = 1.0
    mode: Mode = "pgd"
    steps: int = 3
    draws: int = 2
    k: int = 8
    method: Method = "pca"
    filter: bool = True
    halvings: int = 2  # how often a direction may come back with half its reach
    max_label_change: float = 0.05
    num_codes: int = 4
    residual: bool = True
    psnr_floor: float = 12.0
    consistency: float = 0.0
    pixel_eps: float = 0.0
    latent_dim: int = 16
    generator_steps: int = 400
    inversion_steps: int = 60
    reference_steps: int = 150
    transform_: NaturalTransformation | None = field(default=None, init=False, repr=False, compare=False)
    report_: DirectionReport | None = field(default=None, init=False, repr=False, compare=False)
    usable_: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    dropped_: int = field(default=0, init=False, repr=False, compare=False)
    augment_: tuple[Augment, ...] = field(default=(), init=False, repr=False, compare=False)
    given_: tuple[Tensor | None, Map | None, Map | None, Map | None] = field(default=(None, None, None, None), init=False, repr=False, compare=False)  # fmt: skip

    slug: ClassVar[str] = "natra"
    prepare_order: ClassVar[int] = 10  # after data selection and other augmentation: codes are kept by example

    def __post_init__(self) -> None:
        check_positive("alpha_max", self.alpha_max)
        for name in ("weight", "consistency", "pixel_eps"):
            check_non_negative(name, getattr(self, name))
        check_choice("mode", self.mode, ("random", "best", "pgd"))
        check_choice("method", self.method, ("closed_form", "pca"))
        for name in ("steps", "draws", "k", "num_codes", "latent_dim", "generator_steps", "inversion_steps", "reference_steps"):  # fmt: skip
            check_at_least(name, getattr(self, name), 1)
        check_at_least("halvings", self.halvings, 0)

    def using(
        self,
        *,
        pool: Tensor | None = None,  # [N, C, H, W], unlabelled images of the domain, none of them test images
        generator_net: Map | None = None,  # z -> images
        encoder: Map | None = None,  # images -> z, of that generator
        reference: Map | None = None,  # images -> logits: the judge of the filter
    ) -> NaTra:
        """Give what `prepare` would otherwise make from the training images; returns this treatment."""
        self.given_ = (pool, generator_net, encoder, reference)
        return self

    def check(self, model: nn.Module, task: Task) -> None:
        if len(task.input_shape) != 3:
            raise Refused(f"natra moves images [C, H, W] through a generator; these inputs have shape {list(task.input_shape)}.")  # fmt: skip
        check(task.train.y is not None and len(task.train) > 1, "natra needs at least two labelled training examples.")
        if self.given_[1] is None:
            check(self.k <= self.latent_dim, f"k = {self.k} directions do not fit into {self.latent_dim} latent dimensions; lower k.")  # fmt: skip

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        x, bounds = task.train.x.to(task.device), task.bounds
        pool = self.given_[0]
        generator_net, encoder, reference = (_on(network, x) for network in self.given_[1:])
        if generator_net is None:
            source = x if pool is None else pool.to(x)
            vae = train_vae(source, latent_dim=self.latent_dim, steps=self.generator_steps, bounds=bounds, generator=task.generator("natra/vae"))  # fmt: skip
            generator_net, encoder = vae.decoder, vae.encoder
        features: Map | None = getattr(encoder, "features", None)  # phi: the encoder's own layers, where it names them
        codes = invert_batch(
            generator_net, encoder, x, steps=self.inversion_steps, num_codes=self.num_codes, features=features,
            feature_weight=0.01, bounds=bounds, generator=task.generator("natra/codes"),
        )  # fmt: skip
        self.usable_ = codes.usable(self.psnr_floor)
        self.dropped_ = int((~self.usable_).sum())
        known = None if encoder is None else _encode(encoder, x if pool is None else pool.to(x))
        directions = attribute_directions(generator_net, method=self.method, k=self.k, codes=known, generator=task.generator("natra/directions"))  # fmt: skip
        whole = NaturalTransformation(generator_net, codes, directions, self.alpha_max, self.residual, x, bounds)
        if reference is None:
            reference = train_reference(task, steps=self.reference_steps, augment=task.augment, generator=task.generator("natra/reference"))  # fmt: skip
        report = filter_directions(
            reference, whole.take(self.usable_.nonzero().flatten()[:FILTERED_ON]), halvings=self.halvings if self.filter else 0,
            max_label_change=self.max_label_change, generator=task.generator("natra/filter"),
        )  # fmt: skip
        self.report_ = report if self.filter else restrict(report)
        kept, reach = self.report_.select()
        self.transform_ = NaturalTransformation(generator_net, codes, kept, reach, self.residual, x, bounds)
        self.augment_ = task.augment
        return model, task

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        assert self.transform_ is not None and self.usable_ is not None

        def augment(x: Tensor) -> Tensor:
            for function in self.augment_:
                x = function(x, batch.generator)
            return x

        return natra_loss(
            model, batch.x, batch.y, self.transform_.take(batch.index), weight=self.weight, mode=self.mode, steps=self.steps,
            draws=self.draws, consistency=self.consistency, usable=self.usable_[batch.index], pixel_eps=self.pixel_eps,
            augment=augment, generator=batch.generator,
        )  # fmt: skip


def _on(network: Map | None, x: Tensor) -> Map | None:
    return network.to(x) if isinstance(network, nn.Module) else network


@torch.no_grad()
def _encode(encoder: Map, x: Tensor) -> Tensor:  # [N, d]
    return torch.cat([encoder(part) for part in x.split(1000)])
