from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from surefoot.errors import InvalidInput, Refused, UnsupportedOp
from surefoot.models.networks import mlp, small_cnn
from surefoot.nn.fingerprint import _odd_words, fingerprint
from surefoot.nn.lowrank import (
    Adapter,
    LowRank,
    adapter_summary,
    adapters,
    attach_,
    detach_,
    match_layers,
)
from surefoot.nn.lowrank_io import load_adapter_, save_adapter
from surefoot.nn.randomized_svd import all_finite, randomized_svd, truncate


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_spectrum(m: int, n: int, s: Tensor, seed: int = 0) -> Tensor:
    u = torch.linalg.qr(draw(m, len(s), seed=seed)).Q
    v = torch.linalg.qr(draw(n, len(s), seed=seed + 1)).Q
    return (u * s) @ v.T


def principal(name: str, weight: Tensor, rank: int = 2, scaling: float = 0.5) -> LowRank:
    u, s, vh = randomized_svd(weight, min(rank, *weight.shape), niter=None)
    root = (s / scaling).sqrt()
    low = LowRank(root[:, None] * vh, u * root, scaling)
    return LowRank(low.A, low.B, scaling, weight - low.delta())


def lora(name: str, weight: Tensor) -> LowRank:
    return LowRank(draw(2, weight.shape[1]).to(weight), torch.zeros(len(weight), 2).to(weight), 2.0)


def train_a_little(model: nn.Module, x: Tensor) -> nn.Module:
    """Two AdamW steps with weight decay on what requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


# --- numerics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "rank"), [(300, 200, 8), (200, 300, 8), (256, 256, 32)])
def test_randomized_svd_is_within_one_percent_at_four_iterations(m: int, n: int, rank: int) -> None:
    s = 1.0 / torch.arange(1, min(m, n) + 1, dtype=torch.float64)
    w = with_spectrum(m, n, s)
    best = s[rank:].norm()
    errors = []
    for niter in range(9):
        runs = []
        for seed in range(3):
            g = torch.Generator().manual_seed(seed)
            u, sv, vh = randomized_svd(w, rank, niter=niter, generator=g)
            assert u.shape == (m, rank) and vh.shape == (rank, n)
            assert torch.allclose(u.T @ u, torch.eye(rank, dtype=w.dtype), atol=1e-10)
            assert torch.allclose(vh @ vh.T, torch.eye(rank, dtype=w.dtype), atol=1e-10)
            runs.append((w - (u * sv) @ vh).norm() / best)
        errors.append(torch.stack(runs).mean().item())
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(errors))
    assert 1.0 - 1e-9 <= errors[4] <= 1.01 and errors[0] > errors[4]


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("rank", [16, 64, 128])
def test_two_iterations_leave_no_more_than_four_of_torch_svd_lowrank(rank: int, power: float) -> None:
    """What peft's `pissa_niter_4` runs; means over three sketches, on 768 x 768 in float32."""
    s = torch.arange(1, 769, dtype=torch.float64) ** -power
    w = with_spectrum(768, 768, s).float()
    ours, theirs = [], []
    for seed in range(3):
        u, sv, vh = randomized_svd(w, rank, niter=2, generator=torch.Generator().manual_seed(seed))
        ours.append((w - (u * sv) @ vh).norm())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            left, values, right = torch.svd_lowrank(w, rank, niter=4)
        theirs.append((w - (left * values) @ right.mT).norm())
    assert torch.stack(ours).mean() <= torch.stack(theirs).mean()
    assert torch.stack(ours).max() < 1.01 * s[rank:].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "s",
    [
        torch.zeros(1),  # the zero matrix
        torch.tensor([3.0, 2.0, 1.0]),  # rank 3: the Krylov space closes at once
        torch.ones(200),  # one repeated value: so it does too
        torch.tensor([2.0] * 60 + [0.1] * 140),  # more copies of the first than a block is wide
        2.0 ** -torch.arange(60.0),  # steep: late blocks are all rounding
    ],
    ids=["zero", "rank 3", "orthogonal", "cluster", "steep"],
)
def test_a_krylov_space_that_closes_early_goes_on_from_new_directions(s: Tensor, dtype: torch.dtype) -> None:
    w = with_spectrum(300, 200, s.double()).to(dtype)
    w[:, 150:] *= len(s) > 3  # columns of zeros as well
    exact = torch.linalg.svdvals(w.double())
    eps = torch.finfo(dtype).eps
    for rank in (8, 40):
        u, sv, vh = randomized_svd(w, rank)
        for factor in (u.mT, vh):
            assert (factor @ factor.mT - torch.eye(rank, dtype=dtype)).abs().max() < 100 * eps
        error = torch.linalg.norm(w.double() - (u * sv).double() @ vh.double())
        assert error <= 1.01 * exact[rank:].norm() + 300 * eps * exact[0]


def test_randomized_svd_is_exact_where_the_sketch_is_not_thin_and_follows_the_generator() -> None:
    w = draw(30, 20)
    exact = torch.linalg.svd(w, full_matrices=False)
    u, s, vh = randomized_svd(w, 3, niter=0)
    assert torch.equal(s, exact.S[:3]) and torch.equal(u, exact.U[:, :3]) and torch.equal(vh, exact.Vh[:3])
    big = draw(100, 90)
    state = torch.random.get_rng_state()
    one, two = (randomized_svd(big, 4, niter=1, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    other = randomized_svd(big, 4, niter=1, generator=torch.Generator().manual_seed(8))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)) and not torch.equal(one[1], other[1])
    assert torch.equal(state, torch.random.get_rng_state())
    for rank in (0, 21):
        with pytest.raises(InvalidInput, match="rank must be between 1 and 20"):
            randomized_svd(w, rank)


def test_truncation_error_is_the_tail_of_the_core() -> None:
    a, b = draw(6, 40), draw(30, 6, seed=1)
    s = torch.linalg.svdvals(b @ a)[:6]
    for rank in (1, 4, 6):
        ta, tb, left = truncate(a, b, rank)
        assert ta.shape == (rank, 40) and tb.shape == (30, rank)
        assert torch.allclose(left, s[rank:])
        assert torch.allclose(tb.T @ tb, ta @ ta.T)
        error = b @ a - tb @ ta
        spectral = torch.linalg.matrix_norm(error, 2)
        assert torch.allclose(spectral, s[rank] if rank < 6 else spectral.new_zeros(()), atol=1e-10)
    with pytest.raises(InvalidInput, match="rank must be between 1 and 6"):
        truncate(a, b, 7)


# --- layers -----------------------------------------------------------------------------------------------------------


def layers() -> list[tuple[str, nn.Module, Tensor]]:
    return [
        ("linear", nn.Linear(7, 5), draw(3, 7)),
        ("no bias", nn.Linear(7, 5, bias=False), draw(3, 2, 7)),
        ("conv", nn.Conv2d(3, 6, 3, stride=2, padding=1), draw(2, 3, 8, 8)),
        ("conv options", nn.Conv2d(3, 6, (3, 2), padding=(2, 1), dilation=2, padding_mode="reflect"), draw(2, 3, 9, 9)),
        ("conv same", nn.Conv2d(3, 6, 3, padding="same", bias=False), draw(2, 3, 5, 5)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "layer", "x"), layers(), ids=[c[0] for c in layers()])
def test_start_training_merging_and_undoing(name: str, layer: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    tight = 1e-12 if dtype == torch.float64 else 2e-5
    model, x = nn.Sequential(copy.deepcopy(layer)).to(dtype), x.to(dtype)
    before, original = model(x), copy.deepcopy(model.state_dict())
    attach_(model, match_layers(model), principal)
    adapter: Any = adapters(model)["0"]
    assert torch.allclose(model(x), before, atol=tight, rtol=tight)
    assert torch.allclose(adapter.weight, original["0.weight"], atol=tight)
    frozen = adapter.base.weight.clone()
    train_a_little(model, x)
    assert torch.equal(adapter.base.weight, frozen)
    assert not torch.allclose(adapter.A, adapter.A0) and not torch.allclose(adapter.B, adapter.B0)
    merged: Any = detach_(copy.deepcopy(model), merged=True)
    assert type(merged[0]) is type(layer) and list(merged.state_dict()) == list(original)
    assert torch.allclose(merged(x), model(x), atol=10 * tight, rtol=10 * tight)
    assert not torch.allclose(merged(x), before, rtol=1e-3)
    assert all(p.requires_grad for p in merged.parameters())
    undone: Any = detach_(copy.deepcopy(model), merged=False)
    assert torch.allclose(undone[0].weight, original["0.weight"], atol=tight)
    update = adapter.update()
    moved = merged[0].weight.flatten(1) - original["0.weight"].flatten(1)
    assert update.rank == 2 * adapter.A.shape[0] and torch.allclose(update.delta(), moved, atol=10 * tight)


def test_plain_lora_keeps_the_weight_and_exports_rank_r() -> None:
    model, x = nn.Sequential(nn.Linear(7, 5)).double(), draw(3, 7)
    weight, before = model.get_parameter("0.weight").clone(), model(x)
    attach_(model, match_layers(model), lora)
    adapter: Any = adapters(model)["0"]
    assert torch.equal(model(x), before) and torch.equal(adapter.base.weight, weight)
    assert adapter.update().rank == 2
    train_a_little(model, x)
    assert torch.equal(detach_(model, merged=False).get_parameter("0.weight"), weight)


def test_transformers_conv1d_is_transposed_in_and_out() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model, x = nn.Sequential(conv1d(5, 7)).double(), draw(3, 7)
    weight, before = model.get_parameter("0.weight").clone(), model(x)
    attach_(model, match_layers(model), principal)
    adapter = adapters(model)["0"]
    assert adapter.kind == "conv1d" and adapter.A.shape == (2, 7) and adapter.B.shape == (5, 2)
    assert torch.allclose(model(x), before, atol=1e-12)
    train_a_little(model, x)
    after = model(x)
    assert torch.allclose(detach_(copy.deepcopy(model), merged=True)(x), after, atol=1e-12)
    assert torch.allclose(detach_(model, merged=False).get_parameter("0.weight"), weight, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_code_that_reaches_into_the_layer_sees_the_adapted_weight(training: bool) -> None:
    """MultiheadAttention reads out_proj.weight, and the fused evaluation path reads linear1.weight."""
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = draw(2, 4, 8, dtype=torch.float32)
    attach_(block, match_layers(block), principal)
    assert set(adapters(block)) == {"self_attn.out_proj", "linear1", "linear2"}
    train_a_little(block, x)
    block.train(training)
    merged = detach_(copy.deepcopy(block), merged=True)
    with torch.no_grad():
        assert torch.allclose(block(x), merged(x), atol=1e-5)


def test_half_precision_base_reports_drift_or_is_kept_in_float32() -> None:
    x = draw(4, 32, dtype=torch.bfloat16)
    plain = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    rough, kept = (attach_(copy.deepcopy(plain), ["0"], principal, keep_base_fp32=keep) for keep in (False, True))
    bases: Any = [adapters(model)["0"].base for model in (kept, rough)]
    assert 1e-6 < adapter_summary(rough)[0].drift < 2**-8
    assert adapter_summary(kept)[0].drift < 1e-6
    for model in (rough, kept):
        assert model(x).dtype == torch.bfloat16
        assert torch.allclose(model(x).float(), plain(x).float(), atol=0.03)
    assert [base.weight.dtype for base in bases] == [torch.float32, torch.bfloat16]


def test_kept_original_is_restored_to_the_bit() -> None:
    model: Any = nn.Sequential(nn.Linear(9, 9))
    weight = model[0].weight.clone()
    attach_(model, match_layers(model), principal, keep_original=True)
    assert torch.equal(detach_(model, merged=False).get_parameter("0.weight"), weight)


def test_trainable_count_and_summary() -> None:
    model = mlp((1, 8, 8), 10, hidden=(20,))
    attach_(model, match_layers(model, exclude=["3"]), principal, trainable=["3"])
    (line,) = adapter_summary(model)
    assert (line.name, line.shape, line.rank, line.trainable) == ("1", (20, 64), 2, 2 * 84)
    assert line.drift == 0.0 and line.scaling == 0.5
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 84 + 10 * 20 + 10


# --- choosing ---------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.attention = nn.MultiheadAttention(4, 2)


def test_matching_rules() -> None:
    model = Tied()
    assert list(match_layers(model)) == ["body", "attention.out_proj"]
    assert list(match_layers(model, r"b\w+")) == ["body"]
    assert list(match_layers(model, ["out_proj"])) == ["attention.out_proj"]
    with pytest.raises(Refused, match="tied"):
        match_layers(model, ["head"])
    for target in ("embed", "grouped", "attention"):
        with pytest.raises(UnsupportedOp, match=f"'{target}'"):
            match_layers(model, [target])
    for nothing in ("nowhere", ["nowhere"], "embed"):
        with pytest.raises(InvalidInput, match="matches no layer"):
            match_layers(model, nothing)
    cnn = small_cnn((1, 8, 8), 10)
    assert all(isinstance(m, nn.Conv2d | nn.Linear) for m in match_layers(cnn).values())


def test_unusable_weights_are_named() -> None:
    def refused(layer: nn.Module, error: type[Exception], match: str) -> None:
        model: Any = nn.Sequential(nn.Linear(3, 3), layer)
        before = copy.deepcopy(model[0].state_dict())
        with pytest.raises(error, match=match):
            attach_(model, match_layers(model), principal)
        assert type(model[0]) is nn.Linear and torch.equal(before["weight"], model[0].weight)

    broken = nn.Linear(3, 3)
    broken.weight.data[0, 0] = float("nan")
    refused(broken, InvalidInput, "'1' holds NaN")
    refused(nn.Linear(3, 3, device="meta"), InvalidInput, "'1' is on the meta device")
    integer = nn.Linear(3, 3).requires_grad_(False)
    integer.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    refused(integer, InvalidInput, "'1' is torch.int8.*dequantize")
    refused(nn.LazyLinear(3), InvalidInput, "'1' is lazy")
    refused(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), Refused, "'1' is computed")


def test_a_second_adapter_and_a_missing_one_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(InvalidInput, match="no adapter"):
        detach_(model, merged=True)
    attach_(model, match_layers(model), principal)
    with pytest.raises(Refused, match="already carries"):
        match_layers(model)
    with pytest.raises(InvalidInput, match="not a module"):
        attach_(nn.Sequential(nn.Linear(3, 3)), ["0"], principal, trainable=["head"])
    root = attach_(nn.Linear(3, 4), [""], principal)
    assert isinstance(root, Adapter) and type(detach_(root, merged=True)) is nn.Linear


# --- native files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [principal, lora])
def test_native_file_round_trip(tmp_path: Path, factor: Callable[[str, Tensor], LowRank]) -> None:
    base, x = small_cnn((1, 8, 8), 10), draw(4, 1, 8, 8, dtype=torch.float32)
    model = attach_(copy.deepcopy(base), match_layers(base), factor)
    train_a_little(model, x)
    model.eval()
    save_adapter(model, tmp_path / "a.safetensors")
    again = copy.deepcopy(base)
    for name, buffer in model.named_buffers():  # batch-norm statistics moved, and are no part of an adapter
        if "running" in name:
            again.get_buffer(name).copy_(buffer)
    other: Any = copy.deepcopy(again)
    load_adapter_(again, tmp_path / "a.safetensors").eval()
    assert torch.allclose(again(x), model(x), atol=1e-5)
    back = detach_(again, merged=False)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(back.parameters(), base.parameters(), strict=True))
    other[0].weight.data += 1e-3
    with pytest.raises(Refused, match=r"another base.*'0'"):
        load_adapter_(other, tmp_path / "a.safetensors")
    with pytest.raises(Refused, match="already carries"):
        load_adapter_(model, tmp_path / "a.safetensors")


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_adapter_(nn.Sequential(nn.Linear(3, 3)), tmp_path / "text")
    save_file({"x": torch.ones(1)}, str(tmp_path / "other"))
    with pytest.raises(InvalidInput, match="not a native adapter file"):
        load_adapter_(nn.Sequential(nn.Linear(3, 3)), tmp_path / "other")


def test_fingerprint_tells_any_changed_number_dtype_and_shape_apart() -> None:
    layer = nn.Linear(50, 70)
    first = fingerprint(layer)
    assert len(first) == 32 and fingerprint(copy.deepcopy(layer)) == first
    seen = {first}
    weight = layer.weight.data
    for change in (
        lambda w: w[3, 4].mul_(1 + 2e-7),  # one bit
        lambda w: w[69, 49].neg_(),  # the sign bit of the last number
        lambda w: w.copy_(w[torch.arange(69, -1, -1)].clone()),  # rows in another order
    ):
        change(weight)
        seen.add(fingerprint(layer))
    assert len(seen) == 4
    for other in (copy.deepcopy(layer).bfloat16(), nn.Linear(70, 50)):
        other.weight.data = other.weight.data if other.weight.dtype != torch.float32 else weight.reshape(50, 70)
        seen.add(fingerprint(other))
    assert len(seen) == 6


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])  # the last spans more than the Gram matrix can tell: Householder
def test_randomized_svd_keeps_its_digits_whatever_the_decay(power: float) -> None:
    g = torch.Generator().manual_seed(901)
    u, v = (torch.linalg.qr(torch.randn(300, 300, generator=g, dtype=torch.float64)).Q for _ in range(2))
    w = (u * torch.arange(1, 301).double() ** -power) @ v.T
    left, s, right = randomized_svd(w.float(), 32, niter=4)
    left64, s64, right64 = randomized_svd(w, 32, niter=4, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(32)
    assert (left.T @ left - eye).abs().max() < 2e-5
    assert (right @ right.T - eye).abs().max() < 2e-5
    best = (w - (left64 * s64) @ right64).norm()
    assert (w - (left * s).double() @ right.double()).norm() < best * 1.02


@pytest.mark.parametrize("niter", [2, 4])
@pytest.mark.parametrize("power", [1.5, 2.0, 3.0])
def test_a_steep_spectrum_leaves_the_search_space_orthonormal(power: float, niter: int) -> None:
    """Late blocks are mostly rounding along the first directions; one pass less against them, and the error is a hundred times the best."""
    s = torch.arange(1, 385, dtype=torch.float64) ** -power
    w = with_spectrum(384, 384, s)
    left, values, right = randomized_svd(w.float(), 64, niter=niter)
    for factor in (left.mT, right):
        assert (factor @ factor.mT - torch.eye(64)).abs().max() < 1e-5
    error = (w - (left * values).double() @ right.double()).norm()
    assert error <= 1.001 * s[64:].norm() + 3e-6  # float32 holds 3e-7 of the first value in each of the 64 triplets


def test_a_sum_that_overflows_is_not_taken_for_infinite_numbers() -> None:
    """`all_finite` looks at the sum first."""
    large = torch.full((40, 30), 3e38)
    assert not large.sum().isfinite() and all_finite(large) and all_finite(large.T[::2])
    for bad in (math.inf, -math.inf, math.nan):
        spoilt = torch.zeros(40, 30)
        spoilt[7, 3] = bad
        assert not all_finite(spoilt)
    opposed = torch.zeros(40, 30)
    opposed[0, 0], opposed[1, 1] = math.inf, -math.inf
    assert not all_finite(opposed)


def test_fingerprint_is_the_sum_that_its_docstring_says() -> None:
    """By exact integers: files saved by another version keep their mark."""
    layer = nn.Linear(50, 70)
    layer.weight.data = torch.arange(3500, dtype=torch.float32).reshape(70, 50) / 7
    odd = [int(c) for c in _odd_words()]
    octets = layer.weight.detach().numpy().tobytes()
    words = [int.from_bytes(octets[i : i + 8], "little", signed=True) for i in range(0, len(octets), 8)]
    digest = hashlib.sha256(b"torch.float32(70, 50)")
    for i in range(0, len(words), 1024):
        total = sum(c * word for c, word in zip(odd, words[i : i + 1024], strict=False))
        digest.update((total % 2**64).to_bytes(8, "little"))
    assert fingerprint(layer) == digest.hexdigest()[:32]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fingerprint_is_the_same_on_cuda() -> None:
    layer = nn.Linear(1500, 700)
    here = fingerprint(layer)
    assert fingerprint(layer.cuda()) == here
