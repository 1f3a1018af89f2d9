"""Drawn shapes: every pixel follows from the factors."""

import itertools
import math
from dataclasses import fields

import pytest
import torch

from surefoot.datasets import check_task
from surefoot.datasets.embedded import seeded
from surefoot.datasets.shapes import (
    CLASSES,
    GLYPHS,
    NARROW,
    NUISANCES,
    WIDE,
    Factors,
    draw,
    render,
    sample_factors,
    shapes,
)
from surefoot.errors import InvalidInput


def factors(label: int = 0, **changes: float) -> Factors:
    """One image in double precision: upright, bright, black paper."""
    plain = {"brightness": 0.8, "gradient": 0.0, "direction": 0.0, "tilt": 0.0, "width": 0.1, "scale": 1.0, "shift_x": 0.0, "shift_y": 0.0}  # fmt: skip
    values = {name: torch.tensor([value], dtype=torch.float64) for name, value in (plain | changes).items()}
    return Factors(torch.tensor([label]), **values)


def plain_pixel(glyph: str, f: Factors, row: int, column: int, side: int) -> float:
    """The module's equations for one pixel, with loops and floats."""
    pixel = 2.0 / side
    p = ((column + 0.5) * pixel - 1.0, (row + 0.5) * pixel - 1.0)
    t = math.radians(float(f.tilt))
    u, v = (p[0] - float(f.shift_x)) / float(f.scale), (p[1] - float(f.shift_y)) / float(f.scale)
    q = (math.cos(t) * u + math.sin(t) * v, math.cos(t) * v - math.sin(t) * u)
    nearest = math.inf
    for line in GLYPHS[glyph]:
        for (ax, ay), (bx, by) in itertools.pairwise(line):
            dx, dy = bx - ax, by - ay
            share = min(1.0, max(0.0, ((q[0] - ax) * dx + (q[1] - ay) * dy) / (dx * dx + dy * dy)))
            nearest = min(nearest, math.hypot(q[0] - ax - share * dx, q[1] - ay - share * dy))
    ink = min(1.0, max(0.0, 0.5 + (float(f.width) - float(f.scale) * nearest) / pixel))
    angle = math.radians(float(f.direction))
    paper = max(0.0, float(f.gradient) * (1 + math.cos(angle) * p[0] + math.sin(angle) * p[1]) / 2)
    return min(1.0, max(0.0, paper + float(f.brightness) * ink))


@pytest.mark.parametrize("glyph", ["circle", "square", "4", "7"])
def test_matches_a_plain_loop(glyph):
    f = factors(CLASSES.index(glyph), tilt=17.0, gradient=0.4, direction=50.0, scale=0.9, shift_x=0.1, shift_y=-0.05)
    image = render(f)[0, 0]
    expected = [[plain_pixel(glyph, f, row, column, 16) for column in range(16)] for row in range(16)]
    assert torch.allclose(image, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_float32_matches_float64():
    drawn = sample_factors(60, WIDE, generator=seeded(900, "precision"))
    wide = Factors(drawn.label, *(getattr(drawn, f.name).double() for f in fields(Factors)[1:]))
    assert torch.allclose(render(drawn).double(), render(wide), atol=1e-4)


def test_a_quarter_turn_is_exact():
    glyph = CLASSES.index("2")
    assert torch.allclose(render(factors(glyph, tilt=90.0)), render(factors(glyph)).rot90(-1, (2, 3)), atol=1e-6)


def test_brightness_is_the_ink_and_gradient_the_paper():
    image = render(factors(1, brightness=0.6, width=0.2))
    assert image.max().item() == pytest.approx(0.6)
    lit = render(factors(1, brightness=0.0, gradient=0.5, direction=0.0))[0, 0]
    assert torch.allclose(lit[0], lit[-1]) and lit[0, 0].item() == pytest.approx(0.5 / 32)
    assert lit[0, -1].item() == pytest.approx(0.5 * 31 / 32)


def test_wider_strokes_only_add_ink():
    assert bool((render(factors(2, width=0.2)) >= render(factors(2, width=0.1))).all())


def test_differentiable_in_the_factors():
    tilt = torch.tensor([10.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(render(factors(3).changed(tilt=tilt)).square().sum(), tilt)
    step = 1e-4
    ends = [float(render(factors(3, tilt=10.0 + s)).square().sum()) for s in (-step, step)]
    assert float(slope) == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-3, abs=1e-4)


def test_draws_are_balanced_seeded_and_within_their_ranges():
    x, drawn = draw(205, WIDE, seeded(901, "a"))
    again, _ = draw(205, WIDE, seeded(901, "a"))
    other, _ = draw(205, WIDE, seeded(902, "a"))
    assert torch.equal(x, again) and not torch.equal(x, other)
    counts = drawn.label.bincount(minlength=len(CLASSES))
    assert int(counts.max() - counts.min()) <= 1
    for field in fields(WIDE):
        low, high = getattr(WIDE, field.name)
        values = getattr(drawn, field.name)
        assert bool(((values >= low) & (values <= high)).all())


def test_narrow_lies_inside_wide():
    for name in NUISANCES:
        (a, b), (low, high) = getattr(NARROW, name), getattr(WIDE, name)
        assert low <= a <= b <= high and (b - a) < (high - low) / 2


def test_batches_do_not_change_the_images():
    drawn = sample_factors(37, WIDE, generator=seeded(903, "b"))
    assert torch.equal(render(drawn), render(drawn, batch_size=10))


def test_the_task_and_its_factors():
    task = shapes(904, sizes=(50, 20, 60))
    check_task(task)
    assert task.input_shape == (1, 16, 16) and task.num_classes == 10
    x, drawn = draw(60, WIDE, seeded(904, "shapes/test"))
    assert torch.equal(x, task.test.x) and torch.equal(drawn.label, task.test.labels)


def test_glyphs_stay_apart_at_any_tilt():
    """The nearest image of another class is farther than the same glyph two degrees on, at the widest tilts."""
    tilts = torch.arange(-35.0, 36.0, 5.0)
    n, k = len(tilts), len(CLASSES)
    plain = factors()
    every = {f.name: getattr(plain, f.name).float().expand(n * k) for f in fields(Factors)[1:]}
    label = torch.arange(k).repeat_interleave(n)
    images = render(Factors(label, **every).changed(tilt=tilts.repeat(k))).flatten(1)
    moved = render(Factors(label, **every).changed(tilt=tilts.repeat(k) + 2.0)).flatten(1)
    distance = torch.cdist(images, images).masked_fill(label[:, None] == label, math.inf)
    assert bool((distance.amin(1) > (images - moved).norm(dim=1)).all())


def test_bad_input():
    generator = seeded(0, "bad")
    with pytest.raises(InvalidInput, match="classes"):
        sample_factors(3, classes=("heptagon",), generator=generator)
    with pytest.raises(InvalidInput, match="empty"):
        sample_factors(3, classes=(), generator=generator)
    with pytest.raises(InvalidInput, match="at least 1"):
        sample_factors(0, generator=generator)
    with pytest.raises(InvalidInput, match="image_size"):
        render(factors(), image_size=3)
    with pytest.raises(InvalidInput, match="tilt"):
        sample_factors(3, type(NARROW)(tilt=(5.0, -5.0)), generator=generator)
