"""Crop selection: exact invariance, the certificate by exhaustion, bounds against simulation, and the plugs' contracts."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from surefoot.core.finding import Thumbnails
from surefoot.core.subject import Subject
from surefoot.core.task import Split, Task, Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, Refused
from surefoot.models import mlp, seeded_build, small_cnn
from surefoot.shift.crop_selection import (
    CropSelection,
    CropSelectionTreatment,
    RandomCrop,
    TranslationConsistency,
    content_ranks,
    crop_change_bound,
    crop_fooled_bound,
    crop_size_for_consistency,
    grey_levels,
    score_map,
    select_positions,
    translation_robustness,
    windows,
)
from surefoot.training.loop import fit

EIGHT = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(n, side, *, channels=1, levels=256, seed=0):
    return torch.randint(0, levels, (n, channels, side, side), dtype=torch.uint8, generator=source(seed))


def crops_at(x, positions, size):
    return torch.stack(
        [image[:, r : r + size, c : c + size] for image, (r, c) in zip(x, positions.tolist(), strict=True)]
    )


def build(factory, seed=0):
    return seeded_build(factory, source(seed))


class Flatten(nn.Module):
    """Shows the crop itself as 'logits'."""

    def forward(self, x):
        return x.flatten(1)


# Scores -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("crop", "orders"), [(12, (4, 8)), (7, (2, 4)), (4, (0, 2))])
def test_dog_score_is_the_convolution(crop, orders):
    def kernel(order):
        row = torch.tensor([math.comb(order, k) for k in range(order + 1)], dtype=torch.float64)
        return torch.outer(row, row)

    narrow, wide = orders
    margin = (wide - narrow) // 2
    dog = F.pad(4 ** (wide - narrow) * kernel(narrow), [margin] * 4) - kernel(wide)
    assert dog.sum() == 0
    if crop == 12:
        assert 256 * kernel(4).sum() == 65536 == kernel(8).sum()
    grey = grey_levels(noise(3, 20))
    response = F.conv2d(grey.double()[:, None], dog[None, None]).abs()[:, 0]
    start = crop // 2 - wide // 2
    a = 20 - crop + 1
    assert torch.equal(score_map(grey, (crop, crop)).double(), response[:, start : start + a, start : start + a])


def test_grey_levels():
    assert grey_levels(torch.full((1, 3, 1, 1), 1.0)).item() == 255
    assert grey_levels(torch.tensor([[[[0.5]]]])).item() == 128
    assert grey_levels(torch.tensor([10, 20, 30, 41], dtype=torch.uint8).view(1, 4, 1, 1)).item() == 25


@pytest.mark.parametrize("score", ["dog", "center", "random"])
def test_score_map_of_a_window_is_the_frames_map_cut_out(score):
    grey = grey_levels(noise(2, 30, channels=3))
    whole = score_map(grey, (13, 10), score)
    part = score_map(grey[:, 4:25, 7:29], (13, 10), score)
    assert part.shape == (2, 9, 13)
    assert torch.equal(part, whole[:, 4:13, 7:20])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 7), st.integers(1, 3))
def test_content_ranks_order_contents(seed, h, w, channels):
    x = torch.randint(0, 2, (2, channels, 8, 7), dtype=torch.uint8, generator=source(seed))
    ranks = content_ranks(x, (h, w))
    crops = x.unfold(2, h, 1).unfold(3, w, 1).permute(0, 2, 3, 1, 4, 5).reshape(ranks.numel(), -1)
    names = ranks.flatten()
    assert torch.equal(names[:, None] == names[None], (crops[:, None] == crops[None]).all(2))
    alone = content_ranks(x[:1], (h, w)).flatten()  # the order of two contents does not depend on what else is there
    first = names[: len(alone)]
    assert torch.equal(alone[:, None] < alone[None], first[:, None] < first[None])


# Exact invariance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [256, 2])  # 2 levels: ties among the scores are the rule
@pytest.mark.parametrize("crop", [9, 6])
def test_cyclic_selection_is_invariant_to_every_roll(levels, crop):
    x = noise(1, 11, levels=levels)
    rolls = torch.cat([x.roll((dy, dx), (2, 3)) for dy in range(11) for dx in range(11)])
    wrapped = CropSelection(Flatten(), 11, crop, mode="cyclic")
    crops = wrapped.crop(rolls)
    assert (crops == crops[:1]).all()
    outputs = wrapped(rolls)
    assert (outputs == outputs[:1]).all()


def test_cyclic_rolls_of_many_images_with_a_network():
    net = build(lambda: small_cnn((1, 8, 8), 10, widths=(4,))).eval()
    x = noise(20, 12)
    wrapped = CropSelection(net, 12, 12, mode="cyclic")
    base = wrapped(x)
    for dy, dx in ((0, 1), (1, 0), (5, 7), (11, 11)):
        assert torch.equal(wrapped(x.roll((dy, dx), (2, 3))), base)


@pytest.mark.parametrize("levels", [256, 3])
def test_certificate_is_exhaustively_true(levels):
    m, window, crop = 2, 20, 9
    frames = noise(60, window + 2 * m, levels=levels)
    wrapped = CropSelection(Flatten(), window, crop)
    certified = wrapped.certify(frames, m)
    assert certified is not None
    spans = range(-m, m + 1)
    contents = torch.stack([wrapped.crop(windows(frames, window, (dy, dx))) for dy in spans for dx in spans], 1)
    same = (contents == contents[:, :1]).flatten(1).all(1)
    larger = wrapped.certify(F.pad(frames, [1] * 4), m)
    assert larger is not None and torch.equal(larger, certified)  # larger frames are cut to what is needed
    assert certified.any()
    assert not certified.all()
    assert same[certified].all()
    if levels == 256:  # without ties nothing else can be constant: the certificate is exact
        assert not same[~certified].any()


def test_selected_crops_are_equal_wherever_both_lie_in_shared_positions():
    frames = noise(200, 34)
    wrapped = CropSelection(Flatten(), 32, 24)
    base = windows(frames, 32)
    p = wrapped.select(base)
    for dy, dx in EIGHT:
        moved = windows(frames, 32, (dy, dx))
        q = wrapped.select(moved) + torch.tensor([dy, dx])
        low, high = torch.tensor([max(0, dy), max(0, dx)]), 8 + torch.tensor([min(0, dy), min(0, dx)])
        both = ((p >= low) & (p <= high) & (q >= low) & (q <= high)).all(1)
        assert both.sum() > 100
        assert torch.equal(wrapped.crop(base)[both], wrapped.crop(moved)[both])


def test_constant_image_takes_the_top_left_crop():
    x = torch.full((2, 3, 16, 16), 77, dtype=torch.uint8)
    wrapped = CropSelection(Flatten(), 16, 9)
    assert wrapped.select(x).tolist() == [[0, 0], [0, 0]]
    frame = torch.full((1, 1, 18, 18), 77, dtype=torch.uint8)
    outputs = [wrapped(windows(frame, 16, shift)) for shift in [(0, 0), *EIGHT]]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_full_size_crop_is_the_plain_model():
    net = build(lambda: small_cnn((3, 12, 12), 10, widths=(4,))).eval()
    x = torch.rand(5, 3, 12, 12, generator=source())
    assert torch.equal(CropSelection(net, 12, 12)(x), net(x))


def test_crop_and_resize_by_hand():
    x = torch.rand(6, 3, 16, 20, generator=source())
    wrapped = CropSelection(Flatten(), (16, 20), (10, 12), output_size=(16, 20))
    positions = wrapped.select(x)
    expected = torch.stack([i[:, r : r + 10, c : c + 12] for i, (r, c) in zip(x, positions.tolist(), strict=True)])
    assert torch.equal(wrapped.crop(x), expected)
    resized = F.interpolate(expected, (16, 20), mode="bilinear", align_corners=False)
    assert torch.equal(wrapped(x), resized.flatten(1))
    as_bytes = (x * 255).round().byte()
    assert torch.equal(wrapped.select(as_bytes), positions)
    torch.testing.assert_close(wrapped(as_bytes), wrapped(as_bytes.float() / 255))


def test_gradients_reach_the_selected_pixels():
    x = torch.rand(1, 1, 16, 16, generator=source()).requires_grad_()
    wrapped = CropSelection(Flatten(), 16, 9)
    wrapped(x).sum().backward()
    (row, column) = wrapped.select(x)[0].tolist()
    expected = torch.zeros(16, 16)
    expected[row : row + 9, column : column + 9] = 1
    assert x.grad is not None and torch.equal(x.grad[0, 0], expected)


# Bounds -----------------------------------------------------------------------------------------------------------------


def test_bound_values():
    assert crop_change_bound(32, 24, (0, 1)) == pytest.approx(0.2)
    assert crop_change_bound(62, 24, (0, 1)) == pytest.approx(0.05)  # b = 39
    assert crop_change_bound(32, 32, (0, 1)) == 1.0
    assert crop_change_bound((40, 32), (30, 24), (-1, 0)) == pytest.approx(2 / 12)
    assert crop_change_bound(32, 24, (0, 0)) == 0.0
    assert crop_fooled_bound(32, 24) == pytest.approx(0.595, abs=5e-4)
    assert crop_fooled_bound(62, 24) == pytest.approx(0.186, abs=5e-4)
    assert crop_size_for_consistency(224, 0.95) == 224 - 38
    assert crop_size_for_consistency(32, 0.8) == 24
    for target, shift in ((0.9, 1), (0.77, 2), (0.5, 3)):
        crop = crop_size_for_consistency(100, target, shift)
        assert 1 - crop_change_bound(100, crop, (0, shift)) >= target - 1e-12
        assert 1 - crop_change_bound(100, crop + 1, (0, shift)) < target


def change_rate(window, crop, n, score, shifts=((0, 1),), seed=0):
    frames = noise(n, window + 2, seed=seed)
    base = select_positions(windows(frames, window), (crop, crop), score)
    changed = torch.zeros(n, dtype=torch.bool)
    for shift in shifts:
        moved = select_positions(windows(frames, window, shift), (crop, crop), score) + torch.tensor(shift)
        changed |= (moved != base).any(1)
    return changed.double().mean().item()


def test_iid_scores_change_at_the_rate_of_the_bound():
    a, n = 9, 4000
    frames = torch.rand(n, a + 2, a + 2, generator=source(), dtype=torch.float64)

    def best(dy, dx):
        flat = frames[:, 1 + dy : 1 + dy + a, 1 + dx : 1 + dx + a].flatten(1).argmax(1)
        return torch.stack([flat // a + dy, flat % a + dx], 1)

    moved = {shift: (best(*shift) != best(0, 0)).any(1) for shift in EIGHT}
    rate = moved[(0, 1)].double().mean().item()
    assert abs(rate - crop_change_bound(32, 24)) <= 3 * math.sqrt(0.2 * 0.8 / n)
    any_of_eight = torch.stack(list(moved.values())).any(0).double().mean().item()
    assert any_of_eight <= crop_fooled_bound(32, 24) + 3 * math.sqrt(0.25 / n)
    assert abs(any_of_eight - 0.592) <= 4 * math.sqrt(0.592 * 0.408 / n)


@pytest.mark.parametrize(("window", "crop"), [(32, 24), (40, 28), (64, 40)])
def test_dog_on_noise_changes_at_nearly_the_rate_of_the_bound(window, crop):
    n, bound = 2000, crop_change_bound(window, crop)
    rate = change_rate(window, crop, n, "dog")
    assert abs(rate - bound) <= 0.01 + 3 * math.sqrt(bound * (1 - bound) / n)  # .01: neighbouring scores are correlated


def test_scores_that_sum_over_the_crop_break_the_bound():
    def box(grey, crop):
        return F.avg_pool2d(grey.double()[:, None], crop, 1)[:, 0]

    n = 2000
    margin = 3 * math.sqrt(0.25 / n)
    assert 0.33 - margin <= change_rate(32, 24, n, box) <= 0.39 + margin
    assert abs(change_rate(40, 20, n, box) - 0.24) <= margin
    assert abs(change_rate(32, 24, n, "center") - 0.24) <= margin
    assert abs(change_rate(40, 20, n, "center") - 0.11) <= margin


def test_border_share_of_noise():
    wrapped = CropSelection(Flatten(), 32, 24)
    expected = 1 - 49 / 81
    assert wrapped.uniform_border_share() == pytest.approx(expected)
    n = 2000
    assert abs(wrapped.border_share(noise(n, 32)) - expected) < 0.02 + 3 * math.sqrt(expected * (1 - expected) / n)


# Measuring --------------------------------------------------------------------------------------------------------------


class Corner(nn.Module):
    """Class 1 where the top-left pixel is bright, else class 0."""

    def forward(self, x):
        bright = x[:, 0, 0, 0]
        return torch.stack([1 - bright, bright], 1)


def test_translation_robustness_by_hand():
    frames = torch.zeros(2, 1, 6, 6)
    frames[0, 0, 1, 1] = 1.0  # the corner of the centre 4x4 window: every shift loses it
    frames[1, 0, 1, 0] = 1.0  # one to the left: only the shift (0, -1) sees it
    report = translation_robustness(Corner(), frames, torch.tensor([1, 1]), window=4)
    assert report.shifts == tuple(EIGHT)
    assert report.consistency.tolist() == [0.0, 7 / 8]
    assert report.fooled.tolist() == [True, True]
    assert report.accuracy == 0.5
    assert report.cosine[0].tolist() == [0.0] * 8
    cross = translation_robustness(Corner(), frames, window=4, neighbourhood="4", embedding=True)
    assert cross.consistency.tolist() == [0.0, 3 / 4]
    assert cross.changed is not None and cross.changed.sum().item() == 5
    assert len(translation_robustness(Corner(), frames, window=2, max_shift=2).shifts) == 24
    rolled = translation_robustness(Corner(), frames[:, :, 1:5, 1:5], window=4, mode="cyclic")
    assert rolled.consistency.tolist() == [0.0, 1.0]


def test_windows_never_pad():
    frames = torch.arange(36.0).view(1, 1, 6, 6)
    assert windows(frames, 4, (1, -1))[0, 0, 0].tolist() == [12.0, 13, 14, 15]
    assert windows(frames, 4, (0, 1), "cyclic")[0, 0, 0].tolist() == [8.0, 9, 10, 7]


# Bad input --------------------------------------------------------------------------------------------------------------


def test_bad_input():
    x = torch.rand(2, 1, 16, 16)
    wrapped = CropSelection(Flatten(), 16, 9)
    cases = [
        (lambda: CropSelection(Flatten(), 16, 17), "crop 17x17 is larger than the image 16x16"),
        (lambda: crop_change_bound(8, 9), "larger than the image"),
        (lambda: CropSelection(Flatten(), 16, 2), "too small to score"),
        (lambda: CropSelection(Flatten(), 16, 9, mode="zero"), "mode must be one of"),  # type: ignore[arg-type]
        (lambda: CropSelection(Flatten(), 16, 9, "sobel"), "score must be one of"),  # type: ignore[arg-type]
        (lambda: wrapped(x.where(x < 0.5, torch.nan)), "finite"),
        (lambda: wrapped(x.long()), "uint8 or floating"),
        (lambda: wrapped(x[:, :, 1:]), r"Images must be \[B, C, 16, 16\]"),
        (lambda: wrapped.certify(torch.rand(1, 1, 17, 17), 1), r"frame must be at least \[B, C, 18, 18\]"),
        (lambda: CropSelection(Flatten(), 16, 9, lambda g, c: g)(x), r"score must return a map \[2, 8, 8\]"),
        (lambda: CropSelection(Flatten(), 16, 9, lambda g, c: g[:, :8, :8] * torch.nan)(x), "score returned NaN"),
        (lambda: crop_size_for_consistency(32, 1.0), "only mode='cyclic' reaches 1"),
        (lambda: crop_size_for_consistency(32, 0.99), "too many for an image of 32"),
        (lambda: translation_robustness(Corner(), x, window=15), "too small for windows of 15x15"),
        (lambda: translation_robustness(Corner(), x[:0], window=8), "N > 0"),
        (lambda: translation_robustness(Corner(), x * torch.nan, window=8), "finite"),
        (lambda: translation_robustness(Corner(), x, torch.zeros(3), window=8), "2 frames and 3 labels"),
        (lambda: translation_robustness(Corner(), x, window=8, neighbourhood="6"), "neighbourhood must be one of"),  # type: ignore[arg-type]
        (lambda: windows(x, 16, (0, 1)), "smaller than the window"),
        (lambda: CropSelectionTreatment(crop=1.5), "crop must lie strictly between"),
        (lambda: CropSelectionTreatment(crop_size=2), "crop_size"),
        (lambda: CropSelectionTreatment(score="mine"), "score must be one of"),  # type: ignore[arg-type]
        (lambda: CropSelectionTreatment().finish(Corner(), digits()), "no sizes yet"),
        (lambda: TranslationConsistency(max_shift=0), "max_shift"),
    ]
    for call, message in cases:
        with pytest.raises(InvalidInput, match=message):
            call()
    assert wrapped.certify(x, 1) is None
    with pytest.raises(Refused, match="realistic"):
        CropSelection(Flatten(), 16, 9, mode="cyclic").certify(x, 1)


# The plugs --------------------------------------------------------------------------------------------------------------


def image_task(shape, n=48, seed=0):
    generator = source(seed)

    def split(k):
        return Split(torch.rand(k, *shape, generator=generator), torch.randint(10, (k,), generator=generator))

    return Task("noise", split(n), split(8), split(8), 10, seed=seed)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("mode", ["realistic", "cyclic"])
def test_treatment_trains_and_rebuilds(shape, pooled, mode):
    task = image_task(shape)

    def factory():
        return small_cnn(shape, 10, widths=(4,)) if pooled else mlp(shape, 10, hidden=(8,))

    treatment = CropSelectionTreatment(mode=mode)
    run = fit(build(factory), task, Training(epochs=1), (treatment,))
    assert treatment.crop_size_ is None
    done = run.treatments[0]
    assert isinstance(done, CropSelectionTreatment)
    side = round(0.75 * shape[1])
    assert done.crop_size_ == (side, side)
    assert done.output_size_ == (None if pooled else shape[1:])
    assert isinstance(run.model, CropSelection)
    logits = run.model(task.test.x)
    assert logits.shape == (8, 10)
    structure = json.loads(json.dumps(done.structure()))
    again = CropSelectionTreatment(**json.loads(json.dumps(done.settings()))).rebuild(build(factory, 1), structure)
    again.load_state_dict(run.model.state_dict())
    assert torch.equal(again.eval()(task.test.x), logits)
    restored = CropSelectionTreatment(mode=mode)
    restored.load_state_dict(done.state_dict())
    assert restored.structure() == done.structure()
    second = fit(build(factory), task, Training(epochs=1), (treatment,))
    assert torch.equal(second.model(task.test.x), logits)


def test_training_crops_are_what_inference_sees():
    x = torch.arange(2 * 64.0).view(2, 1, 8, 8)
    crops = torch.cat([RandomCrop((6, 6))(x, source(seed)) for seed in range(40)])
    corners = {(int(c[0, 0, 0]) % 64 // 8, int(c[0, 0, 0]) % 8) for c in crops}
    assert corners == {(r, c) for r in range(3) for c in range(3)}
    assert all(torch.equal(c[0] - c[0, 0, 0], x[0, 0, :6, :6]) for c in crops)
    resized = RandomCrop((6, 6), output_size=(8, 8))(x, source(3))
    assert torch.equal(resized, F.interpolate(RandomCrop((6, 6))(x, source(3)), (8, 8), mode="bilinear"))
    rolled = torch.cat([RandomCrop((8, 8), "cyclic")(x[:1], source(seed)) for seed in range(30)])
    assert all(sorted(c.flatten().tolist()) == x[0].flatten().tolist() for c in rolled)


def test_treatment_refuses_vectors():
    task = image_task((5,))
    with pytest.raises(Refused, match="of an image"):
        fit(build(lambda: mlp((5,), 10)), task, Training(epochs=1), (CropSelectionTreatment(),))
    with pytest.raises(InvalidInput, match="larger than the image"):
        fit(build(lambda: mlp((1, 8, 8), 10)), digits(), Training(epochs=1), (CropSelectionTreatment(crop_size=9),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_instrument(dtype):
    task = digits(0, sizes=(100, 50, 200))
    test = Split(task.test.x.to(dtype), None)
    task = task.changed(test=test, budget="quick")
    net = build(lambda: small_cnn((1, 8, 8), 10, widths=(8,))).to(dtype).train()
    subject = Subject(net, "net", "image", (1, 8, 8), 10)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    instrument = TranslationConsistency()
    assert instrument.unfit(subject, task) is None
    finding = instrument.measure(subject, task)
    assert finding.n == 128
    assert finding.samples is not None and finding.value == pytest.approx(finding.samples.mean())
    assert 0 <= finding.low <= finding.value <= finding.high <= 1
    fooled, cosine = finding.parts
    np.testing.assert_array_equal(fooled.samples, finding.samples < 1)
    assert -1 <= cosine.value <= 1
    assert finding.fix == ("crop_selection",)
    json.dumps(finding.to_dict())
    assert net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    frames = F.interpolate(task.sample("translation_consistency", 128).x, (10, 10), mode="bilinear")
    assert finding.value == pytest.approx(translation_robustness(net, frames, window=8).consistency.mean().item())


def test_instrument_pictures_frames_and_errors():
    task = image_task((3, 12, 12))
    net = build(lambda: small_cnn((3, 10, 10), 10, widths=(4,)))
    subject = Subject(net, "net", "image", (3, 10, 10), 10)
    finding = TranslationConsistency().measure(subject, task)  # 12 = 10 + 2: real frames, nothing is enlarged
    assert finding.details["enlarged"] is False
    alternating = nn.Sequential(nn.Flatten(), build(lambda: nn.Linear(300, 10)))
    worst = TranslationConsistency().measure(subject.with_model(alternating), task)
    thumbnails = worst.pictures[1]
    assert isinstance(thumbnails, Thumbnails)
    assert thumbnails.images.shape == (len(thumbnails.captions), 10, 10, 3)
    assert "shifts change it" in thumbnails.captions[0]
    with pytest.raises(InvalidInput, match="test is empty"):
        TranslationConsistency().measure(subject, task.changed(test=Split(task.test.x[:0])))
    with pytest.raises(InvalidInput, match="finite"):
        TranslationConsistency().measure(subject, task.changed(test=Split(task.test.x * torch.nan)))
    vector = Subject(net, "net", "vector", (5,), 10)
    assert "vector" in (TranslationConsistency().unfit(vector, task) or "")
