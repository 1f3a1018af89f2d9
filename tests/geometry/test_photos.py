"""Folders of photos as people have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from surefoot.errors import InvalidInput
from surefoot.geometry.lm_gaussian.photos import read_photos, resize


def picture(height=20, width=30, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


def save(folder, name, array, **options):
    Image.fromarray(array).save(folder / name, **options)


def test_modes_become_rgb_in_the_unit_interval(tmp_path):
    colour, grey = picture(), picture(channels=1)
    save(tmp_path, "a.png", colour)
    save(tmp_path, "b.png", grey)
    save(tmp_path, "c.png", np.dstack([colour, np.full((20, 30), 128, np.uint8)]))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "d.png")
    save(tmp_path, "notes.txt.png", colour)
    (tmp_path / "readme.md").write_text("not a photo")
    photos = read_photos(tmp_path)
    assert photos.names == ("a.png", "b.png", "c.png", "d.png", "notes.txt.png")
    a, b, c, d, _ = photos.images
    assert all(im.shape == (20, 30, 3) and im.dtype == torch.float32 for im in photos.images)
    np.testing.assert_allclose(a.numpy(), colour / 255, atol=1e-6)
    np.testing.assert_allclose(b.numpy(), np.dstack([grey] * 3) / 255, atol=1e-6)
    np.testing.assert_allclose(c.numpy(), 1 - (128 / 255) * (1 - colour / 255), atol=1e-5)  # on white
    np.testing.assert_allclose(d.numpy(), b.numpy(), atol=1e-5)


def test_exif_rotation_is_applied(tmp_path):
    upright = picture(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate 90 degrees clockwise to show
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "a.png", exif=exif)
    save(tmp_path, "b.png", upright)
    photos = read_photos(tmp_path)
    assert photos.images[0].shape == (20, 30, 3)
    torch.testing.assert_close(photos.images[0], photos.images[1])


def test_sizes(tmp_path):
    save(tmp_path, "a.png", picture(20, 30))
    save(tmp_path, "b.png", picture(24, 28))
    with pytest.raises(InvalidInput, match=r"a.png \(30 x 20\), b.png \(28 x 24\)"):
        read_photos(tmp_path)
    photos = read_photos(tmp_path, crop=True)
    assert [tuple(im.shape) for im in photos.images] == [(20, 28, 3)] * 2
    np.testing.assert_allclose(photos.images[1].numpy(), picture(24, 28)[2:22] / 255, atol=1e-6)


def test_what_is_no_folder_of_photos(tmp_path):
    with pytest.raises(InvalidInput, match="0 photos"):
        read_photos(tmp_path)
    save(tmp_path, "a.png", picture())
    with pytest.raises(InvalidInput, match="1 photo,"):
        read_photos(tmp_path)
    (tmp_path / "walk.mp4").write_bytes(b"0000")
    with pytest.raises(InvalidInput, match=r"video walk\.mp4"):
        read_photos(tmp_path)
    with pytest.raises(InvalidInput, match="is a video"):
        read_photos(tmp_path / "walk.mp4")
    with pytest.raises(InvalidInput, match="not a folder"):
        read_photos(tmp_path / "absent")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(InvalidInput, match=r"b\.png cannot be read"):
        read_photos(tmp_path)


def test_resize():
    image = torch.rand(40, 60, 3)
    small = resize([image], 30)[0]
    assert small.shape == (20, 30, 3)
    torch.testing.assert_close(small.mean(), image.mean(), atol=0.01, rtol=0)
    assert resize([image], 100)[0] is image
