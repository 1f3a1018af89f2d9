"""A stereo prior is asked about each pair once, however often a run is stopped."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian import Budget, OracleStereoPrior, PairPointmaps, Switches, all_pairs, reconstruct
from surefoot.geometry.lm_gaussian.backends import Backends
from surefoot.geometry.lm_gaussian.pairs import PairStore, ask_pairs
from surefoot.geometry.lm_gaussian.run import reconstruct_photos
from surefoot.geometry.lm_gaussian.stages import StageStore
from surefoot.nn.geometry.splats import NAMES

pytest.importorskip("skimage")
BUDGET = Budget(align_steps=12, steps=6, refine_steps=4, splats=150, virtual_per_gap=1, path_frames=2)
OFF = Switches(repair=False, enhancement=False, cross_view=False)


class Stop(Exception):
    pass


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@dataclass
class Counting:
    """A stereo prior that counts its calls, and stops in the middle of them once."""

    views: list
    name: str = "counting"
    side: int = 512
    stop_at: int | None = field(default=None, init=False)
    calls: list = field(default_factory=list, init=False)

    def predict(self, i, j, image_i, image_j):
        if len(self.calls) == self.stop_at:
            self.stop_at = None
            raise Stop
        self.calls.append((i, j))
        return OracleStereoPrior(self.views).predict(i, j, image_i, image_j)


def photos(views):
    return [v.rgb for v in views]


def same_pairs(one, other):
    return all(a[:2] == b[:2] and all(torch.equal(x, y) for x, y in zip(a[2:], b[2:], strict=True)) for a, b in zip(one, other, strict=True))  # fmt: skip


def test_what_is_kept_is_what_was_answered(views, tmp_path):
    prior = Counting(views)
    prior.stop_at = 5
    store = PairStore.of(tmp_path, prior, photos(views))
    with pytest.raises(Stop):
        ask_pairs(prior, photos(views), store=store)
    seen = []
    pairs = ask_pairs(prior, photos(views), store=store, progress=lambda *s: seen.append(s))
    assert prior.calls == all_pairs(4)  # none twice
    assert seen == [(k + 1, 12) for k in range(12)]
    assert same_pairs(pairs, ask_pairs(Counting(views), photos(views)))
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".pt"]  # no file is left half written
    store.clear()
    assert list(tmp_path.iterdir()) == []


def damage_cut(data):
    return data[: len(data) // 2]


def damage_flip(data):  # inside of the largest tensor
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x40]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [damage_cut, damage_flip, lambda _: b"", lambda _: b"no tensors here", lambda d: d[100:]]
)
def test_a_damaged_file_is_asked_for_again(views, tmp_path, damage):
    prior = Counting(views)
    store = PairStore.of(tmp_path, prior, photos(views))
    before = ask_pairs(prior, photos(views), store=store)
    prior.calls.clear()
    file = store._path(1, 2)
    file.write_bytes(damage(file.read_bytes()))
    assert same_pairs(ask_pairs(prior, photos(views), store=store), before)
    assert prior.calls == [(1, 2)]
    assert store.get(1, 2) is not None  # and kept anew


def test_a_file_of_other_maps_is_asked_for_again(views, tmp_path):
    """Whole files of the wrong content: a map missing, maps of no use."""
    prior = Counting(views)
    store = PairStore.of(tmp_path, prior, photos(views))
    pair = prior.predict(0, 1, *photos(views)[:2])
    store.put(pair._replace(points_i=-pair.points_i))  # behind the camera
    assert store.get(0, 1) is None
    torch.save({"points_i": pair.points_i}, store._path(0, 1))
    assert store.get(0, 1) is None
    torch.save([pair.points_i], store._path(0, 1))
    assert store.get(0, 1) is None
    store.put(pair)
    assert isinstance(store.get(0, 1), PairPointmaps)


def test_answers_of_another_prior_or_of_other_photos_are_not_read(views, tmp_path):
    key = PairStore.of(tmp_path, Counting(views), photos(views)).key
    other = photos(views)
    other[2] = other[2].clone()
    other[2][0, 0, 0] += 0.25
    keys = {
        PairStore.of(tmp_path, Counting(views, name="another"), photos(views)).key,
        PairStore.of(tmp_path, Counting(views, side=224), photos(views)).key,
        PairStore.of(tmp_path, OracleStereoPrior(views, name="counting"), photos(views)).key,
        PairStore.of(tmp_path, Counting(views), other).key,
        PairStore.of(tmp_path, Counting(views), photos(views)[::-1]).key,
        PairStore.of(tmp_path, Counting(views), photos(views), "dust3r:elsewhere").key,
    }
    assert len(keys) == 6 and key not in keys
    asked = Counting(views)
    asked.calls.append((0, 1))  # what a prior has done does not tell it apart
    assert PairStore.of(tmp_path, asked, photos(views)).key == key


def stop_at(stage, step):
    left = [(stage, step)]

    def progress(*told):
        if left and told[:2] == left[0]:
            left.pop()
            raise Stop

    return progress


def run(views, prior, **options):
    return reconstruct(photos(views), stereo_prior=prior, budget=BUDGET, switches=OFF, generator=rng(), **options)


def test_a_run_stopped_among_the_pairs_and_in_the_alignment_asks_once(views, tmp_path):
    whole, prior = run(views, OracleStereoPrior(views)), Counting(views)
    prior.stop_at = 7
    store = StageStore(tmp_path, "key", seconds=0)
    progress = stop_at("align", 5)
    for _ in range(2):  # in the middle of the pairs; in the alignment
        with pytest.raises(Stop):
            run(views, prior, stages=store, progress=progress)
    resumed = run(views, prior, stages=store, progress=progress)
    assert prior.calls == all_pairs(4)
    assert all(torch.equal(getattr(resumed.scene, n), getattr(whole.scene, n)) for n in NAMES)
    assert all(torch.equal(a.w2c, b.w2c) and torch.equal(a.K, b.K) for a, b in zip(resumed.cameras, whole.cameras, strict=True))  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["start-key.pt", "train-key.pt"]  # the answers have served


def test_a_folder_of_photos_stopped_in_the_alignment_asks_once(views, tmp_path):
    """At two sizes: the maps are kept as small as the splats, and another length of the run takes them up, too."""

    def at_once(prior, folder, budget=BUDGET, **options):
        return reconstruct_photos(photos(views), list("abcd"), size=16, backends=Backends(stereo=prior, asked=("dust3r:here",)), budget=budget, switches=OFF, folder=folder, **options)  # fmt: skip

    whole, _, _ = at_once(OracleStereoPrior(views), tmp_path / "undisturbed")
    prior = Counting(views)
    with pytest.raises(Stop):
        at_once(prior, tmp_path / "scene", Budget(align_steps=9), progress=stop_at("align", 3))
    kept = list((tmp_path / "scene" / "stages").glob("pair-*"))
    assert len(kept) == 12
    resumed, _, _ = at_once(prior, tmp_path / "scene")
    assert prior.calls == all_pairs(4)
    assert all(torch.equal(getattr(resumed.scene, n), getattr(whole.scene, n)) for n in NAMES)
    assert list((tmp_path / "scene" / "stages").glob("pair-*")) == []


def test_nonsense_is_not_kept(views, tmp_path):
    class Mirrored(Counting):
        def predict(self, i, j, image_i, image_j):
            pair = super().predict(i, j, image_i, image_j)
            return pair._replace(points_i=-pair.points_i)

    prior = Mirrored(views)
    with pytest.raises(InvalidInput, match="behind its own camera"):
        ask_pairs(prior, photos(views), store=PairStore.of(tmp_path, prior, photos(views)))
    assert list(tmp_path.iterdir()) == []
