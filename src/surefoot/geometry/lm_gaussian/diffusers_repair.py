"""Image repair by Stable Diffusion with a tile ControlNet, from a person's own folder, fitted to this scene by LoRA (C3a of the paper).

The base stays frozen. LoRA sits on the Linear, Conv2d and Embedding layers inside the transformer blocks of U-Net and ControlNet, and on all of the
text encoder. A step: the same random crop of a photo x and of its early, faulty rendering c; z = encode(2 x - 1), t and e at random,

    min E || e_theta(sqrt(abar_t) z + sqrt(1 - abar_t) e, t, prompt, c) - e ||^2                     (AdamW, lr 1e-3, batch 1, 1800 steps)

Repair of a rendering r is SDEdit in the latent space: noise encode(2 r - 1) to the level of the round(strength x steps)-th DDIM time and denoise from
there, so that strength .2 of 50 steps is ten calls of the denoiser; strength 0 is the autoencoder's round trip. Sizes: the model wants about 512
pixels, so renderings whose shorter side is below `crop` are enlarged to it and brought back after.

Sources: Yu, Long, Tan, LM-Gaussian, 2024, arXiv 2409.03456; Zhang, Rao, Agrawala, ControlNet, 2023, arXiv 2302.05543; Hu et al., LoRA, 2021,
arXiv 2106.09685; Meng et al., SDEdit, 2021, arXiv 2108.01073; Song, Meng, Ermon, DDIM, 2020, arXiv 2010.02502.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InvalidInput, Refused, check, check_at_least, check_positive
from surefoot.geometry.lm_gaussian.fitting import OnFit, check_repair_pairs, fit_steps
from surefoot.geometry.lm_gaussian.local_models import check_folder, diffusers_library, load_part
from surefoot.geometry.lm_gaussian.stages import Checkpoint
from surefoot.nn.diffusion import guided
from surefoot.nn.lora import add_lora_, lora_layers, remove_lora_, shared_copy
from surefoot.nn.lora_files import diffusers_tensors, load_peft_factors, lora_factors, save_peft, set_lora_factors_

PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")


class Denoiser(NamedTuple):
    """The three networks that LoRA adapts."""

    unet: nn.Module
    controlnet: nn.Module
    text_encoder: nn.Module

    def embed(self, ids: Tensor) -> Tensor:  # int64 [B, L] -> [B, L, D]
        return self.text_encoder(ids)[0]

    def noise(self, z: Tensor, t: Tensor, words: Tensor, control: Tensor, scale: float = 1.0) -> Tensor:  # like z
        """e_theta; `control` [B, 3, 8h, 8w] in [0, 1]."""
        given = next(self.unet.parameters()).dtype
        z, words, control = z.to(given), words.to(given), control.to(given)
        down, middle = self.controlnet(z, t, encoder_hidden_states=words, controlnet_cond=control, conditioning_scale=scale, return_dict=False)  # fmt: skip
        found = self.unet(z, t, encoder_hidden_states=words, down_block_additional_residuals=down, mid_block_additional_residual=middle, return_dict=False)  # fmt: skip
        return found[0].float()


@dataclass(frozen=True)
class ControlNetParts:
    """A Stable Diffusion of the 1.5 kind with its ControlNet, as loaded; nothing here is changed by fitting."""

    vae: Any
    unet: Any
    controlnet: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any  # a DDIMScheduler
    name: str = "Stable Diffusion + ControlNet"

    def __post_init__(self) -> None:
        kind = self.scheduler.config.prediction_type
        if kind != "epsilon":
            raise Refused(f"{self.name} predicts {kind}, and the repair is trained on predicted noise (epsilon); use a Stable Diffusion of the 1.5 kind.")  # fmt: skip
        wide, control = self.unet.config.cross_attention_dim, self.controlnet.config.cross_attention_dim
        if wide != control:
            raise InvalidInput(f"The ControlNet reads text of width {control} and the U-Net of width {wide}; they belong to different versions of Stable Diffusion.")  # fmt: skip

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        controlnet: Path | str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ControlNetParts:
        """From a diffusers folder with vae, unet, text_encoder, tokenizer, scheduler and controlnet (or the latter in a folder of its own)."""
        path = check_folder(folder, PARTS if controlnet is not None else (*PARTS, "controlnet"))
        control = path / "controlnet" if controlnet is None else Path(controlnet).expanduser()
        if controlnet is not None:
            check_folder(control.parent, (control.name,))
        d = diffusers_library()
        from transformers import CLIPTextModel, CLIPTokenizer  # type: ignore[import-not-found]

        where: dict[str, Any] = {"device": device, "dtype": dtype}
        models = {
            "vae": load_part(d.AutoencoderKL, path / "vae", **where), "unet": load_part(d.UNet2DConditionModel, path / "unet", **where),
            "controlnet": load_part(d.ControlNetModel, control, **where), "text_encoder": load_part(CLIPTextModel, path / "text_encoder", **where),
        }  # fmt: skip
        try:
            tokenizer = CLIPTokenizer.from_pretrained(str(path / "tokenizer"), local_files_only=True)
            config = d.DDIMScheduler.load_config(str(path / "scheduler"), local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise InvalidInput(f"{path} holds a tokenizer or scheduler that cannot be read ({str(error).splitlines()[0][:160]}); save it again.") from error  # fmt: skip
        scheduler = d.DDIMScheduler.from_config(
            config, clip_sample=False, thresholding=False
        )  # latents are not bounded
        return cls(**models, tokenizer=tokenizer, scheduler=scheduler, name=f"Stable Diffusion + ControlNet ({path.name})")  # fmt: skip

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def ids(self, prompt: str, count: int = 1) -> Tensor:  # int64 [count, L]
        """The prompt as token numbers, cut or filled to the text encoder's length."""
        found = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=self.text_encoder.config.max_position_embeddings, return_tensors="pt")  # fmt: skip
        return found.input_ids.to(self.device).expand(count, -1)

    @torch.no_grad()
    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:  # [B, 3, H, W] in [0, 1]
        """Scaled latents [B, 4, H/8, W/8], float32: the posterior's mean, or with a generator a sample of it."""
        posterior = self.vae.encode((2 * x - 1).to(self.vae.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        z = mean if generator is None else mean + std * draw(mean.shape, generator, mean.device)
        return z * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:  # [B, 4, H/8, W/8] -> [B, 3, H, W] in [0, 1]
        """Pictures of scaled latents."""
        image = self.vae.decode((z / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False)[0]
        return (image.float() / 2 + 0.5).clamp(0, 1)

    @property
    def multiple(self) -> int:
        """Sides of pictures must be divisible by this, so that both networks can halve them."""
        return 2 ** (len(self.vae.config.block_out_channels) + len(self.unet.config.block_out_channels) - 2)

    def adapted(self, rank: int, alpha: float, generator: torch.Generator) -> Denoiser:
        """Copies over the same weights, with LoRA."""
        copies = Denoiser(*(shared_copy(m) for m in (self.unet, self.controlnet, self.text_encoder)))
        for network, within in zip(copies, ("transformer_blocks", "transformer_blocks", None), strict=True):
            layers = lora_layers(network, within)
            if not layers:
                raise Refused(f"{type(network).__name__} of {self.name} has no transformer blocks to adapt; use a Stable Diffusion of the 1.5 kind.")  # fmt: skip
            add_lora_(network, layers, rank=rank, alpha=alpha, generator=generator)
        return copies


def draw(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """Normal noise from the caller's generator, wherever that lives."""
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def same_crop(
    images: tuple[Tensor, ...],  # each [P, C, H, W]
    side: int,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:  # each [1, C, side, side] (or the whole side where the image is smaller)
    """One picture at random, cut at the same place out of every stack."""
    count, _, height, width = images[0].shape
    k, top, left = (
        int(torch.randint(n, (), generator=generator, device=generator.device))
        for n in (count, max(1, height - side + 1), max(1, width - side + 1))
    )
    return tuple(stack[k : k + 1, :, top : top + side, left : left + side] for stack in images)


@dataclass
class DiffusersControlNetRepair:
    """The repair prior for people who have the weights.

    `prompt` is one sentence on the scene. `alpha / rank` scales the update: the paper's code leaves alpha at 1, which suits its learning rate. Without
    `fit` the bare ControlNet repairs. `eta` 1 draws fresh noise at every DDIM step; 0 is deterministic but for the first noise. `on_step(step, steps,
    loss)` may raise to interrupt: then nothing is changed. At 1.5's size fitting needs a GPU.
    """

    parts: ControlNetParts
    prompt: str = "a photo of a place"
    rank: int = 64
    alpha: float = 1.0
    lr: float = 1e-3
    fit_steps: int = 1800
    crop: int = 512
    sample_steps: int = 50
    control_scale: float = 0.8
    guidance: float = 1.0
    eta: float = 1.0
    batch: int = 4  # renderings denoised at once
    on_step: OnFit | None = field(default=None, repr=False)
    net_: Denoiser | None = field(default=None, repr=False)
    losses_: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for name in ("rank", "fit_steps", "sample_steps", "batch"):
            check_at_least(name, getattr(self, name), 1)
        check_positive("lr", self.lr)
        check(0 <= self.eta <= 1, f"eta must be between 0 and 1, got {self.eta!r}.")
        check(self.crop % self.parts.multiple == 0 and self.crop > 0, f"crop must be a multiple of {self.parts.multiple}, got {self.crop}.")  # fmt: skip
        check(bool(self.prompt.strip()), "prompt must be a sentence on the scene.")

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        *,
        controlnet: Path | str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> DiffusersControlNetRepair:
        """See `ControlNetParts.load`; the rest are this class's settings."""
        return cls(ControlNetParts.load(folder, controlnet=controlnet, device=device, dtype=dtype), **settings)

    @property
    def name(self) -> str:
        return f"{self.parts.name}, LoRA of rank {self.rank} on this scene"

    def fit(
        self,
        degraded: Tensor,  # [P, H, W, 3] in [0, 1], renderings
        clean: Tensor,  # [P, H, W, 3] in [0, 1], their photos
        *,
        generator: torch.Generator,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Fit LoRA to the pairs, from the base each time. `checkpoint`: take up the fit that it holds, and keep this one there (factors and moments,
        three times the LoRA in float32). Raises `InvalidInput` for pairs that do not match and a loss that diverges."""
        check_repair_pairs(degraded, clean)
        pairs = tuple(self._enlarged(t.to(self.parts.device)) for t in (degraded, clean))
        net = self.parts.adapted(self.rank, self.alpha, generator)
        trained = {f"{part}.{name}": p for part, network in net._asdict().items() for name, p in network.named_parameters() if p.requires_grad}  # fmt: skip
        optimizer = torch.optim.AdamW(trained.values(), self.lr)
        ids = self.parts.ids(self.prompt)

        def loss_at(_: int) -> Tensor:
            control, x = same_crop(pairs, self.crop, generator)
            return self._loss(net, ids, control, x, generator)

        asked = repr((self.parts.name, self.prompt, self.rank, self.alpha, self.lr, self.crop))
        losses = fit_steps(
            loss_at, trained, optimizer, steps=self.fit_steps, lr_at=lambda _: self.lr, asked=asked, generator=generator, checkpoint=checkpoint,
            on_step=self.on_step,
        )  # fmt: skip
        self.net_, self.losses_ = Denoiser(*(network.requires_grad_(False) for network in net)), losses

    def _loss(self, net: Denoiser, ids: Tensor, control: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        z = self.parts.encode(x, generator)
        times = self.parts.scheduler.config.num_train_timesteps
        t = torch.randint(times, (len(z),), generator=generator, device=generator.device).to(z.device)
        noise = draw(z.shape, generator, z.device)
        return F.mse_loss(net.noise(self.parts.scheduler.add_noise(z, noise, t), t, net.embed(ids), control), noise)

    def _fitted(self) -> Denoiser:
        if self.net_ is None:
            raise InvalidInput("The repair prior has not been fitted, so there is no LoRA to save.")
        return self.net_

    def state_dict(self) -> dict[str, Any]:
        """The fitted LoRA, for `load_state_dict` of a prior over the same models with the same rank and alpha."""
        lora = {part: lora_factors(network) for part, network in self._fitted()._asdict().items()}
        return {"lora": lora, "losses": list(self.losses_)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` of a prior with the same settings gave, instead of fitting."""
        net = self.parts.adapted(self.rank, self.alpha, torch.Generator().manual_seed(0))
        for part, network in net._asdict().items():
            set_lora_factors_(network, state["lora"][part])
        self.net_, self.losses_ = Denoiser(*(network.requires_grad_(False) for network in net)), list(state["losses"])

    def save_lora(self, folder: Path | str) -> None:
        """The fitted LoRA as safetensors: `unet`, `controlnet` and `text_encoder` hold a peft adapter each, which is all of it. In
        `pytorch_lora_weights.safetensors` stands what `load_lora_weights` of a diffusers pipeline can take: U-Net and text encoder without embeddings."""
        from safetensors.torch import save_file

        folder, net = Path(folder), self._fitted()
        for part, network in net._asdict().items():
            save_peft(network, folder / part, base=self.parts.name)
        tensors = {**diffusers_tensors(net.unet, "unet"), **diffusers_tensors(net.text_encoder, "text_encoder")}
        save_file(tensors, str(folder / "pytorch_lora_weights.safetensors"), {"format": "pt"})

    def load_lora(self, folder: Path | str) -> None:
        """Take the LoRA that `save_lora` left, instead of fitting."""
        found = {part: load_peft_factors(Path(folder) / part) for part in Denoiser._fields}
        scalings, mine = {round(scaling, 9) for _, scaling in found.values()}, self.alpha / self.rank
        check(scalings == {round(mine, 9)}, f"{folder} was fitted with alpha / rank = {', '.join(f'{s:g}' for s in sorted(scalings))} and this prior has {mine:g}.")  # fmt: skip
        self.load_state_dict({"lora": {part: factors for part, (factors, _) in found.items()}, "losses": []})

    def merge(self) -> None:
        """Fold the update into the weights of this prior's copies (the loaded parts stay as they are): a little faster, and no longer separable."""
        if self.net_ is None:
            raise InvalidInput("There is nothing to merge: the repair prior has not been fitted.")
        self.net_ = Denoiser(*(remove_lora_(network, merged=True) for network in self.net_))

    @torch.no_grad()
    def repair(self, renders: Tensor, *, strength: float, generator: torch.Generator) -> Tensor:  # [V, H, W, 3]
        """SDEdit at `strength` in [0, 1], on the renders' device."""
        check(0 <= strength <= 1, f"strength must be between 0 and 1, got {strength!r}.")
        check(renders.dim() == 4 and renders.shape[-1] == 3, f"renders must be [V, H, W, 3], got {tuple(renders.shape)}.")  # fmt: skip
        height, width = renders.shape[1:3]
        x = self._enlarged(renders.clamp(0, 1).to(self.parts.device))
        large = x.shape[2:]
        below, right = (-side % self.parts.multiple for side in large)
        x = F.pad(x, (0, right, 0, below), mode="replicate")
        after = torch.cat([self._denoise(part, strength, generator) for part in x.split(self.batch)])
        after = after[:, :, : large[0], : large[1]]
        if tuple(large) != (height, width):
            after = F.interpolate(after, size=(height, width), mode="bilinear", antialias=True)
        return after.clamp(0, 1).permute(0, 2, 3, 1).to(renders)

    def _denoise(self, x: Tensor, strength: float, generator: torch.Generator) -> Tensor:  # [B, 3, H, W]
        parts = self.parts
        z, calls = parts.encode(x), round(strength * self.sample_steps)
        if calls == 0:
            return parts.decode(z)
        net = self.net_ or Denoiser(parts.unet, parts.controlnet, parts.text_encoder)
        scheduler = type(parts.scheduler).from_config(parts.scheduler.config)
        scheduler.set_timesteps(self.sample_steps, device=z.device)
        times = scheduler.timesteps[self.sample_steps - calls :]
        words = net.embed(parts.ids(self.prompt, len(z)))
        nothing = None if self.guidance == 1 else net.embed(parts.ids("", len(z)))
        z = scheduler.add_noise(z, draw(z.shape, generator, z.device), times[:1])
        for t in times:
            noise = net.noise(z, t, words, x, self.control_scale)
            if nothing is not None:
                noise = guided(net.noise(z, t, nothing, x, self.control_scale), noise, self.guidance)
            fresh = draw(z.shape, generator, z.device) if self.eta > 0 else None
            z = scheduler.step(noise, t, z, eta=self.eta, variance_noise=fresh, return_dict=False)[0]
        return parts.decode(z)

    def _enlarged(self, images: Tensor) -> Tensor:  # [N, H, W, 3] -> [N, 3, H', W'], the shorter side at least `crop`
        x = images.permute(0, 3, 1, 2).float()
        factor = self.crop / min(x.shape[2:])
        if factor <= 1:
            return x
        size = [max(self.crop, round(factor * side)) for side in x.shape[2:]]
        return F.interpolate(x, size=size, mode="bicubic", align_corners=False).clamp(0, 1)
