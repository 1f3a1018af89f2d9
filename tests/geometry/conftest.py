"""Diffusion models at random and as small as they go, written to disk as people have them there."""

from __future__ import annotations

import pytest
import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_parts(*, prediction_type="epsilon", channels=4):
    """The parts of Stable Diffusion with a ControlNet; the vocabulary splits words into letters, and latents are half as wide as pictures."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    words = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "th", "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: k for k, word in enumerate(words)}
    blocks = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 16, "norm_num_groups": 4, "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.CLIPTextConfig(
            vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
            projection_dim=16, bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1, pad_token_id=len(vocab) - 1,
        )  # fmt: skip
        unet = diffusers.UNet2DConditionModel(sample_size=8, in_channels=channels, out_channels=4, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **blocks)  # fmt: skip
        controlnet = diffusers.ControlNetModel(in_channels=4, conditioning_embedding_out_channels=(8, 8), **blocks)
        for parameter in controlnet.parameters():  # its last layers start at zero, and a trained one's are not
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        return {
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=4, sample_size=16, latent_channels=4,
            ),
            "unet": unet,
            "controlnet": controlnet,
            "text_encoder": transformers.CLIPTextModel(config).eval(),
            "tokenizer": transformers.CLIPTokenizer(vocab=vocab, merges=[("t", "h")], model_max_length=16),
            "scheduler": diffusers.DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False, set_alpha_to_one=False,
                prediction_type=prediction_type,
            ),
        }  # fmt: skip


@pytest.fixture(scope="session")
def controlnet_folder(tmp_path_factory):
    """A Stable Diffusion with its ControlNet, as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-tile"
    for name, part in tiny_parts().items():
        part.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def make_parts():
    return tiny_parts


@pytest.fixture(scope="module")
def parts(controlnet_folder):
    """That model, read from its folder; a module's tests share it."""
    from surefoot.geometry.lm_gaussian import ControlNetParts

    return ControlNetParts.load(controlnet_folder)


@pytest.fixture(scope="module")
def views():
    """Four photos of 24 pixels with their true depths and cameras; files that want others have their own."""
    from surefoot.datasets.scenes import courtyard360

    scene = courtyard360(24, train=4)
    return [scene.view(camera, supersample=1) for camera in scene.train]
