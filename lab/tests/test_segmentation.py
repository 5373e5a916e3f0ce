"""`lab.segmentation` at toy size: masks are the alpha channels of the emoji, every trial is run once, and the report
compares the arms by paired differences."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from lab.labelled.emoji import VERSION, is_held_out
from lab.segmentation import __main__ as program
from lab.segmentation import collage, report
from lab.segmentation.report import LARGEST, NAMES
from lab.segmentation.run import SETTINGS, TESTS, Study, Trial, plan
from lab.study import shards
from lab.tests.packages import emoji, npm_package
from m3ae_fast import train
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.parquet import write_parquet
from tests.helpers.labelled import described_tar
from tests.helpers.shards import picture


def disc(number, side=64):
    """Return a disc of a colour on transparent noise."""
    random = np.random.RandomState(number)
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    pixels = random.randint(0, 256, (side, side, 4), dtype=np.uint8)
    inside = y**2 + x**2 < (side / 3) ** 2
    pixels[..., 3] = 255 * inside
    pixels[inside, :3] = random.randint(0, 256, 3)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Return a folder of packages; the clip art is grey."""
    grey = io.BytesIO()
    Image.new("RGB", (60, 60), (99, 99, 99)).save(grey, "JPEG")
    for split in ("train", "val"):
        described_tar(tmp_path / f"clip/{split}-0.tar", {"0": (grey.getvalue(), None, {})})
    monkeypatch.setattr(collage, "CLIPART", tmp_path / "clip")
    table = [emoji(number, ["1F3FB"] if number == 0 else ()) for number in range(24)]
    (tmp_path / "packages").mkdir()
    for vendor in shards.VENDORS:
        file = tmp_path / f"packages/emoji-datasource-{vendor}-{VERSION}.tgz"
        npm_package(file, vendor, table, disc)
    return tmp_path / "packages"


def test_masks_are_the_alpha_channels(packages, tmp_path):
    found = collage.prepare(packages, tmp_path / "shards", download=False)
    assert found == ["Animals", "Flags", "Smileys"]
    held = sum(is_held_out(f"1F{number:03X}") for number in range(24))
    for split, count in (("train", 2 * (24 - held)), ("val", held)):
        names = sorted(path.name for path in (tmp_path / f"shards/images/{split}").iterdir())
        assert len(names) == 2 * count  # two vendors; the skin tone is left out
        assert len(shards_of(tmp_path / "shards" / collage.CATEGORIES, split)) == 2 * count
        for name in names:
            image, *masks = (
                np.asarray(Image.open(tmp_path / f"shards/{kind}/{split}/{name}"))
                for kind in ("images", "masks/foreground", "masks/categories")
            )
            inside = masks[0] == 1
            assert 20 < inside.sum() < 0.5 * inside.size and {*np.unique(masks[0])} == {0, 1}
            number = int(name.split("-")[1], 16) - 0x1F000
            assert (masks[1] == (1 + found.index(("Smileys", "Animals", "Flags")[number % 3])) * inside).all()
            outside = abs(image.astype(int) - 99).max(2) < 12  # noise in the transparent pixels has no effect
            assert outside[~inside].mean() > 0.9
    assert collage.prepare(packages, tmp_path / "shards", download=False) == found


def test_the_position_in_a_collage_does_not_predict_the_mask():
    png = io.BytesIO()
    Image.new("RGBA", (64, 64), (9, 9, 9, 255)).save(png, "PNG")  # opaque everywhere
    grey = picture(0, (60, 60))
    masks = [collage.laid(png.getvalue(), [grey], np.random.default_rng(seed))[1] for seed in range(300)]
    shares_SS = np.mean(masks, axis=0)
    assert shares_SS.max() < 0.5 and shares_SS[0, 0] > 0.02 and shares_SS.mean() > 0.15


def shards_of(folder, split):
    return list(shards.read(folder, (split,)))


def test_backgrounds_are_not_mainly_white(tmp_path):
    white, black = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (160, 160), "white").save(white, "PNG")
    Image.new("RGB", (160, 160), "black").save(black, "PNG")
    both = [white.getvalue(), black.getvalue()]
    crops = [collage.background(both, np.random.default_rng(seed)) for seed in range(20)]
    assert all(crop.size == (collage.SIDE, collage.SIDE) and not np.asarray(crop).any() for crop in crops)
    assert np.asarray(collage.background(both[:1], np.random.default_rng(0))).min() == 255


@pytest.mark.slow
def test_every_segmentation_trial_is_run_once(packages, tmp_path, monkeypatch, capsys):
    settings = json.loads(SETTINGS.read_text())
    settings["train"]["model"] |= {"emb_dim": 16, "depth": 1, "num_heads": 2, "dec_emb_dim": 16}
    settings["train"]["train"] |= {"steps": 2, "global_batch": 8}
    settings["evaluate"] |= {"segment.steps": 5}
    monkeypatch.setattr(program, "SETTINGS", tmp_path / "settings.json")
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    out, folder = tmp_path / "out", tmp_path / "results"
    arguments = ["--packages", str(packages), "--out", str(out), "--results", str(folder), "--seeds", "1"]
    assert program.main([*arguments, "--minutes", "0"]) == 0 and not (out / "runs").exists()
    with monkeypatch.context() as patch:
        patch.setattr(train, "main", lambda arguments: 0)  # stopped before its first checkpoint
        assert program.main(arguments) == 1
    assert program.main(arguments) == 0
    study = Study(out, out / "shards", settings)
    assert all(map(study.done, plan(1)))
    text = (folder / report.PAGE).read_text()
    for arm, name in NAMES.items():
        assert f"| {name} | " in text
        assert arm == LARGEST or (out / f"results/{arm}-foreground-knn-0/segmentation.png").exists()
    found = json.loads((folder / report.JSON).read_text())["miou"]
    assert len(found) == len(NAMES) * len(TESTS) and all(0 < row["mean"] < 1 for row in found)
    (own,) = (row for row in found if (row["encoder"], row["masks"], row["head"]) == ("mae", *TESTS[2]))
    assert own["mean"] == pytest.approx(
        json.loads((study.folder(Trial("mae", TESTS[2], 0)) / "result.json").read_text())["miou"]
    )
    sheet = study.folder(Trial("mae", TESTS[2], 0)) / "segmentation.png"
    with Image.open(folder / report.PICTURE) as drawn, Image.open(sheet) as one:
        assert drawn.size == (2 * one.width, one.height)  # image, truth and four predictions
    config = {arm: json.loads((out / f"runs/{arm}-0.json").read_text()) for arm in ("mae", "m3ae")}
    assert config["mae"]["model"]["vocab_size"] == 0 and config["m3ae"]["data"]["train"][0]["modality"] == "auto"
    (folder / report.PAGE).write_text("By hand.\n" + text)
    monkeypatch.setattr(Study, "perform", lambda self, trial: pytest.fail(f"{trial} again"))
    capsys.readouterr()
    assert program.main(arguments) == 0 and (folder / report.PAGE).read_text() == "By hand.\n" + text


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no emoji-datasource-twitter-.*\.tgz; leave the option out"):
        program.main(["--packages", str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_difference_is_paired_by_emoji_and_seed(tmp_path):
    """For each seed, the errors of the two encoders differ by the same number of pixels on every emoji. Therefore, only
    the variation between seeds contributes to the error of the difference.
    """
    study, test = Study(tmp_path, tmp_path, {}), TESTS[0]
    samples = {f"{i}": (picture(i), None, {"emoji": f"1F60{i // 2}"}) for i in range(8)}
    described_tar(tmp_path / f"{collage.CATEGORIES}/val-0.tar", samples)
    random = np.random.default_rng(0)
    for seed in range(2):
        right = random.integers(40, 50, 8)
        for arm, more in (("random", 0), ("mae", 20 + 4 * seed)):
            folder = study.folder(Trial(arm, test, seed))
            folder.mkdir(parents=True)
            (folder / "result.json").write_text("{}")
            truth, good = np.full((8, 2), 100), np.stack([right + more] * 2, 1)
            columns = {"class_right": good, "class_pixels": truth, "class_predicted": truth}
            write_parquet(folder / "predictions.parquet", {"key": [f"val-0/{i}" for i in range(8)], **columns})
    results = report.Results(study, 2)
    iou = [results._counts("mae", test, seed) for seed in range(2)]
    assert iou[0].truth_MC.tolist() == [[200, 200]] * 4  # two images of each emoji
    apart = [results._draws("mae", test, seed)[0] - results._draws("random", test, seed)[0] for seed in range(2)]
    found = results.difference("mae", "random", test)
    assert found.mean == pytest.approx(np.mean(apart)) and found.seeds == 2
    assert found.error == pytest.approx(abs(apart[0] - apart[1]) / 2, rel=0.02)
    assert found.error < results.miou("mae", test).error
    assert results.difference("mae", "m3ae", test) is None and results.miou("m3ae", test) is None
