"""The images of a folder that are most similar to an image."""

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.neighbours import main
from m3ae_fast.embedding.nearest_images import most_similar, neighbours


@pytest.fixture
def photos(tmp_path):
    """Write two families of similar images, in two folders, and a file that is not an image."""
    for family, folder in ((1, "a"), (2, "b")):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        base = np.random.default_rng(family).integers(0, 256, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
        for number in range(4):
            noise = np.random.default_rng([family, number]).integers(-8, 9, base.shape)
            image = Image.fromarray((base + noise).clip(0, 255).astype(np.uint8))
            image.save(tmp_path / "photos" / folder / f"{number}.png")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_images_are_ordered_by_the_cosine_similarity_of_centred_features():
    query, features = torch.tensor([2.5, 0.5]), torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 1.5], [2.0, -1.5]])
    centred, at = features - features.mean(0), query - features.mean(0)
    expected = {name: float(at @ row / (at.norm() * row.norm())) for name, row in zip("abcd", centred)}
    found = most_similar("abcd", query.double(), features.double(), 3)
    assert [each.path for each in found] == sorted(expected, key=expected.__getitem__, reverse=True)[:3]
    assert [each.similarity for each in found] == pytest.approx([expected[each.path] for each in found], abs=1e-6)


def test_the_command_prints_and_draws_similar_images_without_the_image_itself(run, photos, tmp_path, capsys):
    out = tmp_path / "out.png"
    options = ["--out", str(out), "--pictures", "5", "--set", "data.workers=0"]
    assert main([str(run), str(photos / "a/0.png"), str(photos), *options]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    paths = [line.split("  ")[1] for line in lines]
    assert {*paths[:3]} == {str(photos / f"a/{number}.png") for number in (1, 2, 3)}
    assert len(paths) == 5 and last == f"drew {out}"
    similarities = [float(line.split()[0]) for line in lines]
    assert similarities == sorted(similarities, reverse=True) and similarities[2] > similarities[3]
    assert Image.open(out).width > 600


@pytest.mark.parametrize("features", ["pixels", "hog", "histogram"])
def test_neighbours_are_found_by_features_without_a_network(photos, features):
    found = neighbours(features, photos / "a/0.png", photos, pictures=3, overrides=["data.workers=0"])
    assert {each.path for each in found} == {str(photos / f"a/{number}.png") for number in (1, 2, 3)}


def test_user_errors_are_reported_in_one_line(run, photos, tmp_path):
    (tmp_path / "alone").mkdir()
    (photos / "a/0.png").rename(tmp_path / "alone/0.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for image, folder, message in (
        (tmp_path / "alone/0.png", tmp_path / "alone", "alone: contains no images other than .*0.png"),
        (tmp_path / "missing.png", photos, "missing.png: "),
        (tmp_path / "broken.png", photos, "broken.png: .*not an image"),
        (tmp_path / "alone/0.png", tmp_path / "nothing", "nothing: is not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            neighbours(run, image, folder)
    with pytest.raises(UserError, match=r"pictures 0: must be greater than or equal to 1"):
        neighbours(run, tmp_path / "alone/0.png", photos, pictures=0)
