"""Models go in and out: safetensors, factories, exports, TorchScript, and pickles refused."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from surefoot.core.subject import Subject, predict
from surefoot.errors import InvalidInput
from surefoot.models import Normalized, seeded_build, small_cnn, small_cnn1d, small_resnet
from surefoot.models.loading import EMBEDDED, as_subject, load_model, load_saved, read_weights, save_subject

FACTORY = """
import torch
from torch import nn

def make(num_classes=10, hidden=16):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

def wrong():
    return 3

def fails():
    raise RuntimeError("no luck")
"""


@pytest.mark.parametrize("size", [4, 8, 28, 33])
def test_networks_take_any_size(size):
    x = torch.rand(2, 3, size, size)
    for build in (small_cnn, small_resnet):
        assert build((3, size, size), 5)(x).shape == (2, 5)
    assert small_cnn1d((2, 40), 4)(torch.rand(3, 2, 40)).shape == (3, 4)


def test_seeded_build_leaves_the_global_state(task):
    state = torch.get_rng_state()
    first, second = (seeded_build(lambda: small_cnn(task.input_shape, 10), task.generator("m")) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_embedded_round_trip(task, tmp_path):
    for name in ("small_cnn", "small_resnet", "mlp"):
        model, recipe, trained = load_model(name, task=task)
        assert not trained
        subject = as_subject(model, name, task)
        save_subject(subject, tmp_path / name, recipe)
        loaded = load_saved(tmp_path / name)
        assert torch.equal(predict(loaded.model, task.test.x), predict(model, task.test.x))
        assert loaded.input_shape == (1, 8, 8)
    assert set(EMBEDDED) >= {"small_cnn", "mlp"}


def test_factory_with_weights(task, tmp_path, factory):
    model, _, _ = load_model(f"{factory}:make", task=task)
    weights = tmp_path / "w.safetensors"
    save_file(model.state_dict(), weights)
    other, recipe, trained = load_model(f"{factory}:make", weights=weights, task=task)
    assert trained
    assert torch.equal(predict(model, task.test.x), predict(other, task.test.x))
    save_subject(as_subject(other, "mine", task), tmp_path / "saved", recipe)
    assert torch.equal(predict(load_saved(tmp_path / "saved").model, task.test.x), predict(model, task.test.x))
    save_file({k: v for k, v in model.state_dict().items() if "1." not in k}, weights)
    with pytest.raises(InvalidInput, match="lacks"):
        load_model(f"{factory}:make", weights=weights, task=task)


@pytest.mark.parametrize(
    ("name", "words"), [("wrong", "returned int"), ("fails", "no luck"), ("absent", "no function")]
)
def test_bad_factories(task, factory, name, words):
    with pytest.raises(InvalidInput, match=words):
        load_model(f"{factory}:{name}", task=task)


def test_exported_program(task, tmp_path):
    model = Normalized(small_cnn(task.input_shape, 10), [0.3], [0.2]).eval()
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(model, (task.test.x[:4],)), path)
    loaded, _, _ = load_model(str(path), task=task)
    subject = as_subject(loaded, "exported", task)
    assert torch.allclose(subject.logits(task.test.x), predict(model, task.test.x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_torchscript(task, tmp_path):
    model = small_cnn(task.input_shape, 10).eval()
    path = tmp_path / "m.pt"
    traced: Any = torch.jit.trace(model, task.test.x[:2])
    traced.save(str(path))
    loaded, _, _ = load_model(str(path), task=task)
    assert torch.allclose(
        as_subject(loaded, "script", task).logits(task.test.x), predict(model, task.test.x), atol=1e-5
    )


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemError('code ran')",))


def test_pickles_are_refused(task, tmp_path):
    path = tmp_path / "m.pt"
    torch.save(Bomb(), path)
    with pytest.raises(InvalidInput, match="--trust"):
        load_model(str(path), task=task)
    with pytest.raises(InvalidInput, match="--trust"):
        read_weights(path)
    plain = tmp_path / "m.pkl"
    plain.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InvalidInput, match="--trust"):
        load_model(str(plain), task=task)


def test_trust_opens_a_pickled_model(task, tmp_path):
    path = tmp_path / "m.pt"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.save(model, path)
    with pytest.raises(InvalidInput, match="--trust"):
        load_model(str(path), task=task)
    loaded, _, _ = load_model(str(path), task=task, trust=True)
    assert torch.equal(predict(loaded, task.test.x), predict(model, task.test.x))


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04rubbish" * 20])
@pytest.mark.parametrize("name", ["m.pt2", "m.pt", "w.safetensors"])
def test_malformed_model_files(task, tmp_path, factory, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    call: dict[str, Any] = (
        {"model": str(path)} if name != "w.safetensors" else {"model": f"{factory}:make", "weights": path}
    )
    with pytest.raises(InvalidInput) as caught:
        load_model(task=task, **call)
    assert "\n" not in str(caught.value)


def test_malformed_saved_model(task, tmp_path):
    model, recipe, _ = load_model("mlp", task=task)
    folder = save_subject(as_subject(model, "m", task), tmp_path / "m", recipe)
    facts = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text("{")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_saved(folder)
    (folder / "model.json").write_text(json.dumps(facts | {"format": "other"}))
    with pytest.raises(InvalidInput, match="format"):
        load_saved(folder)
    (folder / "model.json").write_text(json.dumps(facts))
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InvalidInput, match="safetensors"):
        load_saved(folder)


def test_models_that_do_not_fit_the_data(task):
    with pytest.raises(InvalidInput, match="fails on inputs"):
        as_subject(nn.Linear(3, 10), "m", task)
    with pytest.raises(InvalidInput, match="logits"):
        as_subject(nn.Identity(), "m", task)
    with pytest.raises(InvalidInput, match="5 outputs"):
        as_subject(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), "m", task)


def test_predict_puts_training_flags_back():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)).train()
    model[1].eval()
    predict(model, torch.rand(5, 1, 8, 8))
    assert [m.training for m in model] == [True, False, True]


@pytest.mark.slow
def test_efficientnet_lite0(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    model, recipe, trained = load_model("efficientnet_lite0")
    x = torch.rand(2, 3, 224, 224)
    assert trained
    assert predict(model, x).shape == (2, 1000)
    subject = Subject(model.eval(), "efficientnet_lite0", "image", (3, 224, 224), 1000)
    folder = save_subject(subject, tmp_path / "m", recipe)
    assert torch.equal(predict(load_saved(folder).model, x), predict(model, x))
