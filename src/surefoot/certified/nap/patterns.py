"""Activation patterns: what they are, how they are mined from training inputs, and what share of other inputs follows them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, UnsupportedOp, check, check_choice
from surefoot.nn.bounds import Box, Program, Rectifier, propagate
from surefoot.nn.bounds.operators import Monotone

Labels = Literal["dataset", "predicted", "correct"]


@dataclass(frozen=True, eq=False)
class ActivationPattern:
    """Neurons that must be active (z > 0) and neurons that must be inactive (z <= 0), by layer: bool tensors of one example's shape.

    Layers are named by their ReLU's node in the traced model (`surefoot.nn.bounds.rectifier_shapes` lists them). `p <= q` means that p
    is at least as strict: whatever follows p follows q.
    """

    active: Mapping[str, Tensor]  # bool [...]
    inactive: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check(self.active.keys() == self.inactive.keys(), "active and inactive must name the same layers.")
        for name, on in self.active.items():
            off = self.inactive[name]
            good = on.dtype == off.dtype == torch.bool and on.shape == off.shape
            check(good, f"Pattern of '{name}': active and inactive must be bool tensors of one shape.")
            check(not bool((on & off).any()), f"Pattern of '{name}': a neuron cannot be both active and inactive.")

    @classmethod
    def from_phases(cls, phases: Mapping[str, Tensor]) -> ActivationPattern:
        """From +1 (active), -1 (inactive) and 0 (free)."""
        return cls({k: v > 0 for k, v in phases.items()}, {k: v < 0 for k, v in phases.items()})

    @property
    def phases(self) -> dict[str, Tensor]:
        """+1, -1 and 0 by layer, the form that verification reads."""
        return {k: on.to(torch.int8) - self.inactive[k].to(torch.int8) for k, on in self.active.items()}

    @property
    def num_constrained(self) -> int:
        return sum(int(on.sum() + self.inactive[k].sum()) for k, on in self.active.items())

    def follows(self, values: Mapping[str, Tensor], threshold: float = 0.0) -> Tensor:  # bool [B]
        """Which inputs follow the pattern; `values` are pre-activations `[B, ...]` by layer, from `neuron_values`."""
        check(len(self.active) > 0, "The pattern names no layer.")
        inside = []
        for name, on in self.active.items():
            self._check_layer(name, values)
            z, off = values[name], self.inactive[name].to(values[name].device)
            is_on = z > threshold
            inside.append(((is_on | ~on.to(z.device)) & (~is_on | ~off)).flatten(1).all(1))
        return torch.stack(inside).all(0)

    def _check_layer(self, name: str, values: Mapping[str, Tensor]) -> None:
        if name not in values:
            raise InvalidInput(
                f"The pattern names the layer '{name}', which this model lacks; it has {', '.join(values)}."
            )
        found, wanted = tuple(values[name].shape[1:]), tuple(self.active[name].shape)
        check(found == wanted, f"The pattern of '{name}' has the shape {wanted}, the model's layer has {found}.")

    def _literals(self) -> Iterator[Tensor]:
        for kind in (self.active, self.inactive):
            for name in sorted(kind):
                yield kind[name]

    def __le__(self, other: ActivationPattern) -> bool:
        shapes = [{k: v.shape for k, v in pattern.active.items()} for pattern in (self, other)]
        check(shapes[0] == shapes[1], "Patterns of different layers or shapes cannot be compared.")
        pairs = zip(self._literals(), other._literals(), strict=True)
        return all(bool((mine | ~theirs).all()) for mine, theirs in pairs)

    def conflicts(self, other: ActivationPattern) -> int:
        """Neurons that one pattern wants active and the other inactive; any of them proves that no input follows both."""
        shared = self.active.keys() & other.active.keys()
        clash = [(self.active[k] & other.inactive[k]) | (self.inactive[k] & other.active[k]) for k in shared]
        return sum(int(c.sum()) for c in clash)


@torch.no_grad()
def neuron_values(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    *,
    other_activations: bool = False,
    batch_size: int = 512,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits `[B, K]` and pre-activations `[B, ...]` by layer, in evaluation mode and float64, on a copy of the model.

    Every position of a convolution counts as a neuron; z is what the ReLU reads, behind any batch-norm. With
    `other_activations` layers of sigmoid, tanh and their like are included (such patterns can be mined, not verified).
    """
    check(x.is_floating_point() and len(x) > 0, "x must hold at least one floating-point example.")
    check(bool(torch.isfinite(x).all()), "x must be finite, got NaN or infinity.")
    program = Program(copy.deepcopy(model).double().eval())
    logits, values = [], {}
    place = next(model.parameters(), x).device
    for part in x.split(batch_size):
        point = part.to(place, torch.float64)
        walked = propagate(program, Box(point, point))
        logits.append(walked.output.centre)
        for step in walked.steps:
            below = walked.steps[step.parents[0]].box if step.parents else step.box
            other = other_activations and isinstance(step.op, Monotone) and below.shape == step.box.shape  # no pooling
            if isinstance(step.op, Rectifier) or other:
                values.setdefault(step.name, []).append(below.centre)
    if not values:
        raise UnsupportedOp("The model has no ReLU, so that there are no activation patterns to speak of.")
    joined = torch.cat(logits)
    check(joined.dim() == 2, f"The model must return logits [B, K], got the shape {tuple(joined.shape)}.")
    check(bool(torch.isfinite(joined).all()), "The model's logits must be finite, got NaN or infinity.")
    return joined, {name: torch.cat(parts) for name, parts in values.items()}


def instance_pattern(model: nn.Module, x: Tensor, *, layers: Sequence[str] | None = None) -> ActivationPattern:
    """The pattern of one input `[1, ...]`: every neuron fixed as it is there, the most that a pattern around it can ask."""
    check(len(x) == 1, f"x must hold one example [1, ...], got {len(x)}.")
    values = _chosen(neuron_values(model, x)[1], layers)
    return ActivationPattern({k: z[0] > 0 for k, z in values.items()}, {k: z[0] <= 0 for k, z in values.items()})


def mine_naps(
    model: nn.Module,
    x: Tensor,  # [N, ...] training inputs
    y: Tensor,  # int64 [N]
    *,
    delta: float = 0.95,
    layers: Sequence[str] | None = None,
    labels: Labels = "dataset",
    classes: Iterable[int] | None = None,
    threshold: float | None = None,
    batch_size: int = 512,
) -> dict[int, ActivationPattern]:
    """The dominant pattern of every class: neurons in one state for at least a share `delta` of its inputs.

    `labels`: "dataset" takes all inputs of a class, also those the model gets wrong; "correct" leaves these out; "predicted" goes by the
    model's answer. `layers`: names of the layers to use (None: all). `threshold`: also uses layers of other activations
    (sigmoid, tanh), active above it; such patterns cannot be verified. Raises `InvalidInput` for a class without inputs.
    """
    check(0.5 < delta <= 1, f"delta must lie in (0.5, 1], got {delta!r}.")
    check_choice("labels", labels, ("dataset", "predicted", "correct"))
    logits, values = neuron_values(model, x, other_activations=threshold is not None, batch_size=batch_size)
    y = _check_labels(y, logits).to(logits.device)
    values = _chosen(values, layers)
    answer = logits.argmax(1)
    groups = answer if labels == "predicted" else y
    usable = answer == y if labels == "correct" else torch.ones_like(y, dtype=torch.bool)
    naps = {}
    for c in range(logits.shape[1]) if classes is None else classes:
        members = usable & (groups == c)
        count = int(members.sum())
        if not count:
            raise InvalidInput(f"Class {c} has no inputs to mine a pattern from (labels={labels!r}); leave it out of `classes`.")  # fmt: skip
        needed = delta * count - 1e-9 * count  # the product may lie a rounding above a whole number
        on = {k: (z[members] > (threshold or 0.0)).sum(0) for k, z in values.items()}
        naps[c] = ActivationPattern(
            {k: n >= needed for k, n in on.items()}, {k: count - n >= needed for k, n in on.items()}
        )
    return naps


@dataclass(frozen=True, eq=False)
class NAPCoverage:
    """How the patterns of `classes` lie among labelled inputs. NaN where a share is of nothing."""

    classes: tuple[int, ...]
    recall: Tensor  # [C] share of a class's inputs that follow its pattern
    spill: Tensor  # [C] share of all other inputs that follow it
    precision: Tensor  # [C] share of the class among what follows it
    followed: Tensor  # bool [N, C]
    own: Tensor  # bool [N]: follows the pattern of its class


def nap_coverage(
    model: nn.Module,
    naps: Mapping[int, ActivationPattern],
    x: Tensor,  # [N, ...] inputs that the patterns were not mined from
    y: Tensor,  # int64 [N]
    *,
    threshold: float | None = None,
    batch_size: int = 512,
) -> NAPCoverage:
    """Recall, spill and precision of patterns; on the inputs they were mined from recall says nothing new."""
    check(len(naps) > 0, "naps must hold at least one pattern.")
    logits, values = neuron_values(model, x, other_activations=threshold is not None, batch_size=batch_size)
    y = _check_labels(y, logits).to(logits.device)
    classes = tuple(naps)
    followed = torch.stack([naps[c].follows(values, threshold or 0.0) for c in classes], 1)
    mine = y.unsqueeze(1) == torch.tensor(classes, device=y.device)

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return (part & whole).sum(0).double() / whole.sum(0)

    result = (share(followed, mine), share(followed, ~mine), share(mine, followed))
    recall, spill, precision, followed, own = (t.cpu() for t in (*result, followed, (followed & mine).any(1)))
    return NAPCoverage(classes, recall, spill, precision, followed, own)


def _check_labels(y: Tensor, logits: Tensor) -> Tensor:
    good = y.dtype == torch.int64 and y.dim() == 1 and len(y) == len(logits)
    check(good, f"y must hold {len(logits)} int64 class indices, got {y.dtype} {tuple(y.shape)}.")
    inside = bool(((y >= 0) & (y < logits.shape[1])).all())
    check(inside, f"y must lie between 0 and {logits.shape[1] - 1}, got {int(y.min())} to {int(y.max())}.")
    return y


def _chosen(values: dict[str, Tensor], layers: Sequence[str] | None) -> dict[str, Tensor]:
    if layers is None:
        return values
    check(len(layers) > 0, "layers must name at least one layer.")
    for name in layers:
        check_choice("layers", name, tuple(values))
    return {name: values[name] for name in layers}
