"""The figures of `draw` show the actual computation of the model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from m3ae_fast import checkpoint
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.packing import Sample, pack
from m3ae_fast.cli.draw import main
from m3ae_fast.config import Config, LossConfig, ModelConfig, parse
from m3ae_fast.data import ShardStore, open_corpus, open_tokenizer
from m3ae_fast.drawing import attention, reconstructions
from m3ae_fast.drawing.attention import attention_to_patches, shade_patches
from m3ae_fast.drawing.during_training import draw_training
from m3ae_fast.drawing.reconstructions import draw_run
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.model.pretrained import ENCODER, read_pretrained, write_pretrained
from m3ae_fast.weights.converting import convert
from m3ae_fast.weights.open_model import open_model
from tests.helpers.attention import attend
from tests.helpers.labelled import coloured, labelled_members, labelled_tar, tiny_run
from tests.helpers.shards import write_tar

SIZES = ModelConfig(
    size=None, emb_dim=32, depth=2, num_heads=4, dec_emb_dim=16, dec_depth=1, dec_num_heads=2,
    image_size=32, patch_size=8, text_length=16, vocab_size=50,
)  # fmt: skip


@pytest.mark.slow
def test_attention_maps_equal_the_weights_of_the_attention_op():
    """The gradient of the op's output with respect to the values of a patch is the attention weight of this patch."""
    torch.manual_seed(0)
    model = M3AE(SIZES).eval()
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    none = torch.zeros(16, dtype=torch.bool)
    sample = Sample("a", image, none, tokens=torch.arange(5), text_mask=none[:5])
    batch, block, seen = pack([sample], model.geometry), model.encoder.blocks[-1], []
    with block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs)), torch.no_grad():
        model.forward_encoder(batch)
    x_TD, keys, *_ = seen[0]
    kv = block.attn.qkv(x_TD).unflatten(-1, (3, 4, -1)).detach().requires_grad_()
    out_THd = attend(None, kv, keys, keys)
    for row, found_L in zip((0, 17, 20), attention_to_patches(model, sample, [0, 17, 20])):
        (grad,) = torch.autograd.grad(out_THd[row].sum(), kv, retain_graph=True)
        expected_L = grad[1:17, 2, :, 0].mean(1)
        torch.testing.assert_close(found_L, expected_L / expected_L.sum(), rtol=1e-4, atol=1e-6)


def test_the_patch_with_the_highest_attention_is_red_and_other_patches_are_bluer():
    weights = torch.tensor([0.1, 0.4, 0.3, 0.2])
    shown = shade_patches(torch.full((3, 16, 16), 100, dtype=torch.uint8), weights, 8).int()
    patches = [shown[:, y : y + 8, x : x + 8].flatten(1) for y in (0, 8) for x in (0, 8)]
    assert all((patch == patch[:, :1]).all() for patch in patches)
    brighter = shade_patches(torch.full((3, 16, 16), 200, dtype=torch.uint8), weights, 8).int()
    # images are drawn with half of their brightness, so a difference of 100 becomes 50
    assert (brighter - shown).unique().tolist() == [50]
    redness = torch.tensor([(patch[0, 0] - patch[2, 0]).item() for patch in patches])
    assert redness.argsort().tolist() == weights.argsort().tolist() and redness[1] > 100 > -50 > redness[0]


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    return tiny_run(tmp_path / "run")


def _set_held_out_shard(run, shard):
    """Replace the held-out samples of the run by those of another shard."""
    path = checkpoint.saved_steps(run)[-1] / checkpoint.INFO_FILE
    text = path.read_text()
    val = next(word for word in text.split('"') if word.endswith("val-0000.tar"))
    path.write_text(text.replace(val, shard))


def test_each_kind_of_figure_is_drawn(run, tmp_path):
    _set_held_out_shard(run, labelled_tar(tmp_path / "val.tar", range(12)))
    assert main(["reconstructions", str(run), "--pictures", "2"]) == 0
    assert Image.open(run / "reconstructions.png").height == 24 + 2 * (reconstructions.SIDE + reconstructions.GAP)
    assert main(["attention", str(run), "--word", "blue", "--pictures", "2", "--out", str(tmp_path / "a.png")]) == 0
    assert Image.open(tmp_path / "a.png").width > 200


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_run_and_its_export_have_the_same_figures(tmp_path, norm_pix):
    run, export = tiny_run(tmp_path / "run", loss=LossConfig(norm_pix=norm_pix)), tmp_path / "export"
    convert(run, export)
    val = ["--val", labelled_tar(tmp_path / "val.tar", range(4)), "--pictures", "2"]
    for figure in (["reconstructions"], ["reconstructions", "--ratios", "0.5"], ["attention"]):
        for model, out in ((run, "run.png"), (export, "export.png")):
            assert main([figure[0], str(model), *figure[1:], *val, "--out", str(tmp_path / out)]) == 0
        assert (tmp_path / "run.png").read_bytes() == (tmp_path / "export.png").read_bytes()


def test_an_export_that_cannot_be_drawn_is_refused_with_the_reason(run, tmp_path):
    convert(run, tmp_path / "export")
    encoder = read_pretrained(tmp_path / "export")
    state = {name: tensor for name, tensor in encoder.state.items() if name.startswith(ENCODER)}
    write_pretrained(tmp_path / "encoder", replace(encoder, state=state))
    targets = replace(encoder, config=encoder.config.model_copy(update={"image_targets": "vqgan"}))
    write_pretrained(tmp_path / "targets", targets)
    endless = {name: tensor * float("nan") for name, tensor in encoder.state.items()}
    write_pretrained(tmp_path / "nan", replace(encoder, state=endless))
    val, out = ["--val", labelled_tar(tmp_path / "val.tar", range(3))], ["--out", str(tmp_path / "a.png")]
    for name, options, message in (
        ("export", val, "specify samples with --val, and the figure with --out"),
        ("export", out, "specify samples with --val, and the figure with --out"),
        ("encoder", [*val, *out], "contains no decoder"),
        ("targets", [*val, *out], "predicts ids of an image tokenizer"),
        ("nan", [*val, *out], rf"^{tmp_path}/nan: \S+ is not finite"),
    ):
        with pytest.raises(UserError, match=message):
            main(["reconstructions", str(tmp_path / name), *options])
    assert not (tmp_path / "a.png").exists()


def test_each_sample_is_drawn_at_each_ratio_of_its_image(run, tmp_path, monkeypatch):
    """Captions are masked with the run's ratio."""
    _set_held_out_shard(run, labelled_tar(tmp_path / "val.tar", range(12)))
    drawn = []
    monkeypatch.setattr(reconstructions, "draw_reconstructions", lambda model, samples, *_: drawn.append(samples))
    for given in ([], [0.25, 0.5, 1.0]):
        main(["reconstructions", str(run), "--pictures", "3", *(["--ratios", *map(str, given)] if given else [])])
    for samples, ratios in zip(drawn, ([0.75], [0.25, 0.5, 1.0])):
        assert [Path(sample.key).name for sample in samples] == [k for k in ("00000", "00004", "00008") for _ in ratios]
        assert [sample.image_mask.float().mean().item() for sample in samples] == ratios * 3
        for one, other in zip(samples[:: len(ratios)], drawn[0]):
            assert torch.equal(one.text_mask, other.text_mask) and torch.equal(one.image, other.image)
    info = checkpoint.saved_steps(run)[-1] / checkpoint.INFO_FILE
    assert '"seed": 42' in info.read_text()
    info.write_text(info.read_text().replace('"seed": 42', '"seed": 7'))
    main(["reconstructions", str(run), "--pictures", "3"])
    assert not all(torch.equal(one.image_mask, other.image_mask) for one, other in zip(drawn[0], drawn[2]))


def test_nothing_is_drawn_if_no_sample_can_be_used(run, tmp_path):
    bad = write_tar(tmp_path / "bad.tar", [("0.jpg", b"no image"), ("1.jpg", b"nor this")])
    with pytest.raises(UserError, match="none of the samples can be used"):
        main(["reconstructions", str(run), "--val", bad])
    assert not (run / "reconstructions.png").exists()


def test_figures_drawn_during_training_equal_those_of_the_draw_command(run, tmp_path):
    """One of the two samples is a caption without an image."""
    _set_held_out_shard(run, write_tar(tmp_path / "val.tar", [("0.txt", b"blue sky"), *labelled_members(range(1, 4))]))
    path = checkpoint.locate(run)
    settings = checkpoint.read_info(path).config
    settings["run"]["dir"], settings["train"]["pictures"] = str(tmp_path), 2
    settings["model"]["drop_path"] = 0.5  # affects training only
    config = parse(Config, settings, "the run's config")
    corpus, tokenizer = open_corpus(config.data.val, ShardStore()), open_tokenizer(config.data, config.model)
    drawn = draw_training(config, checkpoint.read_weights(path), corpus, tokenizer)
    assert drawn.keys() == {"reconstructions", "attention"}
    for kind, picture in drawn.items():
        assert main([kind, str(run), "--pictures", "2"]) == 0
        assert picture.read_bytes() == (run / f"{kind}.png").read_bytes()


def test_images_are_masked_with_the_ratio_of_the_run_or_with_each_given_ratio(run, tmp_path, monkeypatch):
    _set_held_out_shard(run, labelled_tar(tmp_path / "val.tar", range(4)))
    path, drawn = checkpoint.locate(run), []
    settings = checkpoint.read_info(path).config
    settings["masking"] |= {"image_ratio": 0.25, "text_ratio": 0.5}
    config = parse(Config, settings, "the run's config")
    corpus, tokenizer = open_corpus(config.data.val, ShardStore()), open_tokenizer(config.data, config.model)
    monkeypatch.setattr(reconstructions, "draw_reconstructions", lambda model, samples, *_: drawn.append(samples))
    weights = checkpoint.read_weights(path)
    for ratios in ((), (0.5, 0.75)):
        assert draw_run(config, weights, corpus, tokenizer, tmp_path / "a.png", 2, ratios) == 2 * max(len(ratios), 1)
    shares = [[sample.image_mask.float().mean().item() for sample in samples] for samples in drawn]
    assert shares == [[0.25, 0.25], [0.5, 0.75, 0.5, 0.75]]  # the ratios of an image are in consecutive rows
    assert [sample.key for sample in drawn[1]] == [sample.key for sample in drawn[0] for _ in range(2)]


@pytest.mark.parametrize("word", [None, "blue", "Blue"])
def test_each_attention_map_belongs_to_the_word_below_it(run, tmp_path, monkeypatch, word):
    """If a word is given, its first occurrence is shown. Otherwise, cls and the first words are shown, each once. The
    last row is the colour scale.
    """

    def word_pieces(model, tokens):
        """Return the positions of each word's tokens in a caption, at its first occurrence."""
        words, found = [], {}
        for place, token in enumerate(map(model.tokenizer.token, tokens.tolist())):
            words = [*words, ["", []]] if not token.startswith("##") else words
            words[-1] = [words[-1][0] + token.removeprefix("##"), [*words[-1][1], place]]
        for word, own in words:
            found.setdefault(word, own)
        return found

    captions = ["a, b", "the red of a blue house by the sea and so on", "", "blue, blue", "no such", "a blue one"]
    files = [file for i in range(6) for file in ((f"{i}.png", coloured(i, "red")), (f"{i}.txt", captions[i].encode()))]
    _set_held_out_shard(run, write_tar(tmp_path / "val.tar", [*files, ("6.txt", b"blue alone")]))
    sheets = []
    monkeypatch.setattr(attention, "draw_sheet", lambda path, rows, titles: sheets.append(rows))
    main(["attention", str(run), "--pictures", "2" if word else "7", *(["--word", word] if word else [])])
    ((*rows, key),) = sheets
    (cell,) = key
    assert cell.text == "blue: zero attention; red: maximum in image"
    assert cell.image[0, 0, -1] > cell.image[0, 0, 0] and cell.image[2, 0, -1] < cell.image[2, 0, 0]
    shown = [[cell.text for cell in row] for row in rows]
    if word:
        assert shown == [["", "cls", "blue"]] * 2
    else:
        assert len(rows) == 6 and shown[0] == ["", "cls", "a", "b"] and shown[2] == ["", "cls"]
        assert len(shown[1]) == 2 + 7 and all(text.isalnum() for row in shown for text in row[1:])
    model, whole = open_model(str(run), text=True).eval(), torch.zeros(16, dtype=torch.bool)
    places = model.config.patches_per_image
    for row, caption in zip(rows, [captions[1], captions[3]] if word else captions):
        tokens = torch.from_numpy(model.tokenizer.encode(caption))
        sample = Sample("", row[0].image, whole[:places], tokens=tokens, text_mask=whole[: len(tokens)])
        for cell in row[1:]:
            queries = [0] if cell.text == "cls" else [1 + places + i for i in word_pieces(model, tokens)[cell.text]]
            weights_L = attention_to_patches(model, sample, queries).mean(0)
            assert torch.equal(cell.image, shade_patches(row[0].image, weights_L, model.config.patch_size))


def test_user_errors_are_reported_in_one_line_and_nothing_is_drawn(run, tmp_path):
    _set_held_out_shard(run, labelled_tar(tmp_path / "val.tar", range(3)))
    for (what, *options), message in (
        (["reconstructions", "--ratios", "1.5"], "--ratios 1.5: must be less than or equal to 1"),
        (["attention", "--word", "unicorn"], "none of the samples has an image and 'unicorn'"),
    ):
        with pytest.raises(UserError, match=message):
            main([what, str(run), *options, "--out", str(tmp_path / "out.png")])
        assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("figure", ["reconstructions", "attention"])
@pytest.mark.parametrize("exported", [True, False])
def test_a_figure_that_cannot_be_written_is_refused_before_samples_are_opened(run, tmp_path, figure, exported):
    model = tmp_path / "export" if exported else run
    if exported:
        convert(str(run), model)
    (tmp_path / "a.png").mkdir()
    (tmp_path / "file").touch()
    for out, message in (("a.png", "is a folder"), ("file/a.png", r"cannot be written \(.*is a file\)")):
        with pytest.raises(UserError, match=f"a.png: {message}"):
            main([figure, str(model), "--val", str(tmp_path / "missing.tar"), "--out", str(tmp_path / out)])


@pytest.mark.parametrize("words", ["reconstructions --word dog", "attention --ratios 1"])
def test_options_that_would_be_ignored_are_refused(words):
    what, *options = words.split()
    with pytest.raises(UserError, match=f"unrecognized arguments: {' '.join(options)}"):
        main([what, "run", *options])
