"""Low-rank adapters in files and inside `peft`.

The native file carries A, B, A0, B0 and a fingerprint of the original weights, and goes on that base only. The export is plain LoRA for
the *original* base in peft's layout, `s (B A - B0 A0) = s [B, -B0] [A; A0]`: rank 2r and exact, or cut to a smaller rank. A peft model can
be started by our factors (`start_peft_`) and read back (`from_peft`). The layout is that of peft 0.21; peft is not imported here.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, Refused, check
from surefoot.nn.fingerprint import fingerprint
from surefoot.nn.lowrank import (
    Adapter,
    LowRank,
    adapters,
    attach_,
    check_base,
    from_matrix,
    layer_kind,
    replace_layer,
    to_matrix,
    weight_matrix,
)
from surefoot.nn.randomized_svd import randomized_svd, truncate

M = TypeVar("M", bound=nn.Module)


# --- files ------------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, path: Path | str) -> None:
    """The native file (safetensors): A, B, A0, B0 of every layer, and the fingerprint of the base they belong to."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, a in adapters(model).items():
        tensors |= {f"{name}/{key}": getattr(a, key).detach().cpu() for key in ("A", "B", "A0", "B0")}
        if not a.exact:
            tensors[f"{name}/residual"] = to_matrix(a.kind, a.base.weight.detach()).cpu()  # type: ignore[operator,arg-type]
        layers[name] = {
            "scaling": a.scaling,
            "fingerprint": a.fingerprint,
            "method": a.method,
            "on_residual": a.on_residual,
        }
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, str(path), {"format": "surefoot-lowrank-1", "layers": json.dumps(layers)})


def load_adapter_(model: M, path: Path | str) -> M:
    """Put a native file on the *original* base, in place; another base is refused. No decomposition is run."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"{path} cannot be read as a safetensors file ({error}).") from error
    check(
        meta.get("format") == "surefoot-lowrank-1", f"{path} is not a native adapter file; peft files go through peft."
    )
    layers: dict[str, Any] = json.loads(meta["layers"])
    places = dict(model.named_modules())
    for name, facts in layers.items():
        if isinstance(places.get(name), Adapter):
            raise Refused(f"Layer {name!r} already carries an adapter; merge or unapply it first.")
        if name not in places or layer_kind(places[name]) is None or fingerprint(places[name]) != facts["fingerprint"]:
            raise Refused(
                f"{path} was made for another base: the weight of {name!r} differs; load the base it came from."
            )

    def stored(name: str, weight: Tensor) -> LowRank:
        start = [tensors[f"{name}/{key}"].to(weight.device) for key in ("A0", "B0")]
        scaling = layers[name]["scaling"]
        residual = tensors.get(f"{name}/residual")
        if residual is None and layers[name]["on_residual"]:
            residual = torch.addmm(weight, start[1].to(weight), start[0].to(weight), alpha=-scaling)
        return LowRank(start[0], start[1], scaling, residual if residual is None else residual.to(weight.device))

    facts = next(iter(layers.values()))
    quantized = any(key.endswith("/residual") for key in tensors)
    model = attach_(model, layers, stored, method=facts["method"], exact=not quantized)
    with torch.no_grad():
        for name, adapter in adapters(model).items():
            adapter.A.copy_(tensors[f"{name}/A"])
            adapter.B.copy_(tensors[f"{name}/B"])
    return model


def to_peft(
    model: nn.Module, directory: Path | str, rank: int | None = None, *, base_name: str | None = None
) -> dict[str, float]:  # the spectral error of each layer, 0 without `rank`
    """Write plain LoRA for the *original* base, readable by `peft.PeftModel.from_pretrained` (peft is not needed to write it).

    Rank 2r and exact; `rank` cuts every layer to at most that rank and returns what it cost. A peft model started by
    `initialize_peft_` may be given as it is.
    """
    from safetensors.torch import save_file

    if any(hasattr(module, "lora_A") for module in model.modules()):
        model = from_peft(model)
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    found = adapters(model)
    for name, adapter in found.items():
        check(name != "", "peft cannot adapt a model that is itself one layer; put it into a module.")
        if not adapter.exact:
            raise Refused(
                f"The base of {name!r} is quantized, which a LoRA file cannot carry; merge, or save_adapter instead."
            )
        update = adapter.update()
        a, b, left = update.A, update.B, update.A.new_zeros(1)
        if rank is not None and rank < update.rank:
            a, b, left = truncate(a, b, rank)
        errors[name] = update.scaling * (left[0].item() if len(left) else 0.0)
        ranks[name], alphas[name] = a.shape[0], update.scaling * a.shape[0]
        if adapter.kind == "conv2d":
            a, b = a.unflatten(1, adapter.base.weight.shape[1:]), b[:, :, None, None]  # type: ignore[arg-type]
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.cpu().contiguous()
    top = max(set(ranks.values()), key=list(ranks.values()).count)
    alpha = alphas[next(n for n in ranks if ranks[n] == top)]
    escaped = {name: f"^{re.escape(name)}$" for name in found}
    every = [n for n, m in model.named_modules() if not any(n.startswith(f"{f}.") for f in found)]
    loose = [n for n in every if n not in found and any(n.endswith(f".{f}") for f in found)]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "r": top,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": all(a.kind == "conv1d" for a in found.values()),
        "target_modules": "|".join(map(re.escape, found)) if loose else sorted(found),
        "rank_pattern": {escaped[n]: r for n, r in ranks.items() if r != top},
        "alpha_pattern": {escaped[n]: a for n, a in alphas.items() if a != alpha},
        "init_lora_weights": True,  # anything else would decompose the base again at load time
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(directory / "adapter_model.safetensors"), {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return errors


# --- inside peft ------------------------------------------------------------------------------------------------------

MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _inner(peft_model: nn.Module) -> nn.Module:
    """The model under a PeftModel; a model that took adapters by `add_adapter` is its own."""
    return peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model  # type: ignore[operator]


def _peft_layers(peft_model: nn.Module, adapter: str) -> dict[str, Any]:
    inner = _inner(peft_model)
    found = {n: m for n, m in inner.named_modules() if hasattr(m, "lora_A") and adapter in m.lora_A}  # type: ignore[operator,union-attr]
    check(bool(found), f"The model has no LoRA layer with an adapter named {adapter!r}.")
    for name, layer in found.items():
        if layer.lora_variant or layer.merged_adapters or layer_kind(layer.base_layer) is None:  # type: ignore[arg-type]
            raise Refused(
                f"peft layer {name!r} is merged, DoRA or of an unsupported kind; use plain unmerged LoRA layers."
            )
    return found


def start_peft_(
    peft_model: M, factor: Callable[[str, Tensor, int, float], LowRank], *, adapter: str = "default", method: str
) -> M:
    """Overwrite `adapter` of a peft model, in place, by `factor(name, W, rank, scaling)`, each layer at its own rank and scaling.

    The base weights become the residuals, so there may be only this adapter. Save with `to_peft`, not `save_pretrained`, whose
    file would only fit the changed base.
    """
    config = getattr(peft_model, "peft_config", {}).get(adapter)
    layers = _peft_layers(peft_model, adapter)
    used = str(getattr(config, "init_lora_weights", "")).lower()
    if used.startswith(MUTATING):
        raise Refused(f"The base was already changed by init_lora_weights={used!r}; make the config with True.")
    for name, layer in layers.items():
        if len(layer.lora_A) > 1 or hasattr(layer, "_lowrank_start"):
            raise Refused(
                f"Layer {name!r} has another adapter, or was started before; its base belongs to one adapter only."
            )
        check_base(name, layer.base_layer)
        if isinstance(layer.lora_dropout[adapter], nn.Dropout) and layer.lora_dropout[adapter].p > 0:
            warnings.warn(f"Dropout on the adapter of {name!r} breaks the identity at the start; use 0.", stacklevel=3)
    for name, layer in layers.items():
        base, kind = layer.base_layer, layer_kind(layer.base_layer)
        assert kind is not None
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        low = factor(name, weight_matrix(base), layer.r[adapter], layer.scaling[adapter])
        layer._lowrank_start = (low.A.clone(), low.B.clone(), fingerprint(base), method)
        if low.residual is not None:
            base.weight.data = from_matrix(kind, low.residual, base.weight.shape).to(base.weight.dtype)
        down.data.copy_(low.A.reshape(down.shape))
        up.data.copy_(low.B.reshape(up.shape))
    return peft_model


def from_peft(peft_model: nn.Module, *, adapter: str = "default", base: nn.Module | None = None) -> nn.Module:
    """A copy of a peft model as a plain model with our adapters, to be merged, undone, saved or exported.

    Reads models started by `start_peft_`, and ordinary LoRA. For a base changed by peft's own start ("pissa", ...) give the original
    model as `base`: A0 B0 is then recovered from the difference.
    """
    _peft_layers(peft_model, adapter)
    config = getattr(peft_model, "peft_config", {}).get(adapter)
    changed = str(getattr(config, "init_lora_weights", "")).lower().startswith(MUTATING)
    if changed and base is None:
        raise Refused("peft changed this base at the start; give the original model as base=.")
    peft_model = copy.deepcopy(peft_model)
    model = _inner(peft_model)
    originals = {} if base is None else dict(base.named_modules())
    for name, layer in _peft_layers(peft_model, adapter).items():
        plain, scaling = layer.base_layer, layer.scaling[adapter]
        a, b = (half[adapter].weight.detach().flatten(1) for half in (layer.lora_A, layer.lora_B))
        kind, now, start, mark = layer_kind(plain), weight_matrix(plain), None, None
        assert kind is not None
        method = "lora"
        if hasattr(layer, "_lowrank_start"):
            *start, mark, method = layer._lowrank_start
        elif changed:
            whole = weight_matrix(originals[name]).to(now)
            u, s, vh = randomized_svd((whole - now) / scaling, a.shape[0], niter=None)
            start, method = [s.sqrt()[:, None] * vh, u * s.sqrt()], config.init_lora_weights  # type: ignore[union-attr]
            mark = fingerprint(originals[name])
        factors = LowRank(a, b, scaling, None if start is None else now)
        ours = Adapter(plain, factors, method=method, start=None if start is None else tuple(start), print_of_base=mark)  # type: ignore[arg-type]
        ours.drift = 0.0  # measured against W, which is gone
        model = replace_layer(model, name, ours)
    model.__dict__.pop("peft_config", None)
    return model
