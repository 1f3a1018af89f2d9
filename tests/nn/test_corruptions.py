"""Corruptions: range, shape, monotone severity at every size, exact pieces, JPEG against a real encoder."""

import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch.nn import functional as F

from surefoot.errors import InvalidInput
from surefoot.nn.corruptions import CORRUPTIONS, SEVERITIES, corrupt, jpeg, kinds

PIXELS: Any = load_digits(return_X_y=True)[0]
DIGITS = torch.tensor(PIXELS[:48].reshape(48, 8, 8) / 16, dtype=torch.float32)[:, None]
PHOTOS = torch.tensor(np.stack(load_sample_images().images) / 255, dtype=torch.float32).permute(0, 3, 1, 2)
IMAGES = {
    "digits 8": DIGITS,
    "grey 28": F.interpolate(DIGITS, size=(28, 28), mode="bilinear"),
    "colour 32": F.interpolate(PHOTOS, size=(32, 32), mode="area").repeat(8, 1, 1, 1),
    "colour 90 x 120": F.interpolate(PHOTOS, size=(90, 120), mode="area"),
    "colour 224": F.interpolate(PHOTOS, size=(224, 224), mode="area"),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


@pytest.mark.parametrize("size", IMAGES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_is_monotone(name, size):
    x = IMAGES[size]
    if name not in kinds(x.shape[1]):
        pytest.skip("needs colour")
    given, seed = x.clone(), torch.get_rng_state()
    far = []
    for severity in SEVERITIES:
        y = corrupt(x, name, severity, generator())
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert y.min() >= 0
        assert y.max() <= 1
        far.append(distance(x, y))
    assert far[0] > 0.003
    assert all(b > a for a, b in itertools.pairwise(far))
    assert far[-1] < 0.5
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), seed)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_same_seed_same_picture_and_float64(name):
    x = IMAGES["colour 32"][:4]
    a, b = (corrupt(x, name, 3, generator(5)) for _ in range(2))
    assert torch.equal(a, b)
    double = corrupt(x.double(), name, 3, generator(5))
    assert double.dtype == torch.float64
    random = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "frost",
              "fog", "spatter", "elastic_transform"}  # fmt: skip
    other = corrupt(x, name, 3, generator(6))
    assert torch.equal(a, other) == (name not in random)
    if name in random:  # each image of a batch has a scene of its own
        same = corrupt(x[:1].repeat(2, 1, 1, 1), name, 3, generator(5))
        assert not torch.equal(same[0], same[1])
    else:
        np.testing.assert_allclose(double, a, atol=1 / 255 + 1e-6)


def test_there_are_enough_kinds():
    assert len(CORRUPTIONS) == 19
    assert len(kinds(1)) == 18


@pytest.mark.parametrize(("name", "sigma"), [("gaussian_noise", 0.08), ("speckle_noise", 0.12 * 0.5)])
def test_noise_has_its_deviation(name, sigma):
    x = torch.full((50, 1, 32, 32), 0.5)
    noise = corrupt(x, name, 3, generator()) - x
    assert noise.std().item() == pytest.approx(sigma, rel=0.02)  # 51,200 values: 0.3 % standard error
    assert abs(noise.mean().item()) < 4 * sigma / 51_200**0.5


def test_shot_and_impulse_noise_follow_their_laws():
    x = torch.full((50, 1, 32, 32), 0.5)
    shot = corrupt(x, "shot_noise", 5, generator())
    assert shot.mean().item() == pytest.approx(0.5, abs=4 * (0.01 / 51_200) ** 0.5)
    assert shot.var().item() == pytest.approx(0.5 / 50, rel=0.04)
    impulse = corrupt(x, "impulse_noise", 5, generator())
    assert (impulse != 0.5).double().mean().item() == pytest.approx(0.07, abs=0.005)
    assert ((impulse == 0) | (impulse == 1) | (impulse == 0.5)).all()


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform", "pixelate", "contrast"])  # fmt: skip
def test_a_flat_image_stays_flat(name):
    for shape in ((2, 3, 40, 40), (2, 1, 9, 13)):
        x = torch.full(shape, 0.3)
        np.testing.assert_allclose(corrupt(x, name, 5, generator()), x, atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur"])
def test_blur_of_a_point_is_symmetric_and_keeps_its_light(name):
    x = torch.zeros(1, 1, 225, 225, dtype=torch.float64)
    x[0, 0, 112, 112] = 1.0
    y = corrupt(x, name, 3, generator())[0, 0]
    assert y.sum().item() == pytest.approx(1.0, abs=1e-9)
    for other in (y.T, y.flip(0), y.flip(1)):
        np.testing.assert_allclose(other, y, atol=1e-12)
    reach = torch.arange(225, dtype=torch.float64) - 112
    spread = (y.sum(0) * reach**2).sum().item()
    radius = 6 * 225 / 224
    assert spread == pytest.approx({"gaussian_blur": (radius / 2) ** 2, "defocus_blur": radius**2 / 4}[name], rel=0.03)


def test_brightness_keeps_hue_and_contrast_the_mean():
    x = torch.tensor([0.4, 0.2, 0.1]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    y = corrupt(x, "brightness", 3, generator())
    np.testing.assert_allclose(y / x, (0.4 + 0.15) / 0.4, rtol=1e-5)
    x = IMAGES["colour 32"]
    np.testing.assert_allclose(corrupt(x, "contrast", 2, generator()).mean((2, 3)), x.mean((2, 3)), atol=1e-6)
    grey = x.mean(1, keepdim=True).expand_as(x)
    np.testing.assert_allclose(corrupt(grey, "saturate", 5, generator()), grey, atol=1e-5)


@pytest.mark.parametrize("quality", [90, 50, 20, 7])
@pytest.mark.parametrize("size", ["grey 28", "colour 224"])
def test_jpeg_is_what_a_real_file_decodes_to(size, quality):
    x = IMAGES[size][:2]
    ours = jpeg(x, quality)
    pixels = (x * 255).round().byte()
    for image, mine in zip(pixels, ours, strict=True):
        array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=quality)
        decoded = torch.tensor(np.asarray(Image.open(file)), dtype=torch.float32)
        theirs = decoded[None] if decoded.dim() == 2 else decoded.permute(2, 0, 1)
        difference = (mine * 255 - theirs).abs()
        # two decoders differ in the rounding of the inverse DCT and in chroma upsampling
        assert difference.mean() < (0.3 if len(image) == 1 else 1.0)  # of 255 levels
        assert distance(mine, theirs / 255) < 0.2 * distance(theirs / 255, image / 255) + 0.002


@pytest.mark.parametrize(
    ("x", "name", "severity", "message"),
    [
        (torch.rand(2, 1, 8, 8), "rain", 1, "name must be one of"),
        (torch.rand(2, 1, 8, 8), "fog", 6, "severity must be one of"),
        (torch.rand(2, 8, 8), "fog", 1, "batch of images"),
        (torch.rand(0, 1, 8, 8), "fog", 1, "non-empty"),
        (torch.rand(2, 4, 8, 8), "fog", 1, "1 or 3 channels"),
        (torch.rand(2, 1, 3, 8), "fog", 1, "at least 4 x 4"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "fog", 1, "float32"),
        (torch.full((2, 1, 8, 8), 2.0), "fog", 1, r"lie in \[0, 1\]"),
        (torch.full((2, 1, 8, 8), torch.nan), "fog", 1, r"lie in \[0, 1\]"),
        (torch.rand(2, 1, 8, 8), "saturate", 1, "images are grey"),
    ],
)
def test_bad_input_is_one_clear_sentence(x, name, severity, message):
    with pytest.raises(InvalidInput, match=message):
        corrupt(x, name, severity, generator())
