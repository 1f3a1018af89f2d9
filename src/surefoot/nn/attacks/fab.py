"""FAB, the fast adaptive boundary attack: the *smallest* change that breaks an example, not the worst one of a given size
(Croce & Hein, 2020, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", arXiv 1907.02044).

With f = z_t - z_y for the class t whose linearised boundary is nearest (or for a given target, FAB-T) and w = grad f(x_k), project
the iterate x_k and the clean x on the plane {z : f(x_k) + w.(z - x_k) = 0} within the box of valid inputs, by steps d_k and d:

    x_{k+1} = (1 - a)(x_k + eta d_k) + a (x + eta d)          a = min(||d_k|| / (||d_k|| + ||d||), alpha_max)

cut to the bounds. A misclassified iterate is kept if it is the nearest so far, and the search goes on from
x + beta (x_{k+1} - x). A restart begins at a random point, at half the distance known so far, and ends with three halvings that
look for a nearer point on the segment between x and the one found. The nearest over all restarts is kept.

The projection `plane_step` is exact: the step is d_i = sign(w_i) min(t v_i, room_i), v = 1 in Linf and |w| in L2, where room_i is the
way to the bound, and t solves sum_i |w_i| min(t v_i, room_i) = c. The left side is concave and piecewise linear, so Newton's
method from below ends at the solution after finitely many steps, without sorting, for all examples at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from surefoot.errors import check, check_open_unit, check_positive
from surefoot.nn.attacks.ball import Bounds, Norm, draw, l2_norm
from surefoot.nn.attacks.losses import difference, margin
from surefoot.nn.attacks.run import (
    AttackResult,
    Mode,
    Model,
    attacking,
    check_attack,
    check_logits,
    default_generator,
    in_pieces,
    loss_and_gradient,
    piece_size,
    wrong,
)

START = {
    "linf": 0.3,
    "l2": 1.0,
}  # as a share of the range of inputs: how far restarts begin where nothing else is known
HALVINGS = 3  # of the search at the end of a restart


def plane_step(
    x: Tensor,  # [B, D]
    w: Tensor,  # [B, D]
    c: Tensor,  # [B]
    low: float | Tensor,  # scalars; -inf and inf where there are no bounds
    high: float | Tensor,
    norm: Norm,
) -> Tensor:  # [B, D]
    """The smallest d with w.d = c and low <= x + d <= high; where there is none, the corner of the box nearest to the plane."""
    pull, up = w.abs(), (w > 0) == (c >= 0)[:, None]
    room = torch.where(up, high - x, x - low).clamp_min_(0.0)
    speed = pull if norm == "l2" else (pull > 0).to(x.dtype)
    rate, most = pull * speed, pull * room
    left, tiny = c.abs(), torch.finfo(x.dtype).tiny
    time = left / rate.sum(1).clamp_min(tiny)
    capped = torch.zeros_like(up)
    for _ in range(x.shape[1]):
        reached = (time[:, None] * speed >= room) & (speed > 0)
        if torch.equal(reached, capped):
            break
        capped = reached
        rest = left - torch.where(capped, most, 0.0).sum(1)
        # rounding must not take back what is already known to be too short a time
        time = torch.maximum(time, rest / torch.where(capped, 0.0, rate).sum(1).clamp_min(tiny))
    step = torch.minimum(time[:, None] * speed, room)
    return torch.where(up, step, -step).masked_fill_(pull == 0, 0.0)


def fab(
    model: Model,
    x: Tensor,  # [B, ...] within bounds
    y: Tensor,  # int64 [B]
    *,
    eps: float | None = None,  # None: the smallest change; else only whether it is at most eps
    norm: Norm = "linf",
    steps: int = 100,
    target: Tensor | None = None,  # int64 [B]: FAB-T towards these classes
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    bounds: Bounds = (0.0, 1.0),
    random_start: bool = False,  # of the first restart, which else begins at x itself; later ones always begin at random
    early_stop: bool = True,
    mode: Mode = "eval",
    generator: torch.Generator | None = None,
) -> AttackResult:
    """`AttackResult.distance` holds the size of the smallest change found, inf where none was and 0 where the model errs anyway.

    With `eps` an example counts as broken, and `early_stop` drops it, as soon as a point within `eps` is found; points further away
    are not returned. A step costs two forward passes and a backward pass (K of them without `target`, K classes).
    """
    check_attack(x, y, 0.0 if eps is None else eps, norm, bounds, steps=steps, restarts=restarts, target=target)
    check(target is None or bool((target != y).all()), "target must differ from y: FAB-T looks for the boundary between the two.")  # fmt: skip
    check_open_unit("beta", beta)
    check(0.0 <= alpha_max <= 1.0, f"alpha_max must lie in [0, 1], got {alpha_max!r}.")
    check_positive("eta", eta)
    generator, x = default_generator(generator), x.detach()
    with attacking(model, mode, generator, x.device):
        search = _Search(model, x, y, target, norm, bounds, alpha_max, eta, beta, piece_size(x, mode))
        enough = 0.0 if eps is None or not early_stop else eps
        for restart in range(restarts if eps is None or eps > 0 else 0):
            index = (search.distance > enough).nonzero()[:, 0]
            if len(index) == 0:
                break
            point = x[index] if restart == 0 and not random_start else search.random_points(index, eps, generator)
            before = search.distance.clone()
            search.run(index, point, steps, enough)
            search.halve((search.distance < before) & (search.distance > enough))
        return search.result(eps)


@dataclass
class _Search:
    """The nearest misclassified points so far, for the whole batch."""

    model: Model
    x: Tensor
    y: Tensor
    target: Tensor | None
    norm: Norm
    bounds: Bounds
    alpha_max: float
    eta: float
    beta: float
    piece: int
    best: Tensor = field(init=False)
    distance: Tensor = field(init=False)  # [B]
    passes: int = 0

    def __post_init__(self) -> None:
        low, high = (-torch.inf, torch.inf) if self.bounds is None else self.bounds
        self.low, self.high = self.x.new_tensor(low), self.x.new_tensor(high)
        fooled = wrong(check_logits(self.logits(self.x), self.y), self.y)
        self.best, self.distance = self.x.clone(), self.x.new_zeros(len(self.x)).masked_fill_(~fooled, torch.inf)

    @torch.no_grad()
    def logits(self, at: Tensor) -> Tensor:
        self.passes += len(at)
        return in_pieces(self.model, self.piece, at)

    def size(self, d: Tensor) -> Tensor:  # [B, 1, ...]
        return l2_norm(d) if self.norm == "l2" else d.abs().amax(tuple(range(1, d.dim())), keepdim=True)

    def random_points(self, index: Tensor, eps: float | None, generator: torch.Generator) -> Tensor:
        """At half the distance known so far (at most `eps`) in a random direction."""
        origin = self.x[index]
        width = 1.0 if self.bounds is None else self.bounds[1] - self.bounds[0]
        reach = self.distance[index].clamp(max=START[self.norm] * width if eps is None else eps)
        kind = torch.rand if self.norm == "linf" else torch.randn
        way = draw(kind, origin.shape, origin, generator)
        way = 2 * way - 1 if self.norm == "linf" else way
        way = way / self.size(way) * (reach / 2).view(-1, *[1] * (origin.dim() - 1))
        return (origin + way).clamp(self.low, self.high)

    def plane(self, point: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:  # [A], [A, ...]
        """f and its gradient, for the target or the class whose linearised boundary is nearest."""
        y = self.y[index]
        self.passes += len(point)
        if self.target is not None:
            _, value, slope = loss_and_gradient(
                self.model, point, y, margin, goal=self.target[index], toward=difference, piece=self.piece
            )
            return value, slope
        point = point.detach().requires_grad_()
        logits = self.model(point)
        slopes = [torch.autograd.grad(z.sum(), point, retain_graph=True)[0] for z in logits.unbind(1)]
        slope = torch.stack(slopes, 1).flatten(2)  # [A, K, D]
        own = y[:, None, None].expand(-1, 1, slope.shape[2])
        slope = slope - slope.gather(1, own)
        value = logits.detach() - logits.detach().gather(1, y[:, None])
        dual = slope.abs().sum(2) if self.norm == "linf" else slope.norm(dim=2)
        away = (value.abs() / dual.clamp_min(torch.finfo(value.dtype).tiny)).scatter(1, y[:, None], torch.inf)
        nearest = away.argmin(1)
        rows = torch.arange(len(y), device=y.device)
        return value[rows, nearest], slope[rows, nearest].view(point.shape)

    def run(self, index: Tensor, point: Tensor, steps: int, enough: float) -> None:
        """`steps` steps from `point`, for the examples at `index`; those within `enough` leave."""
        origin = self.x[index]
        for _ in range(steps):
            value, slope = self.plane(point, index)
            w = slope.flatten(1)
            shift = -value - (w * (origin - point).flatten(1)).sum(1)
            both = torch.cat([point.flatten(1), origin.flatten(1)])
            d = plane_step(both, w.repeat(2, 1), torch.cat([-value, shift]), self.low, self.high, self.norm)
            step, own = (part.view(point.shape) for part in d.chunk(2))
            a, b = self.size(step), self.size(own)
            share = (a / (a + b).clamp_min(1e-8)).clamp(max=self.alpha_max)
            point = (1 - share) * (point + self.eta * step) + share * (origin + self.eta * own)
            point = point.clamp(self.low, self.high)
            fooled = wrong(self.logits(point), self.y[index])
            if not bool(fooled.any()):
                continue
            away = self.size(point - origin)
            closer = (fooled & (away.flatten() < self.distance[index])).nonzero()[:, 0]
            self.best[index[closer]], self.distance[index[closer]] = point[closer], away.flatten()[closer]
            point = torch.where(fooled.view(away.shape), origin + self.beta * (point - origin), point)
            if enough > 0:
                alive = (self.distance[index] > enough).nonzero()[:, 0]
                if len(alive) == 0:
                    return
                index, point, origin = index[alive], point[alive], origin[alive]

    def halve(self, which: Tensor) -> None:  # bool [B], those that got a new nearest point
        """Halvings of the way from the clean point, which is right, to the misclassified one."""
        index = which.nonzero()[:, 0]
        if len(index) == 0:
            return
        origin = self.x[index]
        way, low, high = self.best[index] - origin, *(origin.new_full((len(index),), v) for v in (0.0, 1.0))
        for _ in range(HALVINGS):
            share = (low + high) / 2
            trial = origin + share.view(-1, *[1] * (origin.dim() - 1)) * way
            fooled = wrong(self.logits(trial), self.y[index])
            low, high = torch.where(fooled, low, share), torch.where(fooled, share, high)
            hit = fooled.nonzero()[:, 0]
            self.best[index[hit]] = trial[hit]
            self.distance[index[hit]] = self.size(trial[hit] - origin[hit]).flatten()

    def result(self, eps: float | None) -> AttackResult:
        """What lies further away than `eps` counts as not found."""
        if eps is not None:
            far = (self.distance > eps).nonzero()[:, 0]
            self.best[far], self.distance[far] = self.x[far], torch.inf
        logits = self.logits(self.best)
        return AttackResult(self.best, self.distance < torch.inf, margin(logits, self.y), self.passes, distance=self.distance)  # fmt: skip
