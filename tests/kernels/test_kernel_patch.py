"""`m3ae_kernels.patch_model`, applied to a small transformers ViT-MAE with random weights."""

import copy
import pickle

import m3ae_kernels
import pytest
import torch
import transformers  # it imports a model when the model is first used
from m3ae_kernels import patch_model
from torch import Tensor, nn

MEAN, STD = (0.48, 0.45, 0.4), (0.22, 0.23, 0.22)


def vit_mae(**changes) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=3,
        decoder_intermediate_size=48, **changes,
    )  # fmt: skip
    model = transformers.ViTMAEForPreTraining(config)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros in biases and positions would hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def images() -> tuple[Tensor, Tensor]:
    """Return uint8 images, and the same images as an image processor prepares them."""
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return pixels, (pixels / 255 - mean) / std


def step(model: nn.Module, pixels: Tensor, seed: int = 2):
    torch.manual_seed(seed)
    out = model(pixel_values=pixels)
    model.zero_grad()
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("changes", [{}, {"norm_pix_loss": True}, {"mask_ratio": 0.5}, {"qkv_bias": False}], ids=str)
def test_loss_and_gradients_equal_those_of_transformers(changes):
    plain = vit_mae(**changes)
    fused = patch_model(copy.deepcopy(plain))
    floating = images()[1]
    (expected, true), (found, grads) = step(plain, floating), step(fused, floating)
    assert abs(found.loss - expected.loss) <= 1e-6 * expected.loss
    assert torch.equal(found.mask, expected.mask) and torch.equal(found.ids_restore, expected.ids_restore)
    assert found.logits is None and expected.logits is not None
    assert grads.keys() == true.keys() and len(grads) > 30
    for name, grad in grads.items():
        assert (grad - true[name]).norm() <= 1e-6 * true[name].norm() + 1e-9, name


def test_raw_and_normalised_images_give_the_same_loss():
    raw, floating = images()
    fused = patch_model(vit_mae(), mean=MEAN, std=STD)
    of_floating = step(fused, floating)[0].loss
    finer = (raw.to(torch.int32) * 257).to(torch.uint16)  # the same values with 16 bits
    for pixels in (raw, finer):
        torch.testing.assert_close(step(fused.train(), pixels)[0].loss, of_floating, rtol=1e-6, atol=0)
        fused.eval()
        torch.testing.assert_close(
            fused(pixels, noise=torch.ones(4, 16)).logits, fused(floating, noise=torch.ones(4, 16)).logits
        )


def test_patched_models_do_not_embed_masked_patches():
    """The ops receive only the rows that are required: visible patches are not predicted."""
    seen = []
    fused = patch_model(vit_mae())
    fused.vit.embeddings.patch_embeddings.projection.register_forward_hook(lambda _, __, out: seen.append(out.shape))
    fused.decoder.decoder_norm.register_forward_hook(lambda _, __, out: seen.append(out.shape))
    step(fused, images()[1])
    assert seen == [(4, 4, 48), (4, 12, 24)]


def test_patching_does_not_change_evaluation():
    plain = vit_mae().eval()
    fused = patch_model(copy.deepcopy(plain))
    floating, noise = images()[1], torch.rand(4, 16)
    expected, found = plain(floating, noise=noise), fused(floating, noise=noise)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    wide = torch.randn(2, 3, 48, 48)
    options = {"noise": torch.rand(2, 36), "interpolate_pos_encoding": True}
    assert torch.equal(fused(wide, **options).logits, plain(wide, **options).logits)
    with pytest.raises(ValueError, match="doesn't match model"):
        fused(wide)


def test_training_on_other_image_sizes_uses_the_unpatched_code():
    plain = vit_mae()
    fused = patch_model(copy.deepcopy(plain))
    wide, options = torch.randn(2, 3, 48, 48), {"noise": torch.rand(2, 36), "interpolate_pos_encoding": True}
    assert torch.equal(fused(wide, **options).loss, plain(wide, **options).loss)


def test_autocast_keeps_the_residual_stream_in_float32():
    plain = vit_mae()
    fused = patch_model(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        (expected, _), (found, _) = (step(model, images()[1]) for model in (plain, fused))
        assert fused.vit.embeddings(images()[1])[0].dtype == torch.float32
    assert abs(found.loss - expected.loss) < 5e-3 * expected.loss


def test_parameters_and_outputs_keep_their_names():
    plain = vit_mae()
    fused = patch_model(copy.deepcopy(plain))
    own = fused.state_dict()
    assert own.keys() == plain.state_dict().keys()
    assert all(torch.equal(own[name], value) for name, value in plain.state_dict().items())
    as_tuple = fused(images()[1], return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].requires_grad
    states = fused(images()[1], output_hidden_states=True).hidden_states
    assert len(states) == 3


def test_a_copy_of_a_patched_model_reads_its_own_weights():
    fused = patch_model(vit_mae())
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    before = step(fused, images()[1])[0].loss
    assert before == step(fused, images()[1])[0].loss != step(other, images()[1])[0].loss


def test_a_patched_encoder_equals_the_plain_one():
    torch.manual_seed(0)
    plain = transformers.ViTMAEModel(vit_mae().config)
    fused = m3ae_kernels.patch_model(copy.deepcopy(plain))
    floating, noise = images()[1], torch.rand(4, 16)
    expected, found = (model(floating, noise=noise).last_hidden_state for model in (plain, fused))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Adapter(nn.Module):
    """A stand-in for an adapter of PEFT. It has the attributes of the layer that it contains."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "base_layer" else getattr(self.base_layer, name)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base_layer(x)


LAYERS = ["vit.embeddings.patch_embeddings.projection", "decoder.decoder_norm", "decoder.decoder_pred"]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_an_adapter_or_with_a_hook_is_refused_and_nothing_is_patched(name):
    """An op that reads only the parameters of the layer would ignore the adapter."""
    parent, _, child = name.rpartition(".")
    wrapped, hooked = vit_mae(), vit_mae()
    setattr(wrapped.get_submodule(parent), child, Adapter(wrapped.get_submodule(name)))
    hooked.get_submodule(name).register_forward_hook(lambda _, __, out: 2 * out)
    for model, problem in ((wrapped, "must be a .*, not Adapter$"), (hooked, "is a .* that computes more")):
        with pytest.raises(TypeError, match=f"^the layer {name} {problem}"):
            patch_model(model)
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_patched_model_can_be_patched_again_after_unpickling_too():
    fused = patch_model(vit_mae())
    before = step(fused, images()[1])[0].loss
    for model in (fused, pickle.loads(pickle.dumps(fused))):
        assert step(patch_model(model), images()[1])[0].loss == before


def test_unsupported_models_are_refused_by_name():
    with pytest.raises(
        TypeError, match=r"^m3ae_kernels\.patch_model supports .*ViTMAEForPreTraining and ViTMAEModel, not Linear$"
    ):
        patch_model(nn.Linear(2, 3))
