"""Stage 3 by a large diffusion model from a person's own folder: video to video where the pipeline can, else frame by frame."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surefoot.errors import InvalidInput, Refused, check, check_at_least
from surefoot.geometry.lm_gaussian.local_models import diffusers_library, load_pipeline
from surefoot.nn.geometry.cameras import Camera


@dataclass
class DiffusersVideoPrior:
    """A `VideoEnhancePrior` from a diffusers folder (or a pipeline).

    A pipeline that takes `video` (AnimateDiff, CogVideoX and Wan video-to-video, ...) is given the clip whole; any other is turned into its
    image-to-image form and given the frames one by one, all with the same noise, so that they do not flicker for it. Frames whose shorter side is
    below `side` are enlarged to it and brought back. Strength 0 changes nothing.
    """

    folder: Any
    prompt: str = "real-world, sharp, high contrast, gradation"
    steps: int = 50
    guidance: float = 1.0
    side: int = 512
    batch: int = 4  # frames at once, where they go one by one
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    pipeline_: Any = field(init=False, repr=False)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        for name in ("steps", "side", "batch"):
            check_at_least(name, getattr(self, name), 1)
        given = isinstance(self.folder, (str, Path))
        pipe = load_pipeline(self.folder, device=self.device, dtype=self.dtype) if given else self.folder
        label = Path(self.folder).name if given else type(pipe).__name__
        if not self._takes(pipe, "video"):
            pipe = self._image_to_image(pipe, label)
        self.pipeline_ = pipe
        self.name = (
            f"{type(pipe).__name__} ({label}), {'clip by clip' if self._takes(pipe, 'video') else 'frame by frame'}"
        )

    @staticmethod
    def _takes(pipe: Any, argument: str) -> bool:
        return argument in inspect.signature(type(pipe).__call__).parameters

    @classmethod
    def _image_to_image(cls, pipe: Any, label: str) -> Any:
        if not (cls._takes(pipe, "image") and cls._takes(pipe, "strength")):
            try:
                pipe = diffusers_library().AutoPipelineForImage2Image.from_pipe(pipe)
            except (ValueError, AttributeError, TypeError) as error:
                raise Refused(f"{label} is a {type(pipe).__name__}, which goes neither from video to video nor from image to image; use another folder.") from error  # fmt: skip
            pipe.set_progress_bar_config(disable=True)
        return pipe

    @torch.no_grad()
    def enhance(
        self, frames: Tensor, depths: Tensor, cameras: Sequence[Camera], *, strength: float, generator: torch.Generator
    ) -> Tensor:  # [F, H, W, 3]
        """The frames after denoising from `strength`; depths and cameras are not looked at."""
        check(0 <= strength <= 1, f"strength must be between 0 and 1, got {strength!r}.")
        check(frames.dim() == 4 and frames.shape[-1] == 3, f"frames must be [F, H, W, 3], got {tuple(frames.shape)}.")
        if round(strength * self.steps) == 0:
            return frames.clone()
        height, width = frames.shape[1:3]
        x = frames.permute(0, 3, 1, 2).float().cpu().clamp(0, 1)
        large = [max(s, round(s * self.side / min(height, width))) for s in (height, width)]
        x = F.interpolate(x, size=large, mode="bicubic").clamp(0, 1) if large != [height, width] else x
        multiple = 8 * self._shrinks()
        x = F.pad(x, (0, -large[1] % multiple, 0, -large[0] % multiple), mode="replicate")
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        found = (self._clip if self._takes(self.pipeline_, "video") else self._single)(x, strength, seed)
        if found.shape != x.shape:
            raise InvalidInput(f"{self.name} returned frames {tuple(found.shape)} for {tuple(x.shape)}; choose a clip length that it keeps.")  # fmt: skip
        check(bool(torch.isfinite(found).all()), f"{self.name} returned NaN; float16 weights may be the cause.")
        found = found[:, :, : large[0], : large[1]]
        if large != [height, width]:
            found = F.interpolate(found, size=(height, width), mode="bilinear", antialias=True)
        return found.clamp(0, 1).permute(0, 2, 3, 1).to(frames)

    def _shrinks(self) -> int:
        for name in ("vae_scale_factor_spatial", "vae_scale_factor"):
            if isinstance(getattr(self.pipeline_, name, None), int):
                return getattr(self.pipeline_, name)
        return 8

    def _single(self, x: Tensor, strength: float, seed: int) -> Tensor:  # [F, 3, H, W]
        done = []
        for part in x.split(self.batch):
            noise = [torch.Generator().manual_seed(seed) for _ in part]
            control = {"control_image": part} if self._takes(self.pipeline_, "control_image") else {}
            answer = self.pipeline_(
                prompt=[self.prompt] * len(part), image=part, strength=strength, num_inference_steps=self.steps,
                guidance_scale=self.guidance, generator=noise, output_type="pt", **control,
            )  # fmt: skip
            done.append(answer.images.float().cpu())
        return torch.cat(done)

    def _clip(self, x: Tensor, strength: float, seed: int) -> Tensor:  # [F, 3, H, W]
        from PIL import Image

        pictures = [Image.fromarray(f) for f in (x.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()]
        found = self.pipeline_(
            video=pictures, prompt=self.prompt, height=x.shape[2], width=x.shape[3], strength=strength, num_inference_steps=self.steps,
            guidance_scale=self.guidance, generator=torch.Generator().manual_seed(seed), output_type="pt",
        ).frames  # fmt: skip
        return (found[0] if found.dim() == 5 else found).float().cpu()
