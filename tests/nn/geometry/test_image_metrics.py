"""Image metrics against scikit-image and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from surefoot.errors import InvalidInput
from surefoot.nn.geometry.image_metrics import EFFNET, FeatureDistance, effnet_feature_distance, ms_ssim, psnr, ssim


def pair(size=48):
    g = torch.Generator().manual_seed(0)
    a = torch.nn.functional.interpolate(
        torch.rand(1, 3, 8, 8, generator=g, dtype=torch.float64), size=(size, size), mode="bicubic"
    ).clamp(0, 1)
    a = a[0].permute(1, 2, 0)
    return a, (a + 0.05 * torch.randn(a.shape, generator=g, dtype=torch.float64)).clamp(0, 1)


def test_psnr():
    assert psnr(torch.zeros(4, 4, 3), torch.full((4, 4, 3), 0.1)) == pytest.approx(20.0, abs=1e-4)


def test_ssim_matches_scikit_image_inside():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = pair()
    _, theirs = metrics.structural_similarity(a.numpy(), b.numpy(), channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True, truncate=3.5)  # fmt: skip
    from surefoot.nn.geometry.image_metrics import _batched, _ssim_maps

    ours = _ssim_maps(_batched(a), _batched(b))[0][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(
        ours[6:-6, 6:-6], theirs[6:-6, 6:-6], atol=1e-10
    )  # they mirror at the rim, we pad with zeros
    assert ssim(a, a).item() == pytest.approx(1.0)
    assert ssim(a, b).item() < 0.99


def test_ssim_has_a_gradient():
    a, b = pair(14)
    a.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ssim(x, b), (a,), atol=1e-6)


def test_ms_ssim():
    a, b = pair(96)
    assert ms_ssim(a, a).item() == pytest.approx(1.0)
    assert ssim(a, b).item() < ms_ssim(a, b).item() < 1  # white noise matters less at coarse scales
    with pytest.raises(InvalidInput, match="11 pixels"):
        ms_ssim(a[:8, :8], b[:8, :8])


def test_feature_distance():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    distance = FeatureDistance(net, ("0", "2"), size=24)
    a, b = pair()
    assert distance(a, a) == 0
    assert 0 < distance(a, b) < distance(a, torch.rand_like(a))
    with pytest.raises(InvalidInput, match="layers"):
        FeatureDistance(net, ("7",))


def test_effnet_feature_distance():
    pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    a, b = pair()
    state = torch.get_rng_state()
    assert effnet_feature_distance(a, a) == 0
    assert effnet_feature_distance(a, b) == effnet_feature_distance(b, a) == effnet_feature_distance(a, b)
    coarse = torch.nn.functional.avg_pool2d(a.permute(2, 0, 1)[None], 4)
    blurred = torch.nn.functional.interpolate(coarse, size=a.shape[:2], mode="bilinear")[0].permute(1, 2, 0)
    mild = a + 0.2 * (blurred - a)
    assert 0 < effnet_feature_distance(a, mild) < effnet_feature_distance(a, blurred) < 16
    assert torch.equal(state, torch.get_rng_state())
    assert "LPIPS" not in EFFNET and "EfficientNet-Lite0" in EFFNET
