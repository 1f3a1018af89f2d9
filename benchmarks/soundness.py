"""Every certifier of the house under attack: at least 10,000 attacked points each, and none may break.

Each recipe certifies, attacks inside the certified radius (random directions, projected gradients, the exact worst direction
where the truth is known in closed form), and then attacks again beyond it, with the radius inflated or the published mistake planted:
an attack that breaks nothing there proves nothing here. Sampled certificates are issued at ALPHA = 1e-6, so that one break among
10,000 has a chance of 1 %; whether a smoothed vote is broken is judged exactly where its probability is known, else by fresh votes whose
upper confidence bound must lie below one half, so that sampling alone breaks nothing.

    python benchmarks/soundness.py [name ...]      the table; the exit code is 1 if anything broke
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from surefoot.adversarial.adaptive_smoothing import certify_mixed
from surefoot.certified.crmt import MultiModalClassifier, OrthogonalFusion, estimate_lipschitz, multimodal_radius
from surefoot.certified.dual_smoothing import DualSmoothedClassifier
from surefoot.certified.nap import ActivationPattern, mine_naps, neuron_values, verify_nap
from surefoot.certified.prototype_rbf import ClassificationByComponents, cbc_radius
from surefoot.certified.prototype_rbf.certificate import Method as RadiusMethod
from surefoot.certified.prototype_rbf.head import Kernel
from surefoot.certified.robust_conformal import SmoothedScores, calibrate, robust_sets, true_label
from surefoot.certified.robust_conformal.sets import Bound
from surefoot.certified.rrcm import ClassifierEncoder, SmoothableClassifier
from surefoot.certified.zo_smoothing import BlackBox, RobustifiedModel
from surefoot.nn.bounds import Limits, Method, decide_margins, verified
from surefoot.nn.bounds.statements import Norm
from surefoot.nn.smoothing import Looks, certify, predict, upper_confidence_bound, vote_counts
from surefoot.shift.crop_selection import CropSelection

ALPHA, LEAST, F64 = 1e-6, 10_000, torch.float64


@dataclass(frozen=True)
class Row:
    certificates: int
    attacked: int  # points tried inside certified radii
    broken: int
    mistake: str  # what was planted
    caught: int  # certificates (or points) broken then


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- deterministic certificates: a small trained net in float64 -----------------------------------------------------------


def trained_net(seed: int = 0, size: int = 6, classes: int = 3) -> tuple[nn.Sequential, Tensor, Tensor]:
    """An MLP that separates noisy clusters in [0, 1]^size, with 300 fresh inputs and the classes it gives them."""
    g = rng(seed)
    centres = torch.rand(classes, size, generator=g, dtype=F64)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(classes, (n,), generator=g)
        return (centres[y] + 0.15 * torch.randn(n, size, generator=g, dtype=F64)).clamp(0, 1), y

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes)
        ).double()
    x, y = draw(600)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.requires_grad_(False).eval()
    fresh = draw(300)[0]
    return net, fresh, net(fresh).argmax(1)


def attack(
    model: Callable[[Tensor], Tensor],
    x: Tensor,  # [B, d]
    y: Tensor,  # [B], the certified classes
    radius: Tensor,  # [B]
    *,
    norm: str,
    starts: int,
    steps: int = 10,
    box: tuple[float, float] | None = (0.0, 1.0),
    keep: Callable[[Tensor], Tensor] | None = None,  # which points [B * starts, d] lie in the certified region
) -> tuple[int, Tensor]:
    """Points tried, and which inputs `[B]` broke: random starts, then gradient steps on the margin, every point met is judged."""
    g, rows = rng(11), len(x)
    x, y, r = (v.repeat_interleave(starts, 0) for v in (x, y, radius[:, None]))
    delta = torch.randn(x.shape, generator=g, dtype=x.dtype)
    delta = r * (delta.sign() if norm == "linf" else delta / delta.norm(dim=1, keepdim=True))
    delta *= torch.rand(len(x), 1, generator=g, dtype=x.dtype) ** (1 / x.shape[1])
    broken, tried = torch.zeros(len(x), dtype=torch.bool), 0
    for step in range(steps + 1):
        point = (x + delta) if box is None else (x + delta).clamp(*box)
        point.requires_grad_()
        logits = model(point)
        own = logits.gather(1, y[:, None])[:, 0]
        gap = logits.scatter(1, y[:, None], -torch.inf).amax(1) - own
        inside = torch.ones_like(broken) if keep is None else keep(point.detach())
        broken |= (gap >= 0) & inside
        tried += int(inside.sum())
        (grad,) = torch.autograd.grad(gap.sum(), point)
        size = r * (0.5 if step < steps // 2 else 0.1)
        if norm == "linf":
            delta = (point.detach() - x + size * grad.sign()).clamp(-r, r)
        else:
            delta = point.detach() - x + size * grad / grad.norm(dim=1, keepdim=True).clamp_min(1e-12)
            delta = delta * (r / delta.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
    return tried, broken.view(rows, starts).any(1)


def bounds(method: Method, norm: Norm, inflate: float) -> Row:
    net, x, y = trained_net()
    best = torch.zeros(len(x), dtype=F64)
    for eps in torch.linspace(0.01, 0.3, 12, dtype=F64).tolist():
        best[verified(net, x, y, eps, method=method, norm=norm)] = eps
    good = best > 0
    inside = (x[good], y[good], best[good])
    tried, broken = attack(net, *inside, norm=norm, starts=10)
    beyond = attack(net, *inside[:2], inflate * best[good], norm=norm, starts=10)[1]
    return Row(int(good.sum()), tried, int(broken.sum()), f"{norm} radius x {inflate}", int(beyond.sum()))


def complete() -> Row:
    """Radii by bisection between proof and counterexample; every proof is attacked."""
    net, x, y = trained_net(1)
    x, y = x[:25], y[:25]
    low, high = torch.zeros(len(x), dtype=F64), torch.full((len(x),), 0.4, dtype=F64)
    for i in range(len(x)):
        for _ in range(5):
            eps = float(low[i] + high[i]) / 2
            box = (x[i : i + 1] - eps).clamp(0, 1), (x[i : i + 1] + eps).clamp(0, 1)
            if decide_margins(net, *box, int(y[i]), limits=Limits(max_nodes=200)).status == "verified":
                low[i] = eps
            else:
                high[i] = eps
    good = low > 0
    tried, broken = attack(net, x[good], y[good], low[good], norm="linf", starts=60)
    beyond = attack(net, x[good], y[good], 1.5 * low[good], norm="linf", starts=60)[1]
    return Row(int(good.sum()), tried, int(broken.sum()), "linf radius x 1.5", int(beyond.sum()))


def follows(pattern: ActivationPattern, net: nn.Module, points: Tensor) -> Tensor:  # bool [B]
    return pattern.follows(neuron_values(net, points)[1])


def nap() -> Row:
    """Points that follow the pattern within the ball; the mistake is to forget that only these are promised."""
    net, x, y = trained_net(2)
    naps = mine_naps(net, x, y, delta=0.8)
    tried = broken = certificates = caught = 0
    for eps in (0.1, 0.2, 0.3):
        for i in range(0, 60, 3):
            pattern, point, label = naps[int(y[i])], x[i : i + 1], y[i : i + 1]
            if not bool(pattern.follows(neuron_values(net, point)[1])):
                continue
            found = verify_nap(
                net, pattern, int(label), center=point, eps=eps, witness=point, limits=Limits(max_nodes=100)
            )
            if found.verified:
                certificates += 1
                radius = torch.tensor([eps], dtype=F64)
                more, hit = attack(net, point, label, radius, norm="linf", starts=80, keep=partial(follows, pattern, net))  # fmt: skip
                tried, broken = tried + more, broken + int(hit.sum())
                caught += int(attack(net, point, label, 1.5 * radius, norm="linf", starts=80)[1].sum())
    return Row(certificates, tried, broken, "no pattern, radius x 1.5", caught)


def prototypes(kernel: Kernel, method: RadiusMethod) -> Row:
    tried = broken = certificates = caught = 0
    for seed in range(3):
        head = ClassificationByComponents(6, 8, 4, kernel=kernel, generator=rng(seed)).double().requires_grad_(False)
        x = 1.5 * torch.randn(300, 6, generator=rng(seed + 50), dtype=F64)
        found = cbc_radius(head, x, method=method)
        good = (found.radius > 0) & found.radius.isfinite()
        known = (x[good], found.prediction[good])
        more, hit = attack(head, *known, found.radius[good], norm="l2", starts=3, box=None)
        beyond = attack(head, *known, 6 * found.radius[good], norm="l2", starts=3, box=None)[1]
        certificates, tried = certificates + int(good.sum()), tried + more
        broken, caught = broken + int(hit.sum()), caught + int(beyond.sum())
    return Row(certificates, tried, broken, "L2 radius x 6 (not tight)", caught)


def crmt() -> Row:
    encoders = [nn.Sequential(nn.Linear(4, 10, dtype=F64), nn.ReLU(), nn.Linear(10, 5, dtype=F64)) for _ in range(2)]
    for m, encoder in enumerate(encoders):
        for p in encoder.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=rng(m), dtype=F64)
    model = MultiModalClassifier(
        encoders, OrthogonalFusion([5, 5], 3, a_init=1.0, generator=rng(3)).double(), [[4], [4]]
    )
    model.requires_grad_(False).eval()
    x = 2 * torch.randn(300, 8, generator=rng(4), dtype=F64)
    y = model(x).argmax(1)
    radius = multimodal_radius(model, x, y, estimate_lipschitz(model, [x], "product")).radius
    tried, broken = attack(model, x, y, radius, norm="l2", starts=4, box=None)
    slope = estimate_lipschitz(model, [x[:3]], "empirical")  # the published shortcut: gradients seen on data
    wrong = multimodal_radius(model, x, y, slope).radius
    caught = attack(model, x, y, 1.5 * wrong, norm="l2", starts=4, box=None)[1]
    return Row(len(x), tried, int(broken.sum()), "empirical constants x 1.5", int(caught.sum()))


# --- smoothing: votes with a probability known in closed form ------------------------------------------------------------


class Band(nn.Module):
    """Class 1 where low < x_0 < high, else class 0; under N(0, sigma^2) its probability is a difference of two Phi."""

    low, high = -0.4, 0.9

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1)[:, 0]
        inside = torch.minimum(z - self.low, self.high - z)
        return torch.stack([-inside, inside], 1)

    def truth(self, x: Tensor, sigma: float) -> Tensor:  # probability of class 1, [B]
        z = x.flatten(1)[:, 0].double()
        return torch.special.ndtr((self.high - z) / sigma) - torch.special.ndtr((self.low - z) / sigma)


def hit_band(x: Tensor, prediction: Tensor, radius: Tensor, sigma: float, share: float = 0.5) -> tuple[int, int]:
    """Points tried and broken: moved by the whole radius along +-x_0 (the worst), and in a random direction.

    Broken where the certified class's true probability is not above `share`, which is 1/2 for votes alone.
    """
    way = torch.zeros_like(x, dtype=F64)
    way[:, 0] = 1.0
    random = torch.randn(x.shape, generator=rng(5), dtype=F64)
    tried, broken = 0, torch.zeros(len(x), dtype=torch.bool)
    for direction in (way, -way, random / random.norm(dim=1, keepdim=True)):
        p = Band().truth(x.double() + (1 - 1e-9) * radius[:, None] * direction, sigma)
        broken |= torch.where(prediction == 1, p, 1 - p) <= share
        tried += len(x)
    return tried, int(broken.sum())


def smoothing(looks: Looks | None = None, mix: float | None = None) -> Row:
    """Plain, group-sequential, and mixed with an accurate net that may say anything (the share asked for grows)."""
    sigma, x = 0.5, 1.5 * torch.randn(12_000, 4, generator=rng(6))
    options = {"sigma": sigma, "num_classes": 2, "generator": rng(7), "n0": 50}
    share = 0.5
    if mix is not None:
        found, share = certify_mixed(Band(), x, alpha=mix, n=400, level=ALPHA, **options), 1 / (2 * mix)
    else:
        found = certify(
            Band(), x, n=400, alpha=ALPHA, looks=looks, shared=False, **options
        )  # each may break for itself
    sure = ~found.abstained
    known = (x[sure], found.prediction[sure])
    tried, broken = hit_band(*known, found.radius[sure], sigma, share)
    caught = hit_band(*known, 1.5 * found.radius[sure], sigma, share)[1]
    return Row(int(sure.sum()), tried, broken, "L2 radius x 1.5", caught)


def prediction() -> Row:
    """The two-sided test: a named class must be the true top class. The mistake: naming it without the test."""
    sigma, x = 0.5, 1.5 * torch.randn(30_000, 4, generator=rng(8))
    options = {"sigma": sigma, "num_classes": 2, "generator": rng(9)}
    top = (Band().truth(x, sigma) > 0.5).long()
    named = predict(Band(), x, n=200, alpha=ALPHA, **options)
    sure = named >= 0
    plain = vote_counts(Band(), x, 200, **options).argmax(1)
    return Row(int(sure.sum()), int(sure.sum()), int((named != top)[sure].sum()), "no test", int((plain != top).sum()))


class Half(nn.Module):
    """Reads one pixel: class 1 above a threshold."""

    def __init__(self, pixel: tuple[int, int], threshold: float) -> None:
        super().__init__()
        self.pixel, self.threshold = pixel, threshold

    def forward(self, x: Tensor) -> Tensor:
        z = x[:, 0, self.pixel[0], self.pixel[1]] - self.threshold
        return torch.stack([-z, z], 1)


def dual() -> Row:
    """Each half votes by one of its own pixels; the worst direction is the radius's own. The mistake: sqrt(r_l^2 + r_r^2)."""
    sigma, x = 0.5, torch.rand(6000, 1, 4, 4, generator=rng(10), dtype=F64)
    model = DualSmoothedClassifier(Half((0, 0), 0.4), Half((0, 1), 0.5), sigma=sigma, num_classes=2, shape=(1, 4, 4))
    found = model.certify(x, generator=rng(11), n0=50, n=400, alpha=ALPHA)
    sure = found.prediction >= 0

    def hit(radius: Tensor) -> tuple[int, int]:
        sign = 2.0 * found.prediction[sure] - 1
        at = torch.stack([x[sure, 0, 0, 0] - 0.4, x[sure, 0, 0, 1] - 0.5], 1)
        tried, broken = 0, torch.zeros(len(at), dtype=torch.bool)
        for angle in torch.linspace(0, 2, 9).tolist()[:-1]:
            way = torch.tensor([torch.pi * angle], dtype=F64)
            moved = at + (1 - 1e-9) * radius[:, None] * torch.cat([way.cos(), way.sin()])
            broken |= torch.special.ndtr(sign[:, None] * moved / sigma).sum(1) <= 1.0
            tried += len(at)
        return tried, int(broken.sum())

    tried, broken = hit(found.radius[sure])
    low = torch.stack([found.p_left, found.p_right]).clamp(0.5, 1 - 1e-12)[:, sure]
    wrong = sigma * torch.special.ndtri(low).square().sum(0).sqrt()
    return Row(int(sure.sum()), tried, broken, "root of squared radii", hit(wrong)[1])


# --- smoothing of nets: votes estimated ----------------------------------------------------------------------------------


def hit_votes(base: nn.Module, guide: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, radius: Tensor, sigma: float, starts: int) -> tuple[int, Tensor]:  # fmt: skip
    """Points tried and which inputs broke: gradients of the mean softmax under noise, judged by fresh votes in two stages."""
    g, shape = rng(12), x.shape
    noise = sigma * torch.randn(16, 1, *shape[1:], generator=g, dtype=x.dtype)
    many, labels, r = (v.repeat_interleave(starts, 0) for v in (x, y, radius.to(x).view(-1, *[1] * (x.dim() - 1))))
    step = torch.randn(many.shape, generator=g, dtype=x.dtype)
    for _ in range(6):
        norm = step.flatten(1).norm(dim=1).clamp_min(1e-12).view_as(r)
        point = (many + r * step / norm).detach().requires_grad_()
        mean = guide((point[None] + noise).flatten(0, 1)).softmax(1).view(16, len(many), -1).mean(0)
        (grad,) = torch.autograd.grad(mean.gather(1, labels[:, None]).sum(), point)
        size = grad.flatten(1).norm(dim=1).clamp_min(1e-12).view_as(r)
        step = step / norm - grad / size
    point = (many + (1 - 1e-6) * r * step / step.flatten(1).norm(dim=1).clamp_min(1e-12).view_as(r)).detach()
    broken, open_ = torch.zeros(len(point), dtype=torch.bool), torch.arange(len(point))
    for draws in (100, 5000):  # most points are clear after a hundred votes
        counts = vote_counts(base, point[open_], draws, sigma=sigma, num_classes=mean.shape[1], generator=g)
        own = counts.gather(1, labels[open_, None])[:, 0]
        if draws > 100:
            broken[open_] = upper_confidence_bound(own, draws, ALPHA) < 0.5
        open_ = open_[own < 0.8 * draws]
        if draws == 100 and len(open_) > 200:
            open_ = open_[own[own < 0.8 * draws].argsort()[:200]]  # the most doubtful ones
    return len(point), broken.view(len(x), starts).any(1)


def net_votes(wrap: Callable[[nn.Sequential], tuple[nn.Module, nn.Module]]) -> Row:
    """A net behind a method's pipeline, smoothed: `wrap` gives the base that is certified and the differentiable twin."""
    sigma = 0.3
    net, flat, _ = trained_net(3, size=16)
    inner = nn.Sequential(nn.Flatten(), *net).float()
    base, guide = wrap(inner)
    x = flat.float().view(-1, 1, 4, 4)[:180]
    found = certify(base, x, sigma=sigma, num_classes=3, generator=rng(13), n=1000, alpha=ALPHA)
    sure = ~found.abstained
    known = (base, guide, x[sure], found.prediction[sure])
    tried, broken = hit_votes(*known, found.radius[sure], sigma, 60)
    caught = hit_votes(*known, 1.5 * found.radius[sure] + 0.2, sigma, 2)[1]
    return Row(int(sure.sum()), tried, int(broken.sum()), "L2 radius x 1.5 + 0.2", int(caught.sum()))


def rrcm_base(inner: nn.Sequential) -> tuple[nn.Module, nn.Module]:
    model = SmoothableClassifier(ClassifierEncoder(inner, 3, (1, 4, 4)), 3, sigma=0.3, time=0.6)
    model.head.load_state_dict(inner[-1].state_dict())
    model.requires_grad_(False).eval()
    return model, model


def zo_base(inner: nn.Sequential) -> tuple[nn.Module, nn.Module]:
    blur = nn.Conv2d(1, 1, 3, padding=1, bias=False).requires_grad_(False)
    blur.weight.fill_(0.05)[0, 0, 1, 1] = 0.6

    def answers(rows: Tensor) -> Tensor:  # arrays in, arrays out
        with torch.no_grad():
            return inner(torch.as_tensor(rows))

    return RobustifiedModel(BlackBox(answers, 3), blur), RobustifiedModel(inner, blur)


# --- conformal sets ------------------------------------------------------------------------------------------------------


def conformal() -> Row:
    """Smoothed scores known, Phi(x): no label kept for the clean input may leave the set when the input is moved by eps; the
    Monte-Carlo form must keep 1 - alpha of 20 attacked worlds. The mistake: no shift by eps / sigma."""
    eps, alpha, g = 0.5, 0.1, rng(14)
    covered: list[float] = []
    unshifted: list[float] = []
    ways: tuple[tuple[list[float], Bound, float], ...] = ((covered, "bernstein", eps), (unshifted, "none", 0.0))
    for _ in range(20):
        x = torch.randn(1500, 4, generator=g, dtype=F64)
        y = torch.distributions.Categorical(logits=-3 * x).probs.cumsum(1)
        label = (torch.rand(len(x), 1, generator=g, dtype=F64) > y).sum(1).clamp(max=3)
        push = eps * nn.functional.one_hot(label, 4)

        def scores(at: Tensor) -> SmoothedScores:
            hits = (at[:, None] + torch.randn(len(at), 64, 4, generator=g, dtype=F64) > 0).double()
            return SmoothedScores(hits.mean(1), hits.var(1), 64)

        clean, attacked = scores(x[:500]), scores((x + push)[500:])
        means = true_label(clean.mean, label[:500])
        for kept, bound, shift in ways:
            threshold = calibrate(means, alpha=alpha, bound=bound)
            mask = robust_sets(attacked, threshold, eps=shift, sigma=1.0, bound=bound).mask
            kept.append(true_label(mask, label[500:]).double().mean().item())
    low, wrong = (torch.tensor(v).mean().item() for v in (covered, unshifted))
    room = 3 * (alpha * (1 - alpha) / 500 / 20) ** 0.5  # of calibration, over 20 worlds
    missing = max(0, round((1 - alpha - room - low) * 20_000))
    return Row(20, 20_000, missing, "no shift by eps", max(0, round((1 - alpha - room - wrong) * 20_000)))


# --- a camera that moves: the choice of pixels itself is certified --------------------------------------------------------


def crop_selection() -> Row:
    """Every window within the certified shift must select the very same pixels. Half of the frames are mirrored, so that scores tie.

    The mistake is a certificate from the centre window alone, blind to the pixels that a shift brings in.
    """
    g, size, shift = rng(0), 20, 2
    side = size + 2 * shift
    model = CropSelection(nn.Flatten(), size, 8)
    noise = torch.randint(256, (1500, 1, side, side), generator=g, dtype=torch.uint8)
    half = torch.randint(256, (1500, 1, side, side // 2), generator=g, dtype=torch.uint8)
    frames = torch.cat([noise, torch.cat([half, half.flip(3)], 3)])
    good = model.certify(frames, shift)
    assert good is not None
    centre = frames[:, :, shift:-shift, shift:-shift]
    at, crops = model.select(centre), model.crop(centre)
    naive = ((at >= shift) & (at <= size - 8 - shift)).all(1)
    changed, tried = torch.zeros_like(good), 0
    for dy in range(2 * shift + 1):
        for dx in range(2 * shift + 1):
            if (dy, dx) != (shift, shift):
                moved = model.crop(frames[:, :, dy : dy + size, dx : dx + size])
                changed |= (moved != crops).flatten(1).any(1)
                tried += int(good.sum())
    return Row(int(good.sum()), tried, int((good & changed).sum()), "certified by the centre window", int((naive & changed).sum()))  # fmt: skip


RECIPES: dict[str, Callable[[], Row]] = {
    "IBP, Linf": lambda: bounds("ibp", "linf", 3.0),
    "CROWN, Linf": lambda: bounds("crown", "linf", 1.5),
    "CROWN, L2": lambda: bounds("crown", "l2", 1.5),
    "alpha-CROWN, Linf": lambda: bounds("alpha-crown", "linf", 1.5),
    "complete verification": complete,
    "nap": nap,
    "prototype_rbf, closed form": lambda: prototypes("exp", "closed"),
    "prototype_rbf, bisection": lambda: prototypes("gaussian", "bisect"),
    "crmt": crmt,
    "smoothing": smoothing,
    "smoothing, sequential": lambda: smoothing(Looks.geometric(1600, target=0.4)),
    "smoothing, prediction": prediction,
    "dual_smoothing": dual,
    "adaptive_smoothing": lambda: smoothing(mix=0.8),
    "rrcm": lambda: net_votes(rrcm_base),
    "zo_smoothing": lambda: net_votes(zo_base),
    "robust_conformal": conformal,
    "crop_selection": crop_selection,
}


def main() -> int:
    print(f"{'certifier':28} {'certificates':>12} {'attacked':>9} {'broken':>6}   planted mistake")
    total = 0
    for name, recipe in RECIPES.items():
        if not sys.argv[1:] or any(word in name for word in sys.argv[1:]):
            start = time.perf_counter()
            row = recipe()
            total += row.broken
            print(f"{name:28} {row.certificates:12,} {row.attacked:9,} {row.broken:6}   {row.mistake}: {row.caught:,} broken  ({time.perf_counter() - start:.1f} s)", flush=True)  # fmt: skip
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
