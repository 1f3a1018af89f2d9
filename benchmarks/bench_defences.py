"""Defences beside their plain formulas, and beside what they replace: CrossMax, adaptive smoothing, doubly robust training, tightness.

- crossmax: the aggregation against the published steps with their sort, batched and one image at a time; the random input against a loop over
  images on the same draws; one pass of the self-ensemble against as many plain passes as it has predictors
- adaptive_smoothing: a pass of the mixture against the passes of its two networks, tiny ones and two ResNet-18; the attack on the whole against torchattacks' PGD
  on the same composite, equal steps, at equal robust accuracy
- doubly_robust: a training step against adversarial training with as many attack steps (the price); the weights against their formula in a loop
- ibp_tightness: both radii of a net against auto-lirpa's interval and CROWN bounds at a radius that flips no neuron, tracing
  included on both sides, and against the product of matrices, sample by sample

Results must agree before a time counts. Both sides take turns (`_timing.py`). Run: python benchmarks/bench_defences.py
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import _lirpa
from _timing import Row, in_turn, memory_mb, row
from bench_tract import cifar_resnet18
from surefoot.adversarial.adaptive_smoothing import (
    AdaptiveSmoothing,
    AdaptiveSmoothingClassifier,
    AdversarialTraining,
    MixedClassifier,
    MixingNetwork,
    attack_composite,
    feature_sizes,
)
from surefoot.adversarial.crossmax import (
    MultiResolutionClassifier,
    MultiResolutionInput,
    SelfEnsemble,
    crossmax,
    widen_first_conv,
)
from surefoot.adversarial.crossmax.inputs import brightness
from surefoot.adversarial.doubly_robust import DoublyRobust, KLDROLoss, kl_objective, kl_weights
from surefoot.certified.ibp_tightness import propagation_tightness
from surefoot.core.task import Task, Training
from surefoot.core.treatment import Batch
from surefoot.datasets.embedded import digits
from surefoot.models import mlp, seeded_build, small_cnn
from surefoot.nn.attacks import pgd_train
from surefoot.nn.bounds import margin_rows
from surefoot.nn.taps import layer_names, spread, tapped
from surefoot.training.loop import fit

EPS, STEPS = 0.1, 20
Call = Callable[[], Any]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def compared(what: str, ours: Call, peer: str, theirs: Call, quality: str, note: str = "") -> Row:
    mine, other = in_turn(ours, theirs)
    return row(what, mine, peer, other, quality, note, ours_mb=memory_mb(ours), peer_mb=memory_mb(theirs))


def equal(ours: Tensor, theirs: Tensor, within: float) -> str:
    """How far apart, relative to the scale; refuses to go on where that is too far."""
    gap = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
    if not gap <= within:
        raise RuntimeError(f"The two sides differ by {gap:.2g} of their scale; times would compare different work.")
    return f"equal to {gap:.0e} of the scale"


# --- crossmax -------------------------------------------------------------------------------------------------------


def sorted_votes(logits: Tensor, k: int) -> Tensor:  # [B, N, K] -> [B, K]
    """The published steps: the greatest class off each predictor, the greatest predictor off each class, sort, take the k-th."""
    z = logits - logits.max(2, keepdim=True).values
    z = z - z.max(1, keepdim=True).values
    return z.sort(1, descending=True).values[:, k - 1]


def aggregation(classes: int) -> list[Row]:
    logits, k, what = torch.randn(512, 8, classes, generator=rng()), 3, f"CrossMax, 512 x 8 predictors x {classes} classes, third largest"  # fmt: skip

    def ours() -> Tensor:
        return crossmax(logits, k=k)

    def image_by_image() -> Tensor:
        return torch.cat([sorted_votes(one[None], k) for one in logits])

    whole = equal(ours(), sorted_votes(logits, k), 0.0)
    loop = equal(ours(), image_by_image(), 0.0)
    return [
        compared(what, ours, "published steps, sorted", lambda: sorted_votes(logits, k), whole),
        compared(what, ours, "the same, one image after another", image_by_image, loop),
    ]


def looped_copies(x: Tensor, sizes: Sequence[int], jitter: int, g: torch.Generator) -> Tensor:
    """The published input, image by image with `torch.roll`, on the draws that `MultiResolutionInput` makes from the same stream."""
    copies, n, full = [], len(x), x.shape[2:]
    for size in sizes:
        shift = ((2 * jitter + 1) * torch.rand(n, 2, generator=g)).floor().long() - jitter
        grey, contrast = (a + (b - a) * torch.rand(n, 1, 1, 1, generator=g) for a, b in ((0.5, 1.0), (0.7, 1.5)))
        low, high = (torch.rand(n, x.shape[1], *s, generator=g) for s in ((size, size), full))
        images = []
        for i in range(n):
            one = x[i : i + 1]
            mean = brightness(one)
            one = torch.roll(contrast[i] * (one - mean) + mean, (int(shift[i, 0]), int(shift[i, 1])), (2, 3))
            one = grey[i] * one + (1 - grey[i]) * one.mean(1, keepdim=True)
            if size != full[0]:
                one = F.interpolate(one, size=(size, size), mode="bicubic")
            one = one + 0.2 * low[i]
            if size != full[0]:
                one = F.interpolate(one, size=tuple(full), mode="bicubic")
            images.append((one + 0.2 * high[i]).clamp(0, 1))
        copies.append(torch.cat(images))
    return torch.cat(copies, 1)


@torch.no_grad()
def random_input() -> Row:
    x, sizes = torch.rand(64, 3, 32, 32, generator=rng()), (32, 16, 8, 4)

    def ours() -> Tensor:
        return MultiResolutionInput(sizes, generator=rng(1))(x)

    def loop() -> Tensor:
        return looped_copies(x, sizes, 3, rng(1))

    return compared("CrossMax, random copies of 64 x 3 x 32 x 32 at four sizes", ours, "loop over images", loop, equal(ours(), loop(), 1e-5))  # fmt: skip


def self_ensemble() -> list[Row]:
    """Not the same thing on both sides: what the predictors of one pass cost beside an ensemble of as many networks."""
    x, classes, sizes = torch.rand(64, 3, 32, 32, generator=rng()), 10, (32, 16, 8, 4)
    net = seeded_build(lambda: small_cnn((3, 32, 32), classes, widths=(32, 64, 64)), rng()).eval()
    several = MultiResolutionClassifier(MultiResolutionInput(sizes, generator=rng(2)), widen_first_conv(net, 4)).eval()
    found = []
    for model, kind in ((net, "layers of one net"), (several, "layers and four resolutions")):
        with torch.no_grad():
            names = spread(layer_names(model, x[:2]), 4)
        ensemble = SelfEnsemble(model, names, classes, example=x[:2]).eval()
        count = len(names) + 1

        @torch.no_grad()
        def ours(ensemble: SelfEnsemble = ensemble) -> Tensor:
            return ensemble(x)

        @torch.no_grad()
        def passes(count: int = count) -> Tensor:
            return torch.stack([net(x) for _ in range(count)], 1)

        head = "head equal to " + equal(ensemble.predictors(x)[:, -1].detach(), net(x).detach(), 1e-5)[9:] if model is net else ""  # fmt: skip
        found.append(compared(f"CrossMax, one pass of {kind}, {count} predictors, batch 64", ours, f"{count} plain passes", passes, head))  # fmt: skip
    return found


# --- adaptive smoothing ---------------------------------------------------------------------------------------------


def composite(task: Task) -> tuple[nn.Module, nn.Module, AdaptiveSmoothingClassifier]:
    training, nets = Training(epochs=12, batch_size=64, lr=4e-3), []
    for method in ((), (AdversarialTraining(EPS, None, steps=4),)):
        net = seeded_build(lambda: small_cnn((1, 8, 8), 10), task.generator("model"))
        nets.append(fit(net, task, training, method).model.eval())
    mixed = AdaptiveSmoothing(eps=EPS, mixing_epochs=1, attack_steps=4).mixture(nets[0], nets[1], task)
    return nets[0], nets[1], mixed.eval()


def mixture(accurate: nn.Module, robust: nn.Module, adaptive: AdaptiveSmoothingClassifier, x: Tensor) -> list[Row]:
    fixed = MixedClassifier(accurate, robust, alpha=0.8, robust_scale=3.0).eval()

    @torch.no_grad()
    def both() -> tuple[Tensor, Tensor]:
        return accurate(x), robust(x)

    g, h = both()
    found = []
    for model, kind in ((fixed, "fixed weight"), (adaptive, "mixing network")):
        with torch.no_grad():
            alpha = 0.8 if model is fixed else adaptive.mix(x)[2][:, None]
            plain = ((1 - alpha) * g.double().softmax(1) + alpha * (3.0 * h.double()).softmax(1)).log().float()

        @torch.no_grad()
        def ours(model: nn.Module = model) -> Tensor:
            return model(x)

        note = "" if model is fixed else mixing_share(adaptive, x, both)
        found.append(compared(f"adaptive smoothing, a pass with a {kind}, batch {len(x)}", ours, "passes of the two nets", both, equal(ours(), plain, 1e-5), note))  # fmt: skip
    return found


def mixing_share(adaptive: AdaptiveSmoothingClassifier, x: Tensor, both: Call) -> str:
    """What the mixing network itself takes, once the features are there."""
    with torch.no_grad():
        features = [tapped(net, names, x)[1] for net, names in ((adaptive.accurate, adaptive.names_g), (adaptive.robust, adaptive.names_h))]  # fmt: skip

    @torch.no_grad()
    def mixing() -> Tensor:
        return adaptive.mixing(*features)

    alone, nets = in_turn(mixing, both)
    return f"the mixing network alone takes {alone / nets:.2f} of the two nets' passes"


def large_mixture() -> Row:
    """The price where the method is meant to be used: the treatment's own mixing network on a pair of ResNet-18, untrained."""
    nets = [seeded_build(cifar_resnet18, rng(k)).eval() for k in range(2)]
    x, names = torch.rand(16, 3, 32, 32, generator=rng(8)), ("5", "7")  # blocks that give 128 and 256 channels
    sizes = feature_sizes(nets[0], names, x)
    mixing = seeded_build(lambda: MixingNetwork(sizes, sizes, widths=(min(64, sizes[1] // 2),), blocks=1), rng(2))
    model = AdaptiveSmoothingClassifier(nets[0], nets[1], mixing, feature_modules=(names, names)).eval()

    @torch.no_grad()
    def ours() -> Tensor:
        return model(x)

    @torch.no_grad()
    def both() -> tuple[Tensor, Tensor]:
        return nets[0](x), nets[1](x)

    g, h = both()
    with torch.no_grad():
        alpha = model.mix(x)[2][:, None]
    plain = ((1 - alpha) * g.double().softmax(1) + alpha * h.double().softmax(1)).log().float()
    return compared("adaptive smoothing, a pass of two ResNet-18 with a mixing network, batch 16", ours, "passes of the two nets", both, equal(ours(), plain, 1e-5))  # fmt: skip


def whole_attack(model: AdaptiveSmoothingClassifier, x: Tensor, y: Tensor) -> Row:
    what = f"adaptive smoothing, attack on the whole, {STEPS} steps, {len(x)} digits"

    def ours() -> Tensor:
        return attack_composite(model, x, y, eps=EPS, steps=STEPS, generator=rng(3))

    @torch.no_grad()
    def robust(points: Tensor) -> float:
        return (model(points).argmax(1) == y).double().mean().item()

    try:
        peer = importlib.import_module("torchattacks")
    except ImportError:
        return row(what, in_turn(ours)[0], "torchattacks PGD", None, f"robust accuracy {robust(ours()):.3f}", "torchattacks is not installed", ours_mb=memory_mb(ours))  # fmt: skip
    torch.manual_seed(0)  # its random start draws from the global stream
    attack = peer.PGD(model, eps=EPS, alpha=2.5 * EPS / STEPS, steps=STEPS)

    def theirs() -> Tensor:
        return attack(x, y)

    mine, other = robust(ours()), robust(theirs())
    if mine > other + max(0.005, 3 / len(y)):
        raise RuntimeError(f"Robust accuracies {mine:.3f} and {other:.3f}: ours is the weaker attack.")
    return compared(what, ours, "torchattacks PGD", theirs, f"robust accuracy {mine:.3f} | {other:.3f}")


# --- doubly robust --------------------------------------------------------------------------------------------------


def training_steps(task: Task) -> list[Row]:
    """Not the same thing on both sides, but at temperature infinity, which is what the check uses."""
    x, y = task.train.x[:128], task.train.labels[:128]
    net, steps, found = seeded_build(lambda: small_cnn((1, 8, 8), 10), rng()).train(), 5, []

    def batch() -> Batch:
        return Batch(x, y, torch.arange(len(x)), epoch=0, step=5, steps_per_epoch=10, steps=10, generator=rng(4))

    def plain() -> Tensor:
        moved = pgd_train(net, x, y, eps=EPS, steps=steps, step_size=EPS / 3, generator=rng(4))
        return F.cross_entropy(net(moved), y)

    def step(loss: Callable[[], Tensor]) -> Call:
        def call() -> None:
            net.zero_grad(set_to_none=True)
            loss().backward()

        return call

    def treated(**settings: Any) -> Callable[[], Tensor]:
        method = DoublyRobust(eps=EPS, steps=steps, **settings)
        method.prepare(net, task)
        return lambda: method.loss(net, batch())

    before = copy.deepcopy(net.state_dict())
    ours = treated(temperature=math.inf)()
    net.load_state_dict(before)  # batch-norm has counted the batch, and the attack reads its statistics
    same = equal(ours, plain(), 1e-6)
    for implicit in (False, True):
        what = f"doubly robust, training step, {steps} attack steps, batch 128{', gradient through the attack' if implicit else ''}"  # fmt: skip
        note = f"at temperature infinity the loss is {same}" if not implicit else "one attack gradient and a double backward more"  # fmt: skip
        found.append(compared(what, step(treated(implicit=implicit)), "PGD training step", step(plain), note))
    return found


def looped_weights(losses: Tensor, r: float) -> Tensor:
    """exp(l / r) / sum exp(l / r) and r ln mean exp(l / r), example by example."""
    powers = [math.exp(value / r) for value in losses.tolist()]
    total = sum(powers)
    return torch.tensor([p / total for p in powers] + [r * math.log(total / len(powers))], dtype=losses.dtype)


def looped_tracker(batches: Tensor, r: float, momentum: float, most: float) -> Tensor:
    """The compositional update u <- (1 - eta) u + eta mean exp(l / r), and the weights exp(l / r) / u."""
    u, found = None, []
    for losses in batches.tolist():
        powers = [math.exp(value / r) for value in losses]
        mean = sum(powers) / len(powers)
        u = mean if u is None else (1 - momentum) * u + momentum * mean
        found.append([min(p / u, most) for p in powers])
    return torch.tensor(found, dtype=batches.dtype)


def weights() -> list[Row]:
    r, losses = 0.5, torch.rand(8192, generator=rng(5), dtype=torch.float64) * 3

    def ours() -> Tensor:
        return torch.cat([kl_weights(losses, r), kl_objective(losses, r)[None]])

    def loop() -> Tensor:
        return looped_weights(losses, r)

    found = [compared("doubly robust, weights and objective of 8192 losses", ours, "plain formula, looped", loop, equal(ours(), loop(), 1e-12))]  # fmt: skip
    for size in (128, 1024):
        batches = losses[: 8 * size].view(8, size)

        def tracked(batches: Tensor = batches) -> Tensor:
            loss = KLDROLoss(r).train()
            return torch.stack([loss.weights(part) for part in batches])

        def tracked_loop(batches: Tensor = batches) -> Tensor:
            return looped_tracker(batches, r, 0.1, 20.0)

        same = equal(tracked(), tracked_loop(), 1e-12)
        found.append(compared(f"doubly robust, tracked weights of 8 batches of {size}", tracked, "plain formula, looped", tracked_loop, same))  # fmt: skip
    return found


# --- tightness ------------------------------------------------------------------------------------------------------


def small_net() -> nn.Module:
    convs = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def radii_by_lirpa(package: Any, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:  # [2, B, R]
    """Exact and interval radius of the margins: where no neuron is unstable CROWN's are the exact ones."""
    net = package.BoundedModule(model, x, bound_opts={"relu": "adaptive"})
    image = package.BoundedTensor(x, package.PerturbationLpNorm(norm=float("inf"), x_L=x - eps, x_U=x + eps))
    found = [net.compute_bounds(x=(image,), C=margin_rows(y, 10, x.dtype), method=m) for m in ("CROWN", "IBP")]
    return torch.stack([(high - low) / 2 for low, high in found]).detach()


def radii_by_hand(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:  # [2, B, R]
    """|C W_L D ... D W_1| r and |C W_L| D ... D |W_1| r of a net of linear layers and ReLUs, sample by sample."""
    layers = [m for m in net.modules() if isinstance(m, nn.Linear)]
    found = []
    for rows, point in zip(margin_rows(y, 10, x.dtype), x.flatten(1), strict=True):
        product, radius = torch.eye(len(point), dtype=x.dtype), x.new_full((len(point),), eps)
        for layer in layers[:-1]:
            point = layer(point)
            gate = (point >= 0).to(x.dtype)
            product, radius = gate[:, None] * (layer.weight @ product), gate * (layer.weight.abs() @ radius)
            point = point.relu()
        last = rows @ layers[-1].weight
        found.append(torch.stack([(last @ product).abs().sum(1) * eps, last.abs() @ radius]))
    return torch.stack(found, 1).detach()


def tightness() -> list[Row]:
    eps, package, found = 1e-8, _lirpa.load(), []  # float64 keeps half of its digits for x + eps - x
    x, y = torch.rand(64, 1, 8, 8, generator=rng(6), dtype=torch.float64) * 0.8 + 0.1, torch.randint(10, (64,), generator=rng(7))  # fmt: skip
    nets = {"mlp 64-128-128-10": lambda: mlp((1, 8, 8), 10, hidden=(128, 128)), "cnn 1x8x8": small_net}
    for name, build in nets.items():
        net = seeded_build(build, rng()).double().eval()
        what = f"tightness of the margins, {name}, batch 64"

        def ours(net: nn.Module = net) -> Tensor:
            report = propagation_tightness(net, x, y, eps=eps, prefix_rows=0)
            return torch.stack([report.optimal_radius, report.ibp_radius])

        def by_lirpa(net: nn.Module = net) -> Tensor:
            return radii_by_lirpa(package, net, x, y, eps)

        def by_hand(net: nn.Module = net) -> Tensor:
            with torch.no_grad():
                return radii_by_hand(net, x, y, eps)

        mean = f"mean {propagation_tightness(net, x, y, eps=eps, prefix_rows=0).mean:.3f}"
        if package is None:
            found.append(row(what, in_turn(ours)[0], "auto-lirpa 0.3", None, mean, "auto-lirpa is not installed", ours_mb=memory_mb(ours)))  # fmt: skip
        else:
            found.append(compared(what, ours, "auto-lirpa 0.3", by_lirpa, f"{mean}; radii {equal(ours(), by_lirpa(), 1e-5)}"))  # fmt: skip
        if name.startswith("mlp"):
            found.append(compared(what, ours, "matrices, sample by sample", by_hand, f"{mean}; radii {equal(ours(), by_hand(), 1e-7)}"))  # fmt: skip
    return found


def rows() -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task = digits(0, sizes=(1000, 197, 600), image_size=8)
        accurate, robust, mixed = composite(task)
        x, y = task.test.x, task.test.labels
        return [
            *aggregation(10), *aggregation(100), random_input(), *self_ensemble(),
            *mixture(accurate, robust, mixed, x), large_mixture(), whole_attack(mixed, x[:200], y[:200]),
            *training_steps(task), *weights(), *tightness(),
        ]  # fmt: skip
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for entry in rows():
        print(entry)
