import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.tokenizer import CaptionTokenizer
from m3ae_fast.cli.draw import main
from m3ae_fast.evaluation.fill_in import fill_text, make_sample
from m3ae_fast.vqgan.model import VQGAN, VQGANConfig
from m3ae_fast.weights.open_model import open_model
from tests.helpers.labelled import coloured, tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(coloured(0, "red"))
    return path


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_each_mask_token_is_filled_with_the_most_probable_tokens(tmp_path, photo, attention):
    model = open_model(str(tiny_run(tmp_path / "run", dec_attention=attention)), text=True).eval()
    text = "a [MASK] house by the [MASK]"
    guesses = fill_text(model, make_sample(model, photo, text, 1.0, 0), top=model.config.vocab_size)
    assert [len(place) for place in guesses] == [2048, 2048]
    for place in guesses:
        shares = [guess.probability for guess in place]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-3)


def test_a_word_with_a_dominant_logit_is_predicted_at_the_mask(run, photo):
    model = open_model(str(run), text=True).eval()
    (wanted,) = model.tokenizer.encode("house").tolist()
    with torch.no_grad():
        model.text_head.bias[wanted] += 100
    sample = make_sample(model, photo, "a red[MASK]here", 1.0, 0)
    assert sample.text_mask.tolist().index(True) == len(model.tokenizer.encode("a red"))
    (place,) = fill_text(model, sample, top=2)
    assert (place[0].token, round(place[0].probability, 6)) == ("house", 1.0)


def test_the_fill_command_prints_predicted_words_and_draws_the_completed_image(run, photo, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert (
        main(["fill", str(run), str(photo), "a [MASK] cat", "--visible", "0.25", "--top", "3", "--out", str(out)]) == 0
    )
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[MASK] 1: ") and first.count("%") == 3
    assert second == f"drew {out}"
    assert Image.open(out).width > 480
    model = open_model(str(run), text=True)
    assert make_sample(model, photo, "", 0.25, 0).image_mask.float().mean() == 0.75


def test_user_errors_are_reported_in_one_line(run, photo, tmp_path):
    for options, message in (
        ([str(photo), "a cat"], r"there is nothing to fill in: write .MASK. in the text"),
        ([str(photo), "a [MASK]", "--visible", "2"], "must be from 0 to 1"),
        ([str(photo), "a [MASK]", "--top", "0"], "must be 1 or more"),
        ([str(tmp_path / "no.png"), "a [MASK]"], "cannot be read"),
        ([__file__, "a [MASK]"], "not an image"),
        ([str(photo), "a [MASK]", "--out", str(photo)], "is the input image; choose another file"),
        ([str(photo), "red " * 20 + "[MASK]"], "would be truncated"),
    ):
        with pytest.raises(UserError, match=message):
            main(["fill", str(run), *options])
    assert photo.read_bytes() == coloured(0, "red")


def test_a_text_on_which_the_tokenizer_fails_is_reported_in_one_line(run, photo, monkeypatch):
    def fails(self, caption):
        raise BadSample("the tokenizer fails: so it is")

    model = open_model(str(run), text=True)
    monkeypatch.setattr(CaptionTokenizer, "encode", fails)
    with pytest.raises(UserError, match="'a ': the tokenizer fails: so it is"):
        make_sample(model, photo, "a [MASK]", 1.0, 0)


def test_predicted_image_tokens_are_drawn_by_the_vqgan(photo, tmp_path, capsys):
    """The VQGAN is named by the run or, for an export, by the command line. A missing one is reported before any
    work."""
    torch.manual_seed(0)
    vqgan, tokens = VQGAN(VQGANConfig(32, 1, (1, 1, 1, 1), 8, 16)), {"image_targets": "vqgan", "codebook_size": 16}
    vqgan.decoder.convs[-1].bias.data.fill_(0.5)
    vqgan.save_pretrained(tmp_path / "vqgan")
    run = tiny_run(tmp_path / "run", data={"image_tokenizer": str(tmp_path / "vqgan")}, **tokens)
    out, words = tmp_path / "out.png", [str(photo), "a [MASK] cat", "--visible", "0.25"]
    assert main(["fill", str(run), *words, "--out", str(out)]) == 0
    drawn = np.asarray(Image.open(out)).astype(int)
    assert drawn.shape[1] > 480 and drawn[24:184, 344:496].std() > 1  # the third image, decoded by the VQGAN
    open_model(str(run), text=True).save_pretrained(tmp_path / "export")
    capsys.readouterr()
    assert main(["fill", str(tmp_path / "export"), *words]) == 0  # without a figure, no VQGAN is required
    given = [str(tmp_path / "export"), *words, "--out", str(tmp_path / "other.png")]
    capsys.readouterr()
    with pytest.raises(UserError, match=r"--out: .*export predicts tokens of a VQGAN.* with --image-tokenizer"):
        main(["fill", *given])
    assert not capsys.readouterr().out
    assert main(["fill", *given, "--image-tokenizer", str(tmp_path / "vqgan")]) == 0
    assert (tmp_path / "other.png").read_bytes() == out.read_bytes()
    pixels = tiny_run(tmp_path / "pixels")
    with pytest.raises(UserError, match=r"--image-tokenizer .*vqgan: is used only for --out with a model"):
        main(["fill", str(pixels), *given[1:], "--image-tokenizer", str(tmp_path / "vqgan")])
    with pytest.raises(UserError, match=r"--image-tokenizer .*: has 16 codes, but model.codebook_size is 32"):
        other = tiny_run(tmp_path / "other", data={"image_tokenizer": "none"}, **tokens | {"codebook_size": 32})
        main(["fill", str(other), *given[1:], "--image-tokenizer", str(tmp_path / "vqgan")])
