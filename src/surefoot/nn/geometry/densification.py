"""Adding and removing splats while their optimiser's state follows row by row.

The rule of 3D Gaussian splatting: splats whose projected mean is pulled hard (the mean norm of dL/d means2d in normalised device
units over the views that saw them) are cloned if small and split in two if large; faint ones are pruned. Kerbl et al., 2023, 2308.04079.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surefoot.errors import check
from surefoot.nn.geometry.rasterizer import RenderOut
from surefoot.nn.geometry.rotations import quaternion_to_matrix
from surefoot.nn.geometry.splats import NAMES, GaussianScene


def splat_optimizer(
    scene: GaussianScene,
    extent: float,
    *,
    means: float = 1.6e-4,
    log_scales: float = 5e-3,
    quats: float = 1e-3,
    opacity: float = 0.05,
    sh: float = 2.5e-3,
) -> torch.optim.Adam:
    """Adam with one group a parameter (named in `group["name"]`); the rate of the means is in units of the scene's extent."""
    rates = {"means": means * extent, "log_scales": log_scales, "quats": quats, "logit_opacities": opacity, "sh": sh}
    groups = [{"params": [getattr(scene, name)], "lr": rate, "name": name} for name, rate in rates.items()]
    return torch.optim.Adam(groups, lr=0.0, eps=1e-15)


@torch.no_grad()
def change_rows(
    scene: GaussianScene, optimizer: torch.optim.Optimizer | None, keep: Tensor, added: dict[str, Tensor] | None = None
) -> None:
    """Keep the rows `keep` (bool or index) of every parameter, append `added`, and let the optimiser's moments follow; new rows start at 0."""
    groups = {} if optimizer is None else {id(g["params"][0]): g for g in optimizer.param_groups}
    for name in NAMES:
        old = getattr(scene, name)
        kept = old.detach()[keep]
        extra = kept[:0] if added is None else added[name].to(kept)
        new = nn.Parameter(torch.cat([kept, extra]))
        setattr(scene, name, new)
        group = groups.get(id(old))
        if optimizer is None or group is None:
            continue
        group["params"] = [new]
        state = optimizer.state.pop(old, None)
        if state is not None:
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == old.shape:
                    state[key] = torch.cat([value[keep], torch.zeros_like(extra)])
            optimizer.state[new] = state
    extra_rows = 0 if added is None else len(added["means"])
    scene.filter_3d = torch.cat([scene.filter_3d[keep], scene.filter_3d.new_zeros(extra_rows)])


@dataclass
class DensificationStrategy:
    """When and where splats are added and removed. Steps count from 0; `observe` after every backward pass, `step` after it."""

    start: int = 500
    stop: int = 15_000
    every: int = 100
    threshold: float = 2e-4
    split_size: float = 0.01  # of the extent: smaller splats are cloned, larger ones split
    least_opacity: float = 0.005
    reset_every: int | None = 3000
    most_splats: int | None = None
    most_radius: int = 20  # pixels, after the first opacity reset
    most_size: float = 0.1  # of the extent, after the first opacity reset
    sum_: Tensor | None = field(default=None, repr=False)
    count_: Tensor | None = field(default=None, repr=False)
    radius_: Tensor | None = field(default=None, repr=False)
    was_reset_: bool = False

    @torch.no_grad()
    def observe(self, out: RenderOut, width: int, height: int) -> None:
        """Add one view's pull on the projected means."""
        gradient = out.means2d.grad
        check(gradient is not None, "Densification reads the gradient of means2d: call observe after backward().")
        assert gradient is not None
        gradient = gradient.reshape(-1, 2)
        pull = (gradient * gradient.new_tensor([width / 2, height / 2])).norm(dim=1)
        if self.sum_ is None or len(self.sum_) != len(pull):
            self._forget(pull)
        assert self.sum_ is not None and self.count_ is not None and self.radius_ is not None
        self.sum_ += pull * out.visible
        self.count_ += out.visible
        self.radius_ = torch.maximum(self.radius_, out.radii.to(pull))

    def _forget(self, like: Tensor) -> None:
        self.sum_, self.count_, self.radius_ = torch.zeros_like(like), torch.zeros_like(like), torch.zeros_like(like)

    @torch.no_grad()
    def step(
        self,
        scene: GaussianScene,
        optimizer: torch.optim.Optimizer,
        step: int,
        extent: float,
        generator: torch.Generator,
    ) -> None:
        """Densify and prune where the schedule says so."""
        if self.start <= step < self.stop and step % self.every == 0 and self.sum_ is not None:
            self._densify(scene, optimizer, extent, generator)
            self._prune(scene, optimizer, extent)
            self._forget(scene.logit_opacities.detach())
        if self.reset_every is not None and 0 < step < self.stop and step % self.reset_every == 0:
            scene.logit_opacities.clamp_(max=float(torch.logit(torch.tensor(0.01))))
            for value in optimizer.state.get(scene.logit_opacities, {}).values():
                if isinstance(value, Tensor) and value.shape == scene.logit_opacities.shape:
                    value.zero_()
            self.was_reset_ = True

    def _densify(
        self, scene: GaussianScene, optimizer: torch.optim.Optimizer, extent: float, generator: torch.Generator
    ) -> None:
        assert self.sum_ is not None and self.count_ is not None and self.radius_ is not None
        pull = self.sum_ / self.count_.clamp_min(1)
        chosen = pull > self.threshold
        if self.most_splats is not None and int(chosen.sum()) > max(0, self.most_splats - len(scene)):
            room = max(0, self.most_splats - len(scene))
            chosen = torch.zeros_like(chosen).index_fill(0, pull.topk(room).indices, True) & chosen
        large = scene.log_scales.exp().amax(1) > self.split_size * extent
        clone, split = (chosen & ~large).nonzero().squeeze(1), (chosen & large).nonzero().squeeze(1)
        added = {
            name: torch.cat([getattr(scene, name)[clone], getattr(scene, name)[split].repeat_interleave(2, 0)])
            for name in NAMES
        }
        twice = split.repeat_interleave(2)
        noise = torch.randn(len(twice), 3, generator=generator, device=generator.device).to(scene.means)
        offset = quaternion_to_matrix(scene.quats[twice]) @ (noise * scene.log_scales[twice].exp())[..., None]
        added["means"][len(clone) :] += offset.squeeze(-1)
        added["log_scales"][len(clone) :] -= torch.log(torch.tensor(1.6))
        keep = torch.ones_like(chosen).index_fill(0, split, False)
        self.radius_ = torch.cat([self.radius_[keep], self.radius_.new_zeros(len(added["means"]))])
        change_rows(scene, optimizer, keep, added)

    def _prune(self, scene: GaussianScene, optimizer: torch.optim.Optimizer, extent: float) -> None:
        keep = scene.logit_opacities.sigmoid() >= self.least_opacity
        if self.was_reset_:
            assert self.radius_ is not None
            keep &= (self.radius_ <= self.most_radius) & (scene.log_scales.exp().amax(1) <= self.most_size * extent)
        if not bool(keep.all()) and int(keep.sum()) >= 2:
            change_rows(scene, optimizer, keep)
