"""Black-box defence as a treatment: the trained model is only asked, and a certified front is put before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from surefoot.certified.zo_smoothing.autoencoder import Autoencoder, LatentAutoencoder, pretrain_autoencoder
from surefoot.certified.zo_smoothing.blackbox import BlackBox
from surefoot.certified.zo_smoothing.gradients import Method
from surefoot.certified.zo_smoothing.pipeline import RobustifiedModel
from surefoot.certified.zo_smoothing.training import train_zo_denoiser
from surefoot.core.task import Task
from surefoot.core.treatment import Treatment
from surefoot.errors import Refused, check, check_at_least, check_choice, check_non_negative, check_positive
from surefoot.models.networks import seeded_build
from surefoot.nn.denoisers import DnCNN


@dataclass
class ZOSmoothing(Treatment):
    """After training, put denoiser and autoencoder before the model, trained by asking it; its weights do not change.

    No labels are used in that. Defaults are for small images: a latent of 16 numbers and a denoiser of four layers; the paper
    takes 192 numbers for 32x32 images, 17 layers of 64 channels and 200 to 600 epochs. `query_budget` None: no limit.
    """

    slug: ClassVar[str] = "zo_smoothing"
    excludes: ClassVar[Mapping[str, str]] = {
        "dual_smoothing": "the front sees whole images, and the certificate of two halves would be lost behind it.",
        "crop_selection": "the front is trained on whole images, and crop selection asks about crops of another size.",
    }
    finish_order: ClassVar[int] = 15  # the model behind it is finished, quantized and calibrated: it is only asked

    sigma: float = 0.25
    latent_dim: int = 16
    method: Method = "cge"
    mu: float = 0.005
    num_queries: int | None = None
    epochs: int = 15
    autoencoder_epochs: int = 80
    batch_size: int = 64
    lr: float = 5e-3
    depth: int = 4
    width: int = 16
    query_budget: int | None = None
    shape_: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)
    queries_: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_non_negative("sigma", self.sigma)
        check_choice("method", self.method, ("cge", "rge"))
        for name in ("mu", "lr"):
            check_positive(name, getattr(self, name))
        for name in ("latent_dim", "epochs", "autoencoder_epochs", "batch_size", "width"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("depth", self.depth, 2)

    def check(self, model: nn.Module, task: Task) -> None:
        x = task.train.x
        if task.modality != "image" or x.dim() != 4:
            raise Refused(f"zo_smoothing denoises images [C, H, W]; this task has {task.modality} inputs of shape {list(x.shape[1:])}.")  # fmt: skip
        numbers = math.prod(x.shape[1:])
        check(
            self.latent_dim <= numbers, f"latent_dim {self.latent_dim} is larger than the input of {numbers} numbers."
        )
        check(len(x) > 0 and bool(((x >= 0) & (x <= 1)).all()), "zo_smoothing needs training images in [0, 1] without NaN; scale them first.")  # fmt: skip

    def prepare(self, model: nn.Module, task: Task) -> tuple[nn.Module, Task]:
        self.shape_ = tuple(task.train.x.shape[1:])
        return model, task

    def finish(self, model: nn.Module, task: Task) -> nn.Module:
        self.check(model, task)
        self.prepare(model, task)
        whole = seeded_build(lambda: self.rebuild(model, self.structure()), task.generator("zo_smoothing/model"))
        assert isinstance(whole, RobustifiedModel) and whole.encoder is not None and whole.decoder is not None
        generator = task.generator("zo_smoothing", task.device)
        like = next((p for p in model.parameters() if p.is_floating_point()), task.train.x)
        x = task.train.x.to(task.device, like.dtype)
        autoencoder = pretrain_autoencoder(
            Autoencoder(whole.encoder, whole.decoder),
            x,
            epochs=self.autoencoder_epochs,
            generator=generator,
            batch_size=self.batch_size,
        )
        black_box = BlackBox(model, task.num_classes, budget=self.query_budget)
        report = train_zo_denoiser(
            black_box, whole.denoiser, x, sigma=self.sigma, generator=generator, encoder=autoencoder.encoder,
            decoder=autoencoder.decoder, method=self.method, mu=self.mu, num_queries=self.num_queries, epochs=self.epochs,
            batch_size=self.batch_size, lr=self.lr,
        )  # fmt: skip
        self.queries_ = report.queries
        return RobustifiedModel(model, report.denoiser, report.encoder, report.decoder)

    def structure(self) -> dict[str, Any]:
        return {"shape": list(self.shape_), "queries": self.queries_}

    def rebuild(self, model: nn.Module, structure: Mapping[str, Any]) -> RobustifiedModel:
        """The front, untrained, before the model."""
        shape = structure.get("shape")
        check(bool(shape), "zo_smoothing needs the image shape; it is known after prepare or finish.")
        assert shape is not None
        autoencoder = LatentAutoencoder(shape, self.latent_dim)
        whole = RobustifiedModel(model, DnCNN(shape[0], depth=self.depth, width=self.width), autoencoder.encoder, autoencoder.decoder)  # fmt: skip
        like = next((p for p in model.parameters() if p.is_floating_point()), None)
        return whole if like is None else whole.to(like.device, like.dtype)

    def state_dict(self) -> dict[str, Any]:
        return self.structure()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shape_, self.queries_ = tuple(state["shape"]), int(state["queries"])
