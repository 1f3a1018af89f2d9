"""What unlearning needs of a text-to-image model (`TextToImage`), and the adapter that gives it for a Stable Diffusion pipeline."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from surefoot.errors import InvalidInput, MissingExtra, Refused, check, check_at_least, check_choice
from surefoot.nn import modes
from surefoot.nn.diffusion import ddim_sample, guided, levels_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline  # type: ignore[import-not-found]

Trainable = Literal["text_encoder", "unet"]


class TextToImage(Protocol):
    """A diffusion model conditioned on one text encoder. Anything with these members will do; `deepcopy` of its modules must work."""

    unet: nn.Module
    text_encoder: nn.Module
    alphas_bar: Tensor  # [T]
    latent_shape: tuple[int, ...]
    clip: float | None  # bound on the latents' values, or None

    @property
    def end_id(self) -> int: ...
    @property
    def word_ids(self) -> Tensor: ...  # int64 [V], the tokens that a prompt attack may use
    @property
    def device(self) -> torch.device: ...
    def token_ids(
        self, prompts: Sequence[str]
    ) -> Tensor: ...  # int64 [B, L]: start, prompt, end, padding; error where cut
    def words(self, ids: Tensor) -> str: ...
    def embed_tokens(self, ids: Tensor) -> Tensor: ...  # [..., D], without positions
    def encode(self, embeds: Tensor, ids: Tensor) -> Tensor: ...  # [B, L, D] -> [B, L, E]
    def predict_noise(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor: ...  # like z
    def decode(self, z: Tensor) -> Tensor: ...  # [B, C, H, W] in [0, 1]


M = TypeVar("M", bound=TextToImage)


def condition(model: TextToImage, prompts: Sequence[str]) -> Tensor:  # [B, L, E]
    """The text states of prompts."""
    ids = model.token_ids(list(prompts))
    return model.encode(model.embed_tokens(ids), ids)


def with_copy(model: M, part: Trainable) -> M:
    """The same model with its own copy of one part; everything else is shared."""
    check_choice("trainable", part, ("text_encoder", "unet"))
    fresh = copy.copy(model)
    setattr(fresh, part, copy.deepcopy(getattr(model, part)))
    return fresh


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) and no parameter gradients within the block; modes and flags are put back as they were."""
    with modes.evaluating(*modules), modes.frozen(*modules):
        yield


def gaussian(shape: Sequence[int], model: TextToImage, generator: torch.Generator) -> Tensor:
    """Noise drawn on the generator's device, in the U-Net's dtype, on the model's device."""
    noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
    return noise.to(model.device, next(model.unet.parameters()).dtype)


@torch.no_grad()
def sample_latents(
    model: TextToImage,
    text: Tensor,  # [B, L, E]
    *,
    generator: torch.Generator,
    steps: int = 50,
    guidance: float = 7.5,
    batch_size: int = 64,
) -> Tensor:  # [B, ...]
    """One latent for each row of text states, by guided DDIM. The empty prompt is encoded by the model itself."""
    check(len(text) > 0 and text.dim() == 3, f"text must be [B, L, E] with B > 0, got {tuple(text.shape)}.")
    found = []
    with frozen(model.unet, model.text_encoder):
        empty = condition(model, [""])
        for rows in text.split(batch_size):
            both = torch.cat([empty.expand_as(rows), rows])

            def predict(z: Tensor, t: Tensor, both: Tensor = both) -> Tensor:
                without, given = model.predict_noise(z.repeat(2, *[1] * (z.dim() - 1)), t.repeat(2), both).chunk(2)
                return guided(without, given, guidance)

            start = gaussian((len(rows), *model.latent_shape), model, generator)
            found.append(ddim_sample(predict, start, model.alphas_bar, steps=steps, clip=model.clip))
    return torch.cat(found)


@torch.no_grad()
def generate(
    model: TextToImage,
    text: Tensor,  # [B, L, E]
    *,
    generator: torch.Generator,
    steps: int = 50,
    guidance: float = 7.5,
    batch_size: int = 64,
) -> Tensor:  # [B, C, H, W] in [0, 1]
    """One image for each row of text states (`condition(model, prompts)`)."""
    latents = sample_latents(model, text, generator=generator, steps=steps, guidance=guidance, batch_size=batch_size)
    return torch.cat([model.decode(part) for part in latents.split(batch_size)])


# ---------------------------------------------------------------------------------------------------- Stable Diffusion


@dataclass
class StableDiffusion:
    """The parts of a `diffusers` Stable Diffusion pipeline (1.x, 2.x: one CLIP text encoder) behind `TextToImage`.

    Noise and velocity parametrisations are understood. Text encoder and U-Net may have different dtypes; text states are cast.
    """

    unet: nn.Module
    text_encoder: nn.Module
    tokenizer: Any
    vae: Any
    scheduler: Any
    alphas_bar: Tensor
    latent_shape: tuple[int, ...]
    clip: float | None = None

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline) -> StableDiffusion:
        """Wrap a loaded pipeline; its modules are shared, not copied."""
        components: dict[str, Any] = dict(pipeline.components)
        if components.get("text_encoder_2") is not None:
            raise Refused(
                "adv_unlearn does not support pipelines with two text encoders (SDXL, SD3): a prompt attack on one would leave the other "
                "open; use a Stable Diffusion 1.x or 2.x pipeline."
            )
        missing = [p for p in ("unet", "text_encoder", "tokenizer", "vae", "scheduler") if components.get(p) is None]
        check(
            not missing,
            f"{type(pipeline).__name__} has no {', '.join(missing)}; a Stable Diffusion pipeline is needed.",
        )
        scheduler, unet = components["scheduler"], components["unet"]
        levels = getattr(scheduler, "alphas_cumprod", None)
        if levels is None or len(levels) == 0:
            raise InvalidInput(
                f"{type(scheduler).__name__} has no timesteps (alphas_cumprod); use DDIM, DDPM, PNDM or the like."
            )
        kind = getattr(scheduler.config, "prediction_type", "epsilon")
        check_choice("the scheduler's prediction_type", kind, ("epsilon", "v_prediction"))
        side = int(unet.config.sample_size)
        shape = (int(unet.config.in_channels), side, side)
        return cls(unet, components["text_encoder"], components["tokenizer"], components["vae"], scheduler, torch.as_tensor(levels).float(), shape)  # fmt: skip

    @property
    def end_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def word_ids(self) -> Tensor:
        special = torch.tensor(sorted(set(self.tokenizer.all_special_ids)))
        ids = torch.arange(self.text_encoder.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        return ids[~torch.isin(ids, special)]

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        length = int(self.tokenizer.model_max_length)
        rows = self.tokenizer(list(prompts), padding="max_length", max_length=length, truncation=False).input_ids
        for prompt, row in zip(prompts, rows, strict=True):
            check(
                len(row) <= length,
                f"The prompt has {len(row)} tokens with start and end, and the encoder takes {length}: {prompt!r}.",
            )
        return torch.tensor(rows, device=self.device)

    def words(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids.flatten().tolist(), skip_special_tokens=True)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return self.text_encoder.get_input_embeddings()(ids)  # type: ignore[operator]

    def encode(self, embeds: Tensor, ids: Tensor) -> Tensor:
        # CLIP's text model takes ids only: its embedding layer is made to answer with the rows that we want, for this call
        table = self.text_encoder.get_input_embeddings()  # type: ignore[operator]
        hook = table.register_forward_hook(lambda module, inputs, output: embeds)
        try:
            return self.text_encoder(ids)[0]
        finally:
            hook.remove()

    def predict_noise(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        out = self.unet(z, t, encoder_hidden_states=condition.to(z.dtype)).sample
        if self.scheduler.config.prediction_type == "v_prediction":
            level = levels_of(self.alphas_bar, t, z)
            return level.sqrt() * out + (1 - level).sqrt() * z
        return out

    def decode(self, z: Tensor) -> Tensor:
        latents = z / self.vae.config.scaling_factor
        return (self.vae.decode(latents.to(self.vae.dtype)).sample.to(z.dtype) / 2 + 0.5).clamp(0, 1)


def load_pipeline(
    folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusion:
    """A Stable Diffusion pipeline from a local folder as `save_pretrained` writes it; safetensors only, nothing is downloaded."""
    path = Path(folder)
    check(
        (path / "model_index.json").is_file(),
        f"{path} holds no model_index.json; give a folder that `save_pretrained` wrote.",
    )
    try:
        from diffusers import DiffusionPipeline  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtra("diffusers", "diffusion") from error
    _refuse_two_encoders(path)
    pipeline = DiffusionPipeline.from_pretrained(
        str(path),
        local_files_only=True,
        use_safetensors=True,
        safety_checker=None,
        requires_safety_checker=False,
    )
    return StableDiffusion.from_pipeline(pipeline.to(device, dtype))


def _refuse_two_encoders(path: Path) -> None:
    """Before gigabytes are read."""
    import json

    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    if index.get("text_encoder_2", [None])[0] is not None:
        raise Refused(
            f"{path} is a pipeline with two text encoders, which adv_unlearn does not support; use Stable Diffusion 1.x or 2.x."
        )


def export_text_encoder(model: TextToImage, folder: Path | str) -> Path:
    """Write the text encoder as transformers writes it: `CLIPTextModel.from_pretrained(folder)`, or any pipeline's `text_encoder/`."""
    save = getattr(model.text_encoder, "save_pretrained", None)
    if save is None:
        raise InvalidInput(
            f"{type(model.text_encoder).__name__} is no transformers model; save its state_dict with safetensors."
        )
    path = Path(folder)
    save(path, safe_serialization=True)
    return path


def trainable_parameters(module: nn.Module, part: Trainable, layers: int | None = None) -> list[nn.Parameter]:
    """What is trained: all of a U-Net; of a text encoder the blocks and the final norm (`layers`: only the first blocks), never the embeddings."""
    if part == "unet":
        check(layers is None, "layers picks blocks of the text encoder; leave it out for the U-Net.")
        return list(module.parameters())
    stacks = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    if layers is not None:
        check_at_least("layers", layers, 1)
        check(
            bool(stacks) and layers <= len(stacks[0]),
            f"layers is {layers}, and the text encoder has {len(stacks[0]) if stacks else 0} blocks.",
        )
        return [p for block in list(stacks[0])[:layers] for p in block.parameters()]
    tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return [p for p in module.parameters() if id(p) not in tables]
