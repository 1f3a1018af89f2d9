"""A text-to-image diffusion model small enough to train here: 8x8 digits from captions of forty words.

The parts and their seams are those of Stable Diffusion: a tokenizer with start and end tokens (the end token pads), a causal transformer text
encoder over word embeddings, a U-Net that sees the text by cross-attention only, a noise schedule, classifier-free guidance. Captions
name a digit by word or by figure ("three", "3") in one of ten templates, so that each digit has two names that no prompt has together.

    model = toy_diffusion()                                   # trained once (about half a minute on one core), then read from the cache
    images = model.decode(latents)                            # [B, 1, 8, 8] in [0, 1]

The cache is `$SUREFOOT_HOME` or `~/.cache/surefoot`, below `toys/`; a file's name carries a hash of this code, its settings and
torch's version, and files appear atomically.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InvalidInput, check
from surefoot.models.networks import seeded_build
from surefoot.nn import diffusion

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{}", "a {}", "the {}", "the digit {}", "the number {}", "a drawing of {}", "a picture of a {}", "handwritten {}", "a small image of {}",
    "this figure shows {}",
)  # fmt: skip
OTHERS = (
    "numeral",
    "photo",
    "with",
    "ink",
    "large",
    "sketch",
)  # never seen in a caption: untrained words, as any vocabulary has
START, END = "<start>", "<end>"
WORDS = (
    START, END, *NUMBERS, *map(str, range(10)),
    *dict.fromkeys(word for template in TEMPLATES for word in template.replace("{}", "").split()), *OTHERS,
)  # fmt: skip
MAX_LENGTH = 12
TIMES = 200


def caption(digit: int, *, template: str = "a {}", figure: bool = False) -> str:
    """ "a three", "the digit 3", ..."""
    return template.format(str(digit) if figure else NUMBERS[digit])


class ToyTokenizer:
    """Words to ids `[B, 12]`: start, the words, end, and the end token as padding."""

    def __init__(self) -> None:
        self.index = {word: place for place, word in enumerate(WORDS)}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        ids = torch.full((len(prompts), MAX_LENGTH), self.index[END])
        for row, prompt in zip(ids, prompts, strict=True):
            words = prompt.lower().split()
            unknown = [word for word in words if word not in self.index]
            check(not unknown, f"The toy's vocabulary has no {unknown}; it knows {', '.join(WORDS[2:])}.")
            check(
                len(words) + 2 <= MAX_LENGTH, f"A prompt may have {MAX_LENGTH - 2} words, got {len(words)}: {prompt!r}."
            )
            row[0] = self.index[START]
            row[1 : 1 + len(words)] = torch.tensor([self.index[word] for word in words], dtype=torch.long)
        return ids

    def words(self, ids: Tensor) -> str:
        return " ".join(WORDS[int(i)] for i in ids.flatten() if int(i) > 1)


class Block(nn.Module):
    """Pre-norm causal self-attention and a feed-forward net."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ToyTextEncoder(nn.Module):
    """Word embeddings `[B, L, D]` to text states `[B, L, D]`: positions, two causal blocks, a final norm."""

    def __init__(self, dim: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(len(WORDS), dim)
        self.position_embedding = nn.Embedding(MAX_LENGTH, dim)
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.1)
        self.layers = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.final_norm = nn.LayerNorm(dim)

    def forward(self, embeds: Tensor) -> Tensor:
        x = embeds + self.position_embedding.weight[: embeds.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.final_norm(x)


class ResBlock(nn.Module):
    def __init__(self, channels: int, width: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(time, width)
        self.skip = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class CrossAttention(nn.Module):
    """Pixels ask, words answer."""

    def __init__(self, channels: int, text: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.q, self.kv, self.out = (
            nn.Linear(channels, channels),
            nn.Linear(text, 2 * channels),
            nn.Linear(channels, channels),
        )

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q(pixels), *self.kv(text).chunk(2, -1))
        )
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(read).transpose(1, 2).reshape(x.shape)


class ToyUNet(nn.Module):
    """Noise prediction `[B, 1, 8, 8]` from z `[B, 1, 8, 8]`, t `[B]` and text states `[B, L, D]`; two resolutions."""

    def __init__(self, width: int = 24, text: int = 64) -> None:
        super().__init__()
        deep, time = 3 * width, 64
        self.time = nn.Sequential(nn.Linear(32, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.high = ResBlock(width, width, time)
        self.down = nn.Conv2d(width, deep, 3, stride=2, padding=1)
        self.low = nn.ModuleList(ResBlock(deep, deep, time) for _ in range(2))
        self.read_low = nn.ModuleList(CrossAttention(deep, text) for _ in range(2))
        self.up = nn.Conv2d(deep, width, 1)
        self.merge, self.read_high = ResBlock(2 * width, width, time), CrossAttention(width, text)
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(1000.0) * torch.arange(16, device=z.device, dtype=z.dtype) / 16)
        angles = t.to(z.dtype)[:, None] * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        high = self.high(self.stem(z), time)
        low = self.down(high)
        for block, read in zip(self.low, self.read_low, strict=True):
            low = read(block(low, time), text)
        up = F.interpolate(self.up(low), scale_factor=2.0)
        return self.head(self.read_high(self.merge(torch.cat([up, high], 1), time), text))


@dataclass
class ToyDiffusion:
    """The parts together, with the seams that unlearning and attacks need. Latents are images in [-1, 1]."""

    unet: nn.Module
    text_encoder: nn.Module
    tokenizer: ToyTokenizer = field(default_factory=ToyTokenizer)
    alphas_bar: Tensor = field(default_factory=lambda: diffusion.cosine_alphas_bar(TIMES))
    latent_shape: tuple[int, ...] = (1, 8, 8)
    clip: float | None = 1.0

    @property
    def end_id(self) -> int:
        return 1

    @property
    def word_ids(self) -> Tensor:
        """The ids an attack may use: no start and no end token."""
        return torch.arange(2, len(WORDS))

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def token_ids(self, prompts: Sequence[str]) -> Tensor:  # int64 [B, L]
        return self.tokenizer(prompts).to(self.device)

    def words(self, ids: Tensor) -> str:
        return self.tokenizer.words(ids)

    def embed_tokens(self, ids: Tensor) -> Tensor:  # [..., D]
        return self.text_encoder.token_embedding(ids)  # type: ignore[operator]

    def encode(self, embeds: Tensor, ids: Tensor) -> Tensor:  # [B, L, E]
        return self.text_encoder(embeds)

    def predict_noise(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:  # like z
        return self.unet(z, t, condition)

    def decode(self, z: Tensor) -> Tensor:  # [B, 1, 8, 8] in [0, 1]
        return ((z + 1) / 2).clamp(0, 1)


def captioned(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents `[B, 1, 8, 8]` of images, and the ids `[B, 12]` of random captions; one caption in eight is empty."""
    prompts = [
        "" if c < 0.125 else caption(digit, template=TEMPLATES[int(a * len(TEMPLATES))], figure=b < 0.5)
        for digit, (a, b, c) in zip(
            labels.tolist(), torch.rand(len(labels), 3, generator=generator).tolist(), strict=True
        )
    ]
    return 2 * images - 1, ToyTokenizer()(prompts)


def train_toy(
    seed: int = 0,
    *,
    steps: int = 700,
    batch_size: int = 64,
    lr: float = 2e-3,
    width: int = 24,
    text_encoder: ToyTextEncoder | None = None,
) -> ToyDiffusion:
    """Train the toy from scratch, on one device and without the cache; with `text_encoder`, that one is kept as it is and only a U-Net trained."""
    from surefoot.datasets.embedded import digits, seeded

    source = seeded(seed, "toy_diffusion")
    data = digits(0, sizes=(1400, 97, 300)).train
    unet = seeded_build(lambda: ToyUNet(width), source)
    encoder = text_encoder or seeded_build(ToyTextEncoder, source)
    assert isinstance(unet, ToyUNet) and isinstance(encoder, ToyTextEncoder)
    model = ToyDiffusion(unet.train(), encoder.train())
    parameters = list(unet.parameters()) + (list(encoder.parameters()) if text_encoder is None else [])
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        pick = torch.randint(len(data), (batch_size,), generator=source)
        z, ids = captioned(data.x[pick], data.labels[pick], source)
        text = encoder(encoder.token_embedding(ids))
        loss = diffusion.denoising_loss(lambda z, t, text=text: unet(z, t, text), z, model.alphas_bar, generator=source)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    for module in (unet, encoder):
        module.eval().requires_grad_(False)
    return model


def toy_diffusion(seed: int = 0, **settings: int | float) -> ToyDiffusion:
    """The toy of `train_toy(seed, **settings)`, trained at most once on this machine."""
    modules = cached_modules(
        f"toy_diffusion-{seed}",
        {"seed": seed, **settings},
        lambda: _parts(train_toy(seed, **settings)),  # type: ignore[arg-type]
        lambda: {"unet": ToyUNet(int(settings.get("width", 24))), "text_encoder": ToyTextEncoder()},
    )
    return ToyDiffusion(modules["unet"], modules["text_encoder"])


def second_unet(toy: ToyDiffusion, seed: int = 1, *, steps: int = 600, width: int = 16) -> nn.Module:
    """Another U-Net trained for the toy's frozen text encoder, cached: what a new text encoder is plugged into to see whether it carries over."""
    encoder = toy.text_encoder
    assert isinstance(encoder, ToyTextEncoder)
    weights = hashlib.sha256(b"".join(p.detach().cpu().contiguous().numpy().tobytes() for p in encoder.parameters()))
    modules = cached_modules(
        f"toy_second_unet-{seed}",
        {"seed": seed, "steps": steps, "width": width, "text_encoder": weights.hexdigest()},
        lambda: {"unet": train_toy(seed, steps=steps, width=width, text_encoder=encoder).unet},
        lambda: {"unet": ToyUNet(width)},
    )
    return modules["unet"]


def _parts(model: ToyDiffusion) -> dict[str, nn.Module]:
    return {"unet": model.unet, "text_encoder": model.text_encoder}


def cached_modules(
    name: str,
    settings: dict[str, object],
    make: Callable[[], dict[str, nn.Module]],
    blank: Callable[[], dict[str, nn.Module]],
) -> dict[str, nn.Module]:
    """`make()`, or from the cache: the weights are read into `blank()`, modules of the same architecture, in evaluation mode and frozen."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    sources = "".join(Path(inspect.getfile(module)).read_text(encoding="utf-8") for module in (diffusion, ToyDiffusion))
    text = f"{sources}{sorted(settings.items())}{torch.__version__}"
    path = cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = {
            f"{part}.{key}": value.contiguous()
            for part, module in make().items()
            for key, value in module.state_dict().items()
        }
        fresh = path.with_suffix(f".{secrets.token_hex(4)}")
        save_file(made, str(fresh))
        os.replace(fresh, path)  # two processes may both train; whoever comes last replaces equal by equal
    with torch.random.fork_rng(
        []
    ):  # the initial weights are overwritten; drawing them must not move the caller's generator
        modules = blank()
    try:
        weights = load_file(str(path))
        for part, module in modules.items():
            prefix = f"{part}."
            module.load_state_dict(
                {key.removeprefix(prefix): v for key, v in weights.items() if key.startswith(prefix)}
            )
            module.eval().requires_grad_(False)
    except (RuntimeError, SafetensorError) as error:
        raise InvalidInput(f"{path} does not fit the toy; delete it and it is trained again.") from error
    return modules


def cache_folder() -> Path:
    home = os.environ.get("SUREFOOT_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "surefoot") / "toys"
