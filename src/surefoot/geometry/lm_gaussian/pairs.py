"""Asking a stereo prior about all pairs of photos, once: what it answers is kept on disk, pair by pair, until the alignment has ended.

A large network takes seconds to minutes a pair on a CPU, and 16 photos are 240 pairs; a run that is stopped there, or in the alignment after it, asks
only for what is missing. Answers are kept as they came (float32), so the end is the same to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian.networks import nearest
from surefoot.geometry.lm_gaussian.priors import PairPointmaps, StereoPrior, all_pairs
from surefoot.geometry.lm_gaussian.stages import load_whole, save_whole

MAPS = ("points_i", "points_j", "conf_i", "conf_j")


@dataclass(frozen=True)
class PairStore:
    """One file a pair in `folder`; `key` tells apart prior, photos and size, so that another's answer is never read."""

    folder: Path
    key: str

    @classmethod
    def of(cls, folder: Path | str, prior: object, images: Sequence[Tensor], *settings: object) -> PairStore:
        """`settings`: whatever else the answers depend on (a model's path, the size that they are brought to)."""
        digest = hashlib.sha256(repr((_told_apart(prior), settings)).encode())
        for image in images:
            digest.update(repr(tuple(image.shape)).encode())
            digest.update(image.detach().cpu().contiguous().numpy().tobytes())
        return cls(Path(folder), digest.hexdigest()[:16])

    def _path(self, i: int, j: int) -> Path:
        return self.folder / f"pair-{self.key}-{i}-{j}.pt"

    def get(self, i: int, j: int) -> PairPointmaps | None:
        """The answer, or None where there is none that can be read whole."""
        saved = load_whole(self._path(i, j))
        if saved is None or saved.pop("sum", None) != _checksum(saved):
            return None
        try:
            return PairPointmaps(i, j, *(saved[name] for name in MAPS)).checked()
        except (KeyError, InvalidInput):
            return None

    def put(self, pair: PairPointmaps) -> None:
        """Written whole or not at all."""
        content: dict[str, Any] = {name: getattr(pair, name).detach().cpu().contiguous() for name in MAPS}
        save_whole({**content, "sum": _checksum(content)}, self._path(pair.i, pair.j))

    def clear(self) -> None:
        """Forget the answers: the alignment has ended."""
        for path in self.folder.glob(f"pair-{self.key}-*"):
            path.unlink(missing_ok=True)


def ask_pairs(
    prior: StereoPrior,
    images: Sequence[Tensor],  # each [H, W, 3]
    *,
    size: tuple[int, int] | None = None,  # (width, height) that the maps are brought to; None: as the prior gives them
    store: PairStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[PairPointmaps]:
    """Every pair's maps (`all_pairs`); those that the store holds are not asked for. Raises `InvalidInput` for answers that cannot be used."""
    wanted, pairs = all_pairs(len(images)), []
    for i, j in wanted:
        pair = None if store is None else store.get(i, j)
        if pair is None:
            pair = prior.predict(i, j, images[i], images[j]).checked()
            if size is not None:
                pair = pair._replace(**{k: nearest(getattr(pair, k)[None], size[1], size[0])[0] for k in MAPS})
            if store is not None:
                store.put(pair)
        pairs.append(pair)
        if progress is not None:
            progress(len(pairs), len(wanted))
    return pairs


def _told_apart(prior: object) -> tuple[object, ...]:
    """A prior by its class, its name and, of a dataclass, the settings that are plain values."""
    plain: list[tuple[str, object]] = []
    if dataclasses.is_dataclass(prior):
        given = ((f.name, getattr(prior, f.name, None)) for f in dataclasses.fields(prior) if f.init)
        plain = [(name, value) for name, value in given if _is_plain(value)]
    return (type(prior).__qualname__, getattr(prior, "name", None), plain)


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (str, int, float, bool, Path, torch.dtype, torch.device))


def _checksum(content: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in MAPS:
        value = content.get(name)
        if isinstance(value, Tensor):
            digest.update(repr((name, tuple(value.shape), str(value.dtype))).encode())
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
