"""The model that a command loads, and the classifier that it writes."""

import resource

import pytest
import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import ModelConfig
from m3ae_fast.heads.classifier import Classifier, ClassifierConfig
from m3ae_fast.weights import open_model as opening
from m3ae_fast.weights.open_model import open_model, saved_run


def test_a_randomly_initialised_model_depends_only_on_the_seed(run):
    def weights(seed):
        torch.manual_seed(torch.seed() % 1000)
        return open_model(f"random:{run}", text=False, seed=seed).patch_embed.weight

    before = torch.get_rng_state()
    open_model(f"random:{run}", text=False, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert not torch.equal(weights(1), open_model(str(run), text=False).patch_embed.weight)


def test_a_randomly_initialised_model_of_an_export_depends_on_the_seed(run, tmp_path):
    open_model(str(run), text=False).save_pretrained(tmp_path / "export")
    first, again, other = (
        open_model(f"random:{tmp_path / 'export'}", text=False, seed=seed).patch_embed.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_given_tokenizer_takes_precedence_over_that_of_the_run(run, monkeypatch):
    asked, real = [], opening.load_tokenizer
    monkeypatch.setattr(opening, "load_tokenizer", lambda name, *sizes: asked.append(name) or real(own, *sizes))
    own = saved_run(run).tokenizer
    open_model(str(run), text=True)
    open_model(str(run), text=True, tokenizer="another.json")
    open_model(str(run), text=False, tokenizer="another.json")
    assert asked == [own, "another.json"]


SIZES = ModelConfig(size=None, emb_dim=16, depth=1, num_heads=1, image_size=16, patch_size=8, vocab_size=0)


def test_a_classifier_is_saved_with_the_given_weights(tmp_path):
    for pool in ("mean", "cls"):
        config = ClassifierConfig(model=SIZES, head="finetune", pool=pool, modality="image", classes=["a", "b"])
        model = Classifier(config)
        model.backbone.reset_parameters()
        given = {"head.linear.bias": torch.tensor([1.5, -2.0])}
        model.save_pretrained(tmp_path / pool, given)
        found = Classifier.from_pretrained(tmp_path / pool)
        assert found.config == config
        for name, weight in found.state_dict().items():
            assert torch.equal(weight, given.get(name, model.state_dict()[name]))


@pytest.mark.parametrize("limit", [100, 2000])  # bytes, less than those of the config or of the weights
def test_a_classifier_that_cannot_be_written_leaves_the_earlier_one_unchanged(tmp_path, limit):
    config = ClassifierConfig(model=SIZES, head="finetune", pool="mean", modality="image", classes=["a", "b"])
    Classifier(config).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = Classifier(config.model_copy(update={"classes": ["c", "d"]}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"{tmp_path}/classifier\.\w+: cannot be written \(.*File too large"):
            other.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
