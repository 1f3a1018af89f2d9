import math

import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.nn import diffusion as d


@pytest.mark.parametrize("table", [d.linear_alphas_bar(), d.linear_alphas_bar(200), d.cosine_alphas_bar(200)])
def test_schedules_fall_from_one_to_nearly_nothing(table):
    assert (table[1:] < table[:-1]).all()
    assert table[0] > 0.97
    assert 0 < table[-1] < 0.01


def test_schedule_numbers():
    table = d.linear_alphas_bar(1000)
    assert table[0].item() == pytest.approx(1 - 1e-4)
    assert table[1].item() == pytest.approx((1 - 1e-4) * (1 - (1e-4 + (2e-2 - 1e-4) / 999)), rel=1e-6)
    cosine = d.cosine_alphas_bar(100)
    top = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert cosine[49].item() == pytest.approx(math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / top, rel=1e-5)


def test_times_are_trailing():
    assert d.ddim_times(1000, 4) == [999, 749, 499, 249]
    assert d.ddim_times(5, 5) == [4, 3, 2, 1, 0]
    for steps in (0, 6):
        with pytest.raises(InvalidInput, match="steps"):
            d.ddim_times(5, steps)


def test_noised_keeps_the_variance_of_unit_data():
    x, noise = torch.randn(2, 5000, 3, generator=torch.Generator().manual_seed(0))
    table = d.cosine_alphas_bar(50)
    z = d.noised(x, torch.full((5000,), 20), noise, table)
    assert z.var().item() == pytest.approx(1.0, abs=0.04)  # 15,000 values: standard error .012
    assert torch.allclose(z, table[20].sqrt() * x + (1 - table[20]).sqrt() * noise)


def test_guidance():
    without, given = torch.tensor([1.0]), torch.tensor([3.0])
    assert [d.guided(without, given, w).item() for w in (0, 1, 3)] == [1.0, 3.0, 7.0]


def gaussian_noise(table, std):
    """The exact noise prediction for data N(0, std^2)."""

    def predict(z, t):
        level = d.levels_of(table, t, z)
        return (1 - level).sqrt() * z / (level * std**2 + 1 - level)

    return predict


def test_ddim_reaches_the_datas_scale_with_the_exact_predictor():
    table = d.cosine_alphas_bar(400).double()
    z = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    error = [
        (d.ddim_sample(gaussian_noise(table, 0.5), z, table, steps=steps) - 0.5 * z).abs().max().item()
        for steps in (10, 100, 400)
    ]
    assert error[0] > error[1] > error[2]
    assert error[2] < 0.02  # first-order integrator, 400 steps


def test_levels_hang_together_and_clipping_bounds_the_image():
    table = d.cosine_alphas_bar(100).double()
    z = 3 * torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for clip in (None, 0.3):
        for level in d.ddim(gaussian_noise(table, 1.0), z, table, steps=7, clip=clip):
            again = table[level.t].sqrt() * level.x0 + (1 - table[level.t]).sqrt() * level.noise
            assert torch.allclose(again, level.z)
            assert clip is None or level.x0.abs().max() <= clip


def test_denoising_loss_is_one_for_the_zero_predictor_and_seeded():
    x = torch.zeros(64, 8, 8)
    table = d.cosine_alphas_bar(50)
    loss = [
        d.denoising_loss(lambda z, t: torch.zeros_like(z), x, table, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    ]
    assert loss[0] == loss[1]
    assert loss[0].item() == pytest.approx(1.0, abs=0.09)  # 4,096 squares: standard error .022


def test_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        num_train_timesteps=100, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    theirs.set_timesteps(10)
    table = theirs.alphas_cumprod.double()
    assert theirs.timesteps.tolist() == d.ddim_times(100, 10)
    predict = gaussian_noise(table, 0.7)
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = z
    for t in theirs.timesteps:
        sample = theirs.step(predict(sample, t.repeat(3)), t, sample).prev_sample
    assert torch.allclose(d.ddim_sample(predict, z, table, steps=10), sample, atol=1e-5)
