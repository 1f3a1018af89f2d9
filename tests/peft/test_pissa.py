from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.core.task import Training
from surefoot.datasets.embedded import digits
from surefoot.errors import InvalidInput, Refused
from surefoot.models.networks import Normalized, mlp, small_cnn
from surefoot.nn.fingerprint import fingerprint
from surefoot.nn.lowrank import adapter_summary, adapters
from surefoot.peft.pissa import (
    PiSSA,
    apply_pissa,
    apply_pissa_,
    from_peft,
    initialize_peft_,
    int4,
    load_adapter_,
    merge_pissa,
    nf4,
    pissa_factors,
    pissa_lora_config,
    qpissa_factors,
    save_adapter,
    to_peft,
    unapply_pissa,
)
from surefoot.training.loop import fit


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decaying(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    u, v = (torch.linalg.qr(draw(n, n, seed=seed)).Q for seed in (1, 2))
    return ((u / torch.arange(1, n + 1)) @ v.T).to(dtype)


def train_a_little(model: nn.Module, run: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        optimizer.step()


class Two(nn.Module):
    """A convolution, a nested linear layer, and names that are suffixes of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.proj = nn.Linear(6, 12)
        self.inner = nn.ModuleDict({"proj": nn.Linear(12, 12), "out": nn.Linear(12, 3)})

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.proj(F.relu(self.conv(x)).mean((2, 3))))
        return self.inner["out"](F.relu(self.inner["proj"](h)))


# --- factors ----------------------------------------------------------------------------------------------------------


def test_worked_example() -> None:
    w = torch.tensor([[3.0, 0.0], [4.0, 5.0]], dtype=torch.float64)
    low = pissa_factors(w, 1)
    assert torch.allclose(low.A @ low.A.T, torch.tensor([[6.708204]], dtype=torch.float64), atol=1e-6)
    assert torch.allclose(low.delta(), torch.tensor([[1.5, 1.5], [4.5, 4.5]], dtype=torch.float64))
    assert low.residual is not None
    assert torch.allclose(low.residual, torch.tensor([[1.5, -1.5], [-0.5, 0.5]], dtype=torch.float64))
    assert torch.allclose(torch.linalg.svdvals(low.residual)[0], torch.tensor(2.236068, dtype=torch.float64))


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("niter", [None, 0, 4])
@pytest.mark.parametrize(("m", "n", "rank"), [(20, 30, 1), (30, 20, 7), (60, 80, 8), (12, 12, 12)])
def test_identity_norms_and_balance(m: int, n: int, rank: int, niter: int | None, scaling: float) -> None:
    w = draw(m, n)
    low = pissa_factors(w, rank, scaling=scaling, niter=niter)
    assert low.A.shape == (rank, n) and low.B.shape == (m, rank) and low.residual is not None
    assert (low.residual + scaling * low.B @ low.A - w).abs().max() < 1e-13 * w.norm()
    assert torch.allclose(low.B.T @ low.B, low.A @ low.A.T, atol=1e-9)
    if niter is None:
        s = torch.linalg.svdvals(w)
        assert torch.allclose(low.A @ low.A.T, torch.diag(s[:rank] / scaling), atol=1e-10)
        tail = s[rank] if rank < min(m, n) else s.new_zeros(())
        assert torch.allclose(torch.linalg.matrix_norm(low.residual, 2), tail, atol=1e-10)
        assert torch.allclose(low.residual.square().sum(), s[rank:].square().sum(), atol=1e-10)


def test_rank_deficient_directions_can_train() -> None:
    w = draw(20, 3) @ draw(3, 30, seed=1)
    low = pissa_factors(w, 5)
    assert low.residual is not None and torch.allclose(low.residual + low.delta(), w, atol=1e-12)
    assert torch.equal(low.B[:, 3:], torch.zeros(20, 2, dtype=torch.float64))
    assert (low.A[3:].norm(dim=1) > 0.1).all() and low.A[3:].abs().max() <= 30**-0.5
    zero = pissa_factors(torch.zeros(6, 4), 2)
    assert zero.A.isfinite().all() and zero.A.norm() > 0 and torch.equal(zero.B, torch.zeros(6, 2))


def test_dtypes_follow_the_weight_and_a_generator_repeats() -> None:
    w = draw(64, 64)
    assert pissa_factors(w, 4).A.dtype == torch.float64
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert pissa_factors(w.to(dtype), 4).A.dtype == torch.float32
    one, two = (pissa_factors(w, 8, niter=1, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.A, two.A) and torch.equal(one.B, two.B)


def test_bad_factors_input() -> None:
    w = draw(6, 4)
    for rank in (0, -1, 5):
        with pytest.raises(InvalidInput, match="rank must be"):
            pissa_factors(w, rank)
    for scaling in (0.0, -1.0, math.nan):
        with pytest.raises(InvalidInput, match="scaling must be positive"):
            pissa_factors(w, 1, scaling=scaling)
    with pytest.raises(InvalidInput, match="float matrix"):
        pissa_factors(torch.zeros(4, 4, dtype=torch.int8), 1)
    with pytest.raises(InvalidInput, match="float matrix"):
        pissa_factors(torch.zeros(4), 1)
    with pytest.raises(InvalidInput, match="NaN"):
        pissa_factors(w / 0.0 * 0.0, 1)
    with pytest.raises(InvalidInput, match="meta"):
        pissa_factors(w.to("meta"), 1)
    with pytest.raises(InvalidInput, match="iters must be"):
        qpissa_factors(w, 1, int4, iters=0)


# --- quantization -----------------------------------------------------------------------------------------------------


def test_nf4_levels_and_blocks() -> None:
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    grid = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    assert torch.allclose(nf4(grid, block=len(grid)).unique(), torch.tensor(published, dtype=torch.float64), atol=1e-6)
    w = draw(5, 13)  # 65 numbers: a padded second block
    for quantize, worst in ((nf4, 0.16), (int4, 0.0715)):
        assert quantize(w).shape == w.shape
        scale = torch.cat([w.flatten()[:64].abs().max().expand(64), w.flatten()[64:].abs()])
        assert ((quantize(w) - w).flatten().abs() <= worst * scale + 1e-12).all()
        assert torch.equal(quantize(torch.zeros(3, 3)), torch.zeros(3, 3))
        assert torch.allclose(quantize(quantize(w)), quantize(w))


@pytest.mark.parametrize("quantize", [nf4, int4])
@pytest.mark.parametrize("rank", [8, 32])
def test_qpissa_reconstructs_better_at_every_step(quantize: Any, rank: int) -> None:
    w = decaying(128) + 0.003 * draw(128, 128, seed=5, dtype=torch.float32)

    def error(iters: int) -> float:
        low = qpissa_factors(w, rank, quantize, iters)
        assert low.residual is not None
        assert torch.equal(quantize(low.residual), low.residual) or torch.allclose(quantize(low.residual), low.residual)
        return (w - low.residual - low.delta()).norm().item()

    assert error(5) < error(1) < (w - quantize(w)).norm().item()
    plain = pissa_factors(w, rank)
    assert plain.residual is not None
    once = qpissa_factors(w, rank, quantize, 1)
    assert torch.equal(once.A, plain.A) and torch.equal(once.residual, quantize(plain.residual))  # type: ignore[arg-type]


def test_qpissa_model_merges_and_restores_but_has_no_lora_export(tmp_path: Path) -> None:
    base, x = mlp((8,), 3, hidden=(32,)), draw(5, 8, dtype=torch.float32)
    model = apply_pissa(base, 3, quantize=int4)
    assert (model(x) - base(x)).norm() < 0.2 * base(x).norm()
    assert torch.allclose(merge_pissa(model)(x), model(x), atol=1e-5)
    back = unapply_pissa(model)
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), base.parameters(), strict=True))
    with pytest.raises(Refused, match="quantized"):
        to_peft(model, tmp_path)
    save_adapter(model, tmp_path / "q.safetensors")
    loaded = load_adapter_(copy.deepcopy(base), tmp_path / "q.safetensors")
    assert torch.allclose(loaded(x), model(x), atol=1e-6)
    assert torch.equal(next(unapply_pissa(loaded).parameters()), next(base.parameters()))


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 1.0, 16.0])
@pytest.mark.parametrize("rank", [1, 4, 64])
def test_forward_is_unchanged_at_the_start(rank: int, alpha: float | None, rslora: bool) -> None:
    model, x = Two(), draw(4, 1, 8, 8, dtype=torch.float32)
    adapted = apply_pissa(model, rank, alpha=alpha, rslora=rslora)
    assert (adapted(x) - model(x)).norm() <= 1e-5 * model(x).norm()
    scaling = (alpha or rank) / (math.sqrt(rank) if rslora else rank)
    ranks = {info.name: info.rank for info in adapter_summary(adapted)}
    assert ranks == {n: min(rank, s) for n, s in (("conv", 6), ("proj", 6), ("inner.proj", 12), ("inner.out", 3))}
    assert all(info.scaling == pytest.approx(scaling) for info in adapter_summary(adapted))
    assert type(model.conv) is nn.Conv2d and all(p.requires_grad for p in model.parameters())
    grads = torch.autograd.grad(adapted(x).square().sum(), [p for p in adapted.parameters() if p.requires_grad])
    assert all(g.norm() > 0 for g in grads)  # LoRA's A would have none


def test_training_merging_and_undoing_a_model() -> None:
    model, x = Two(), draw(4, 1, 8, 8, dtype=torch.float32)
    adapted = apply_pissa(model, 2)
    frozen = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    train_a_little(adapted, lambda m: m(x))
    assert all(torch.equal(adapted.get_parameter(n), p) for n, p in frozen.items())
    merged, undone = merge_pissa(adapted), unapply_pissa(adapted)
    assert torch.allclose(merged(x), adapted(x), atol=1e-6) and not torch.allclose(merged(x), model(x), rtol=1e-3)
    for p, q in zip(undone.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6) and p.requires_grad
    exact = unapply_pissa(apply_pissa(model, 2, keep_original=True))
    assert all(torch.equal(p, q) for p, q in zip(exact.parameters(), model.parameters(), strict=True))


def test_the_residual_takes_the_place_of_a_weight_that_owns_its_memory_and_of_no_other() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40))
    model[2].weight.data = model[1].weight.data.T  # type: ignore[union-attr,operator]  # two parameters, one memory
    reference: Any = copy.deepcopy(model)
    ends: list[int] = [layer.weight.data_ptr() for layer in model]  # type: ignore[operator,union-attr]
    marks = [fingerprint(layer) for layer in reference]
    adapted: Any = apply_pissa_(model, 4)
    assert [adapted[i].base.weight.data_ptr() == ends[i] for i in range(3)] == [True, False, False]
    for i in range(3):
        expected = pissa_factors(reference[i].weight, 4, niter=4)
        assert torch.equal(adapted[i].base.weight, expected.residual) and torch.equal(adapted[i].A, expected.A)  # type: ignore[arg-type]
        assert adapted[i].fingerprint == marks[i]
    kept: Any = apply_pissa_(copy.deepcopy(reference), 4, keep_original=True)
    assert torch.equal(kept[0].original, reference[0].weight)
    half = copy.deepcopy(reference).half()
    rounded: Any = apply_pissa_(half, 4)
    assert 0 < rounded[0].drift < 1e-3


@pytest.mark.parametrize("hold", ["state_dict", "detached", "numpy"])
def test_memory_that_somebody_holds_is_left_to_them(hold: str) -> None:
    model: Any = nn.Sequential(nn.Linear(40, 40))
    before = model[0].weight.detach().clone()
    held: Any = {
        "state_dict": model.state_dict,
        "detached": lambda: model[0].weight.detach(),
        "numpy": lambda: model[0].weight.detach().numpy(),
    }[hold]()
    address = model[0].weight.data_ptr()
    adapted: Any = apply_pissa_(model, 4)
    assert adapted[0].base.weight.data_ptr() != address
    weight = {"state_dict": lambda: held["0.weight"], "numpy": lambda: torch.from_numpy(held)}.get(hold, lambda: held)()
    assert torch.equal(weight, before)


def test_bad_models() -> None:
    with pytest.raises(InvalidInput, match=r"rank 4 is larger than layer 'inner\.out'"):
        apply_pissa(Two(), 4, target_modules=["out"])
    with pytest.raises(InvalidInput, match="matches no layer"):
        apply_pissa(Two(), 4, target_modules="nothing")
    for alpha in (0.0, -1.0):
        with pytest.raises(InvalidInput, match="alpha must be positive"):
            apply_pissa(Two(), 4, alpha=alpha)
    with pytest.raises(InvalidInput, match="rank must be"):
        apply_pissa(Two(), 0)
    with pytest.raises(Refused, match="already carries"):
        apply_pissa(apply_pissa(Two(), 2), 2)
    broken = Two()
    broken.proj.weight.data[0, 0] = math.inf
    with pytest.raises(InvalidInput, match="'proj' holds NaN or infinite"):
        apply_pissa(broken, 2)


# --- peft -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "rslora"), [(None, False), (6.0, False), (6.0, True)])
def test_export_loads_in_peft_on_the_original_base(tmp_path: Path, alpha: float | None, rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    base, x = Two(), draw(4, 1, 8, 8, dtype=torch.float32)
    model = apply_pissa(base, 4, alpha=alpha, rslora=rslora)
    untrained = adapters(model)["proj"].update()
    assert untrained.delta().abs().max() <= 1e-6 * base.proj.weight.abs().max()
    train_a_little(model, lambda m: m(x))
    errors = to_peft(model, tmp_path / "exact")
    assert set(errors.values()) == {0.0}
    config = json.loads((tmp_path / "exact" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == 8
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "exact")
    assert torch.allclose(loaded(x), model(x), atol=1e-5) and not torch.allclose(loaded(x), base(x), rtol=1e-3)
    assert torch.allclose(loaded.merge_and_unload()(x), model(x), atol=1e-5)

    errors = to_peft(model, tmp_path / "cut", rank=3)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "cut").merge_and_unload()
    for name, adapter in adapters(model).items():
        lost = adapter.update().delta() - (loaded.get_submodule(name).weight - base.get_submodule(name).weight).flatten(
            1
        )  # type: ignore[operator]
        assert torch.linalg.matrix_norm(lost, 2).item() == pytest.approx(errors[name], abs=2e-6)
    assert max(errors.values()) > 1e-3


def test_export_names_only_the_adapted_layers(tmp_path: Path) -> None:
    """`proj` is a suffix of `inner.proj`: only the first was adapted, and only it may get the adapter."""
    peft = pytest.importorskip("peft")
    base, x = Two(), draw(4, 1, 8, 8, dtype=torch.float32)
    model = apply_pissa(base, 2, target_modules="proj")
    train_a_little(model, lambda m: m(x))
    to_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert [n for n, _ in loaded.named_modules() if n.endswith("lora_A")] == ["base_model.model.proj.lora_A"]
    assert torch.allclose(loaded(x), model(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tiny_transformer_round_trip(tmp_path: Path, kind: str) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))

    def logits(model: nn.Module) -> Tensor:
        return model(tokens).logits

    model = apply_pissa(base, 4, alpha=8.0)
    assert not any("lm_head" in name for name in adapters(model))
    assert {a.kind for a in adapters(model).values()} == {"conv1d" if kind == "gpt2" else "linear"}
    assert torch.allclose(logits(model), logits(base), atol=1e-5)
    train_a_little(model, logits)
    to_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(base), rtol=1e-2)

    inside = peft.get_peft_model(copy.deepcopy(base), pissa_lora_config(4, alpha=8.0))
    initialize_peft_(inside)
    assert torch.allclose(logits(inside), logits(base), atol=1e-5)
    train_a_little(inside, logits)
    to_peft(inside, tmp_path / "inside")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "inside")
    assert torch.allclose(logits(loaded), logits(inside), atol=1e-5)
    back = unapply_pissa(from_peft(inside))
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(back.parameters(), base.parameters(), strict=True))


def test_inside_peft_on_a_plain_module() -> None:
    peft = pytest.importorskip("peft")
    base, x = Two(), draw(4, 1, 8, 8, dtype=torch.float32)
    config = pissa_lora_config(3, alpha=6.0, rslora=True, target_modules=["conv", "proj"])
    model = initialize_peft_(peft.get_peft_model(copy.deepcopy(base), config))
    assert torch.allclose(model(x), base(x), atol=1e-5)
    ours = apply_pissa(base, 3, alpha=6.0, rslora=True, target_modules=["conv", "proj"])
    read = from_peft(model)
    for name, adapter in adapters(read).items():
        assert torch.allclose(adapter.B @ adapter.A, adapters(ours)[name].B @ adapters(ours)[name].A, atol=1e-5)
        assert adapter.fingerprint == adapters(ours)[name].fingerprint and adapter.method == "pissa"
    train_a_little(model, lambda m: m(x))
    assert torch.allclose(merge_pissa(from_peft(model))(x), model(x), atol=1e-5)
    with pytest.raises(Refused, match="started before"):
        initialize_peft_(model)


def test_peft_own_start_is_read_with_the_original_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, x = mlp((8,), 3, hidden=(16, 16)), draw(5, 8, dtype=torch.float32)
    config = pissa_lora_config(2, init_lora_weights="pissa", target_modules=["1", "3"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    train_a_little(theirs, lambda m: m(x))
    with pytest.raises(Refused, match="give the original model"):
        from_peft(theirs)
    to_peft(from_peft(theirs, base=base), tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(loaded(x), theirs(x), atol=1e-5)
    with pytest.raises(Refused, match="already changed"):
        initialize_peft_(theirs)


def test_refusals_inside_peft() -> None:
    peft = pytest.importorskip("peft")

    def wrapped(**options: Any) -> Any:
        given = {"target_modules": ["1", "3"], **options}
        return peft.get_peft_model(mlp((8,), 3, hidden=(16,)), pissa_lora_config(2, **given))

    with pytest.warns(UserWarning, match="Dropout"):
        initialize_peft_(wrapped(lora_dropout=0.1))
    with pytest.raises(InvalidInput, match="no LoRA layer with an adapter named 'other'"):
        initialize_peft_(wrapped(), "other")
    with pytest.raises(Refused, match="DoRA"):
        initialize_peft_(wrapped(use_dora=True))
    two = wrapped()
    two.add_adapter("second", pissa_lora_config(2, target_modules=["1", "3"]))
    with pytest.raises(Refused, match="another adapter"):
        initialize_peft_(two)
    wide = peft.get_peft_model(mlp((8,), 3, hidden=(16,)), pissa_lora_config(5, target_modules=["3"]))
    with pytest.raises(InvalidInput, match="Layer '3': rank must be between 1 and 3"):
        initialize_peft_(wide)
    with pytest.raises(Refused, match="already carries"):
        apply_pissa(wrapped(), 2)


# --- the treatment ----------------------------------------------------------------------------------------------------


def test_treatment_adapts_and_returns_a_plain_model() -> None:
    task = digits(0, sizes=(200, 50, 50))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Normalized(small_cnn((1, 8, 8), 10), [0.3], [0.37])
    treatment, before = PiSSA(), copy.deepcopy(model.state_dict())
    runs = [fit(model, task, Training(epochs=1), [treatment]) for _ in range(2)]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    states = [run.model.state_dict() for run in runs]
    assert list(states[0]) == list(before) and all(torch.equal(states[0][key], states[1][key]) for key in before)
    assert [type(m) for m in runs[0].model.modules()] == [type(m) for m in model.modules()]
    moved = states[0]["model.3.weight"].flatten(1) - before["model.3.weight"].flatten(1)
    s = torch.linalg.svdvals(moved.double())
    assert s[0] > 1e-3 and s[16] < 1e-4 * s[0]  # rank 2r at most
    assert torch.equal(states[0]["model.1.weight"], before["model.1.weight"])  # batch-norm is frozen
    assert json.loads(json.dumps(treatment.settings()))["rank"] == 8


def test_treatment_in_double_with_a_fresh_head() -> None:
    task = digits(0, sizes=(64, 20, 20))
    task = task.changed(train=type(task.train)(task.train.x.double(), task.train.y))
    model = mlp((1, 8, 8), 10, hidden=(16,)).double()
    run = fit(model, task, Training(epochs=1), [PiSSA(rank=2, trainable=("3",))])
    assert run.model.get_parameter("3.bias").dtype == torch.float64
    assert not torch.equal(run.model.get_parameter("3.bias"), model.get_parameter("3.bias"))
    assert torch.equal(run.model.get_parameter("1.bias"), model.get_parameter("1.bias"))
    with pytest.raises(InvalidInput, match="matches no layer"):
        fit(model, task, Training(), [PiSSA(target_modules=("head",))])


def test_killed_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    task, model = digits(0, sizes=(64, 20, 20)), mlp((1, 8, 8), 10, hidden=(16,))
    whole = fit(model, task, Training(epochs=2, schedule="constant"), [PiSSA(rank=2)])
    fit(model, task, Training(epochs=1, schedule="constant"), [PiSSA(rank=2)], checkpoint=tmp_path / "c.pt")
    resumed = fit(model, task, Training(epochs=2, schedule="constant"), [PiSSA(rank=2)], checkpoint=tmp_path / "c.pt")
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
