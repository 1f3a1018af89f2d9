"""Scores over a data set and over several runs; the forgetting count, which watches training instead of its result."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from surefoot.core.task import Split
from surefoot.curation.data_diet.gradients import GradientMode, check_trainable, evaluation, gradient_norms, pick_engine
from surefoot.curation.data_diet.report import ScoreReport
from surefoot.errors import InvalidInput, Refused, check, check_at_least, check_choice
from surefoot.nn.scores import el2n, error_l1, margins

Indexed = tuple[Tensor, Tensor, Tensor]  # x [B, ...], y int64 [B], index int64 [B]
Data = Split | Iterable[Indexed]
ScoreKind = Literal["el2n", "l1", "max_margin", "sum_margin", "grand", "grand_last_layer", "grand_sketch"]
SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "el2n": el2n,
    "l1": error_l1,
    "max_margin": lambda logits, y: margins(logits, y, reduce="max"),
    "sum_margin": lambda logits, y: margins(logits, y, reduce="sum"),
}
GRADIENTS: dict[str, GradientMode] = {"grand": "full", "grand_last_layer": "last_layer", "grand_sketch": "sketch"}

logger = logging.getLogger(__name__)


def el2n_scores(models: nn.Module | Sequence[nn.Module], data: Data, *, batch_size: int = 512) -> ScoreReport:
    """EL2N of every example: || softmax(f(x)) - onehot(y) ||_2, the mean over the models *of the scores*.

    `data` is a `Split`, or a loader of `(x, y, index)` batches that returns the same batches each time it is read. Score
    without augmentation and with plain labels, no smoothing or mixing. The models are left as they were.
    """
    return score(models, data, kind="el2n", batch_size=batch_size)


def grand_scores(
    models: nn.Module | Sequence[nn.Module], data: Data, *, mode: GradientMode = "full", chunk_size: int = 64
) -> ScoreReport:
    """GraNd of every example: || grad_w CE(f(x), y) ||_2, the mean over the models. See `gradient_norms` for the modes.

    At initialisation it mostly follows the norm of the input (Kirsch 2023, arXiv 2303.14753): read `norm_correlation`.
    """
    check_choice("mode", mode, tuple(GRADIENTS.values()))
    kind = next(name for name, m in GRADIENTS.items() if m == mode)
    return score(models, data, kind=kind, batch_size=chunk_size)  # type: ignore[arg-type]


def score(
    models: nn.Module | Sequence[nn.Module],
    data: Data,
    *,
    kind: ScoreKind = "el2n",
    batch_size: int = 512,
    epoch: int | None = None,
) -> ScoreReport:
    """Any of the scores, over one model or the mean over several. `epoch` is only written down (see `score_runs`)."""
    check_choice("kind", kind, (*SCORES, *GRADIENTS))
    check_at_least("batch_size", batch_size, 1)
    runs = [models] if isinstance(models, nn.Module) else list(models)
    check(len(runs) > 0, "models is empty; give at least one trained model.")
    _check_repeatable(data)
    per_run, y, length = [], None, None
    for model in runs:
        if kind in GRADIENTS:
            check_trainable(model)
        values, y, length = _score_one(model, data, kind, batch_size)
        per_run.append(values)
    stacked = torch.stack(per_run)
    assert y is not None
    assert length is not None
    mean = stacked.mean(0)
    correlation = rank_correlation(mean, length)
    return ScoreReport(
        kind, mean, stacked, y, epoch, correlation, _warnings(kind, epoch, correlation), tuple(map(weight_hash, runs))
    )


def _warnings(kind: str, epoch: int | None, correlation: float | None) -> tuple[str, ...]:
    if epoch != 0:
        return ()
    told = "unknown" if correlation is None else f"{correlation:.2f}"
    what = "follows the norm of the input" if kind in GRADIENTS else "says little about the example"
    text = f"{kind} at epoch 0 mostly {what} (rank correlation here: {told}) and prunes no better than chance; score after some epochs."
    logger.warning(text)
    return (text,)


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's correlation; None where one of the two is constant or there are fewer than three examples."""
    if len(a) < 3 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    return float(spearmanr(a.cpu().numpy(), b.cpu().numpy())[0])  # type: ignore[arg-type]


def _batches(data: Data, batch_size: int) -> Iterator[Indexed]:
    if not isinstance(data, Split):
        for batch in data:
            if not isinstance(batch, (tuple, list)) or len(batch) != 3:
                raise InvalidInput(
                    "Each batch must be (x, y, index); let the data set return the index of each example."
                )
            yield batch[0], batch[1], batch[2]
        return
    labels, index = data.labels, torch.arange(len(data), device=data.x.device)
    yield from zip(data.x.split(batch_size), labels.split(batch_size), index.split(batch_size), strict=True)


def _check_repeatable(data: Data) -> None:
    """Read the first batch twice: a loader that shuffles or augments gives something else the second time."""
    if isinstance(data, Split):
        check(len(data) > 0, "The split is empty; give at least one example to score.")
        return
    check(iter(data) is not data, "The loader can be read only once; give one that starts over, such as a DataLoader.")
    first, second = (next(_batches(data, 1), None) for _ in range(2))
    if first is None or second is None:
        raise InvalidInput("The loader is empty; give at least one example to score.")
    same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True))
    check(same, "The loader gives another first batch when read again; switch its shuffling and augmentation off.")


def _score_one(model: nn.Module, data: Data, kind: str, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, labels and input norms, each `[n]` in the order of the index."""
    parameter = next(model.parameters(), None)
    columns: list[list[Tensor]] = [[], [], [], []]
    engine, classes, logits = None, None, torch.empty(0)
    with evaluation(model):
        for x, y, index in _batches(data, batch_size):
            check(y.dtype == torch.int64 and y.dim() == 1, f"y must be int64 class indices [B], got {y.dtype} {tuple(y.shape)}; scores are for classification.")  # fmt: skip
            device = x.device if parameter is None else parameter.device
            x, y = x.to(device), y.to(device)
            if kind in SCORES or classes is None:
                with torch.no_grad():
                    logits = model(x)
                classes = _check_logits(logits, y, index)
            _check_range(y, classes)
            if kind in SCORES:
                values = SCORES[kind](logits, y)
            else:
                engine = engine or (pick_engine(model, x, y) if kind == "grand" else None)
                values = gradient_norms(model, x, y, mode=GRADIENTS[kind], chunk_size=batch_size, engine=engine)
            length = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)
            for column, part in zip(columns, (values.double(), y, length, index), strict=True):
                column.append(part.detach().cpu())
    values, labels, length, index = (torch.cat(column) for column in columns)
    order = index.argsort()
    check(
        torch.equal(index[order], torch.arange(len(index))),
        "The indices must be 0 to n - 1, each once; check the loader's.",
    )
    return values[order], labels[order], length[order]


def _check_range(y: Tensor, classes: int) -> None:
    low, high = int(y.min()), int(y.max())
    check(low >= 0 and high < classes, f"Labels run from {low} to {high}, outside the {classes} logits of the model.")


def _check_logits(logits: Tensor, y: Tensor, index: Tensor) -> int:
    check(
        logits.dim() == 2 and len(logits) == len(y), f"The model must return logits [B, K], got {tuple(logits.shape)}."
    )
    bad = index[(~torch.isfinite(logits).all(1)).cpu()][:5].tolist()
    check(not bad, f"The model returns NaN or infinity for examples {', '.join(map(str, bad))}; look at their inputs.")
    return logits.shape[1]


class ForgettingTracker(nn.Module):
    """Counts, per example, how often it went from classified right to classified wrong between two visits.

    Call `update` with what each training batch got right before the step. An example that was never right counts as infinite.
    Source: Toneva et al. 2019, arXiv 1812.05159.
    """

    last: Tensor
    events: Tensor
    learned: Tensor

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        check_at_least("num_samples", num_samples, 1)
        self.register_buffer("last", torch.zeros(num_samples, dtype=torch.bool))
        self.register_buffer("events", torch.zeros(num_samples, dtype=torch.int64))
        self.register_buffer("learned", torch.zeros(num_samples, dtype=torch.bool))

    @torch.no_grad()
    def update(
        self,
        index: Tensor,  # int64 [B]
        correct: Tensor,  # bool [B]
    ) -> None:
        check(len(index) == len(correct), f"{len(index)} indices came with {len(correct)} outcomes.")
        correct = correct.bool()
        self.events[index] += (self.last[index] & ~correct).long()
        self.last[index] = correct
        self.learned[index] |= correct

    @property
    def scores(self) -> Tensor:  # float64 [n]
        """Forgetting events; +inf where the example was never classified right."""
        return torch.where(self.learned, self.events.double(), torch.inf)


def weight_hash(model: nn.Module) -> str:
    """The first 16 hex digits of a sha256 over names and bytes of parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def score_runs(
    make_model: Callable[[torch.Generator], nn.Module],
    train_fn: Callable[[nn.Module, int, torch.Generator], nn.Module],
    data: Data,
    *,
    runs: int = 10,
    epoch: int = 10,
    kind: ScoreKind = "el2n",
    generator: torch.Generator | None = None,
    batch_size: int = 512,
) -> ScoreReport:
    """Train `runs` fresh models for `epoch` epochs, score each, average the scores.

    `make_model(generator)` initialises, `train_fn(model, epoch, generator)` trains it that long and returns it. Guard: at epoch 0
    the weights scored must be, by hash, those of the initialisation, and later they must not be. (The 2021 results for GraNd at
    initialisation came from a checkpoint helper that gave back a later checkpoint when asked for number 0.)
    """
    check_at_least("runs", runs, 1)
    check_at_least("epoch", epoch, 0)
    source = generator if generator is not None else torch.Generator().manual_seed(0)
    models = []
    for _ in range(runs):
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=source, device=source.device)))
        model = make_model(own)
        initial = weight_hash(model)
        model = train_fn(model, epoch, own)
        if (weight_hash(model) == initial) != (epoch == 0):
            what = (
                "differ from the initialisation at epoch 0"
                if epoch == 0
                else f"are the initialisation's after epoch {epoch}"
            )
            raise Refused(f"The weights to be scored {what}; check what train_fn restores or trains.")
        models.append(model)
    return score(models, data, kind=kind, epoch=epoch, batch_size=batch_size)
