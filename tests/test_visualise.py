"""What `visualise` draws is what the model does."""

import pytest
import torch
from PIL import Image

from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.config import ModelConfig
from m3ae_fast.errors import UserError
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.pictures.attention import _laid_over, attention_to_patches
from m3ae_fast.run import checkpoint
from m3ae_fast.visualise import main
from tests.helpers.attention import attend
from tests.helpers.labelled import labelled_tar, tiny_run

SIZES = ModelConfig(
    size=None, emb_dim=32, depth=2, num_heads=4, dec_emb_dim=16, dec_depth=1, dec_num_heads=2,
    image_size=32, patch_size=8, text_length=16, vocab_size=50,
)  # fmt: skip


def test_attention_maps_are_the_ops_weights():
    """Its output's gradient by the values of a patch is the weight of that patch."""
    torch.manual_seed(0)
    model = M3AE(SIZES).eval()
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    none = torch.zeros(16, dtype=torch.bool)
    sample = Sample("a", image, none, tokens=torch.arange(5), text_mask=none[:5])
    batch, block, seen = pack([sample], model.geometry), model.encoder.blocks[-1], []
    with block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs)), torch.no_grad():
        model.forward_encoder(batch)
    x_TD, keys, *_ = seen[0]
    kv = block.attn.qkv(x_TD)[1].unflatten(-1, (3, 4, -1)).detach().requires_grad_()
    out_THd = attend(None, kv, keys, keys)
    for row, found_L in zip((0, 17, 20), attention_to_patches(model, sample, [0, 17, 20])):
        (grad,) = torch.autograd.grad(out_THd[row].sum(), kv, retain_graph=True)
        expected_L = grad[1:17, 2, :, 0].mean(1)
        torch.testing.assert_close(found_L, expected_L / expected_L.sum(), rtol=1e-4, atol=1e-6)


def test_the_patch_looked_at_most_is_red_and_others_bluer():
    weights = torch.tensor([0.1, 0.4, 0.3, 0.2])
    shown = _laid_over(torch.full((3, 16, 16), 100, dtype=torch.uint8), weights, 8).int()
    patches = [shown[:, y : y + 8, x : x + 8].flatten(1) for y in (0, 8) for x in (0, 8)]
    assert all((patch == patch[:, :1]).all() for patch in patches)
    redness = torch.tensor([(patch[0, 0] - patch[2, 0]).item() for patch in patches])
    assert redness.argsort().tolist() == weights.argsort().tolist() and redness[1] > 100 > -50 > redness[0]


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    return tiny_run(tmp_path / "run")


def _use(run, shard):
    """Let the run's held-out samples be those of another shard."""
    path = checkpoint.saved_steps(run)[-1] / checkpoint.INFO_FILE
    text = path.read_text()
    val = next(word for word in text.split('"') if word.endswith("val-0000.tar"))
    path.write_text(text.replace(val, shard))


def test_each_kind_is_drawn(run, tmp_path):
    _use(run, labelled_tar(tmp_path / "val.tar", range(12)))
    heights = []
    for ratios in ([], ["--ratios", "0.25", "0.5", "1"]):
        assert main([str(run), "--pictures", "2", *ratios]) == 0
        heights.append(Image.open(run / "reconstructions.png").height)
    assert heights[1] > 2.5 * heights[0] - 100
    assert main([str(run), "attention", "--word", "blue", "--pictures", "2", "--out", str(tmp_path / "a.png")]) == 0
    assert main([str(run), "map", "--labels", "json.name"]) == 0
    assert all(Image.open(path).width > 200 for path in (tmp_path / "a.png", run / "map.png"))


def test_mistakes_are_one_line_and_draw_nothing(run, tmp_path):
    _use(run, labelled_tar(tmp_path / "val.tar", range(3)))
    for options, message in (
        (["--ratios", "1.5"], "must be from 0 to 1"),
        (["attention", "--word", "unicorn"], "none of the samples has an image and 'unicorn'"),
        (["map", "--labels", "json.other"], "3 of 3 samples have no label"),
        (["map"], "a map needs 4 or more"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(run), *options, "--out", str(tmp_path / "out.png")])
        assert not (tmp_path / "out.png").exists()
