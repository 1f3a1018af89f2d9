"""Plain LoRA of `surefoot.nn.lora` in files that `peft` and `diffusers` read, and back.

One folder a network holds `adapter_config.json` and `adapter_model.safetensors` in peft's layout: `peft.PeftModel.from_pretrained(base, folder)`
computes what the adapted network computes. In it an embedding's `lora_embedding_A` is our `B^T` and its `lora_embedding_B` our `A^T`. The layout is
that of peft 0.21; peft is not imported here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, Refused, check
from surefoot.nn.lora import EmbeddingAdapter
from surefoot.nn.lowrank import Adapter

M = TypeVar("M", bound=nn.Module)


def lora_modules(model: nn.Module) -> dict[str, Adapter | EmbeddingAdapter]:
    """The adapted layers by name; an error where there is none."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, (Adapter, EmbeddingAdapter))}
    if not found:
        raise InvalidInput("The model carries no LoRA: it has not been adapted, or the update has been merged.")
    if any(isinstance(m, Adapter) and m.on_residual for m in found.values()):
        raise Refused("The adapters belong to a changed base; write them with surefoot.nn.lowrank_io.to_peft.")
    return found


def lora_factors(model: nn.Module) -> dict[str, Tensor]:
    """`name.A [r, n]` and `name.B [m, r]` of every adapted layer, on the CPU."""
    return {f"{n}.{k}": getattr(m, k).detach().cpu() for n, m in lora_modules(model).items() for k in ("A", "B")}


@torch.no_grad()
def set_lora_factors_(model: M, factors: dict[str, Tensor]) -> M:
    """Put `lora_factors` on a model adapted in the same places with the same ranks, in place."""
    wanted = {f"{n}.{k}": getattr(m, k) for n, m in lora_modules(model).items() for k in ("A", "B")}
    odd = [n for n in {**wanted, **factors} if n not in wanted or n not in factors or wanted[n].shape != factors[n].shape]  # fmt: skip
    check(not odd, f"The LoRA does not fit this network: {len(odd)} factors differ, {', '.join(sorted(odd)[:2])} among them; the rank or the base is another.")  # fmt: skip
    for name, parameter in wanted.items():
        parameter.copy_(factors[name])
    return model


def save_peft(model: nn.Module, folder: Path | str, *, base: str | None = None) -> None:
    """Write the LoRA of a model as a peft adapter; `base` is the name of the model that it belongs to."""
    from safetensors.torch import save_file

    found, tensors = lora_modules(model), {}
    for name, layer in found.items():
        a, b = layer.A.detach(), layer.B.detach()
        place = f"base_model.model.{name}"
        if isinstance(layer, EmbeddingAdapter):
            tensors |= {f"{place}.lora_embedding_A": b.mT, f"{place}.lora_embedding_B": a.mT}
            continue
        if layer.kind == "conv2d":
            a, b = a.unflatten(1, layer.base.weight.shape[1:]), b[:, :, None, None]  # type: ignore[arg-type]
        tensors |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
    ranks = {name: layer.A.shape[0] for name, layer in found.items()}
    alphas = {name: layer.scaling * ranks[name] for name, layer in found.items()}
    top = max(ranks, key=lambda name: ranks[name])
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "r": ranks[top], "lora_alpha": alphas[top], "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "target_modules": "|".join(map(re.escape, found)),
        "rank_pattern": {f"^{re.escape(n)}$": r for n, r in ranks.items() if r != ranks[top]},
        "alpha_pattern": {f"^{re.escape(n)}$": a for n, a in alphas.items() if a != alphas[top]},
        "init_lora_weights": True, "use_rslora": False, "use_dora": False, "inference_mode": True,
    }  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, str(folder / "adapter_model.safetensors"), {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def load_peft_factors(folder: Path | str) -> tuple[dict[str, Tensor], float]:
    """What `save_peft` wrote: factors for `set_lora_factors_`, and the scaling alpha / rank."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder).expanduser()
    try:
        tensors = load_file(str(folder / "adapter_model.safetensors"))
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        scaling = config["lora_alpha"] / config["r"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise InvalidInput(f"{folder} holds no LoRA that can be read ({str(error).splitlines()[0][:120]}).") from error
    kinds = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "B", "lora_embedding_B": "A"}
    factors = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])", key)
        if match is None:
            raise InvalidInput(f"{folder} holds {key!r}, which is no factor of a plain LoRA.")
        name, kind = match.groups()
        factors[f"{name}.{kinds[kind]}"] = tensor.mT.contiguous() if "embedding" in kind else tensor.flatten(1)
    return factors, scaling


def diffusers_tensors(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """`prefix.name.lora_A.weight` and `..._B.weight` of the linear and convolutional layers, alpha folded into B, as `load_lora_weights` of diffusers
    reads them; that format has no place for embeddings."""
    tensors = {}
    for name, layer in lora_modules(model).items():
        if isinstance(layer, Adapter):
            a, b = layer.A.detach(), layer.scaling * layer.B.detach()
            if layer.kind == "conv2d":
                a, b = a.unflatten(1, layer.base.weight.shape[1:]), b[:, :, None, None]  # type: ignore[arg-type]
            tensors |= {f"{prefix}.{name}.lora_A.weight": a, f"{prefix}.{name}.lora_B.weight": b}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
