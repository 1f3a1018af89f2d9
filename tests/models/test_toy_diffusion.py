import pytest
import torch

from surefoot.errors import InvalidInput
from surefoot.models import toy_diffusion as td


def test_tokenizer_frames_and_pads_with_the_end_token():
    ids = td.ToyTokenizer()(["a three", ""])
    assert ids.shape == (2, td.MAX_LENGTH)
    assert ids[0, :4].tolist() == [0, td.WORDS.index("a"), td.WORDS.index("three"), 1]
    assert (ids[0, 3:] == 1).all() and ids[1].tolist() == [0] + [1] * 11
    assert td.ToyTokenizer().words(ids[0]) == "a three"
    with pytest.raises(InvalidInput, match="zebra"):
        td.ToyTokenizer()(["a zebra"])
    with pytest.raises(InvalidInput, match="words"):
        td.ToyTokenizer()(["a " * 11])


def test_vocabulary_covers_every_caption():
    prompts = [td.caption(k, template=t, figure=f) for k in range(10) for t in td.TEMPLATES for f in (False, True)]
    assert len(set(prompts)) == len(prompts) == 200
    assert td.ToyTokenizer()(prompts).shape == (200, td.MAX_LENGTH)
    assert len(set(td.WORDS)) == len(td.WORDS)


def test_text_is_causal_and_reaches_the_noise():
    torch.manual_seed(0)
    model = td.ToyDiffusion(td.ToyUNet(8).eval(), td.ToyTextEncoder().eval())
    ids = model.token_ids(["a three", "a seven"])
    text = model.encode(model.embed_tokens(ids), ids)
    assert torch.equal(text[0, :2], text[1, :2])
    assert not torch.allclose(text[0, 2:], text[1, 2:])
    z, t = torch.randn(1, 1, 8, 8).repeat(2, 1, 1, 1), torch.tensor([5, 5])
    noise = model.predict_noise(z, t, text)
    assert noise.shape == z.shape
    assert not torch.allclose(noise[0], noise[1])


def test_trained_once_then_read_and_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("SUREFOOT_HOME", str(tmp_path))
    state = torch.get_rng_state()
    first = td.toy_diffusion(0, steps=2, width=8)
    assert torch.equal(torch.get_rng_state(), state)
    files = list((tmp_path / "toys").iterdir())
    assert [f.suffix for f in files] == [".safetensors"]  # nothing half-written is left
    monkeypatch.setattr(td, "train_toy", lambda *a, **k: pytest.fail("trained again"))
    again = td.toy_diffusion(0, steps=2, width=8)
    for one, other in zip(first.unet.parameters(), again.unet.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not other.requires_grad
    files[0].write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(InvalidInput, match="delete it"):
        td.toy_diffusion(0, steps=2, width=8)


def test_training_is_a_function_of_the_seed_and_keeps_a_given_encoder():
    one, other = (td.train_toy(3, steps=2, width=8) for _ in range(2))
    different = td.train_toy(4, steps=2, width=8)
    weight = [m.unet.get_parameter("stem.weight") for m in (one, other, different)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])
    encoder = one.text_encoder
    assert isinstance(encoder, td.ToyTextEncoder)
    before = [p.clone() for p in encoder.parameters()]
    second = td.train_toy(5, steps=2, width=8, text_encoder=encoder)
    assert second.text_encoder is encoder
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
