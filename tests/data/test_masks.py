"""Label masks are written from a folder to shards, and read from the shards."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.config import SourceConfig
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.data.segmentation_masks import masked_corpus
from m3ae_fast.shards.options import SourceOptions
from m3ae_fast.shards.sources.folder import Folder
from tests.data.test_shards_make import contents, make
from tests.helpers.shards import picture, write_tar


def mask(value, size=(32, 24)):
    out = io.BytesIO()
    Image.fromarray(np.full(size[::-1], value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("place", ["masks", "images/masks"])
def test_segmentation_masks_of_a_folder_are_matched_to_their_images(tmp_path, place, capsys):
    """The folder of masks may be inside the folder of images; the masks are then not read as images. An image without a
    mask has no mask in the shards.
    """
    names = ("train/a.jpg", "train/b.png", "val/a.jpg")
    images = write(tmp_path / "images", {name: picture(i, (32, 24)) for i, name in enumerate(names)})
    masks = write(tmp_path / place, {"train/a.png": mask(1), "val/a.png": mask(2)})
    assert make(images, tmp_path / "out", "--masks", masks) == 0
    assert "note: 1 of 3 images, such as " in capsys.readouterr().out
    found = {
        split: [sample.get("mask.png") for sample in contents(tmp_path / "out", f"{split}-*.tar")]
        for split in ("train", "val")
    }
    assert {*found["train"]} == {mask(1), None} and found["val"] == [mask(2)]
    before = Folder(images, SourceOptions(masks=masks)).identity
    (masks / "val/a.png").write_bytes(mask(2) + b" ")
    assert Folder(images, SourceOptions(masks=masks)).identity != before


def test_a_mask_that_does_not_fit_its_image_is_refused(tmp_path):
    rotated = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated: with the orientation applied, the image has 24 x 32 pixels
    Image.open(io.BytesIO(picture(0, (32, 24)))).save(rotated, "JPEG", exif=exif)
    images = write(tmp_path / "images", {"a.jpg": picture(1, (32, 24)), "b.jpg": rotated.getvalue()})
    masks = write(tmp_path / "masks", {"a.png": mask(1, (24, 32)), "b.png": mask(1, (24, 32))})
    folder = Folder(images, SourceOptions(masks=masks))
    with pytest.raises(BadSample, match="the mask has 24 x 32 pixels, but the image has 32 x 24"):
        folder.read("train", 0)
    assert folder.read("train", 1).members == {"mask.png": mask(1, (24, 32))}
    (masks / "a.png").write_bytes(picture(0, (32, 24)))
    with pytest.raises(BadSample, match="the mask is not a PNG"):
        folder.read("train", 0)
    with pytest.raises(
        UserError, match=r"--masks .*nothing: contains no mask for any of the images; .* .*nothing/a.png"
    ):
        Folder(images, SourceOptions(masks=tmp_path / "nothing"))


def test_samples_contain_their_segmentation_masks(tmp_path):
    """Samples that have no mask or no image are left out. If a sample has several image files, only one of them is
    used."""
    image = picture(0, (32, 24))
    first = [("0.jpg", image), ("0.mask.png", mask(3)), ("1.jpg", image), ("2.txt", b"alone"), ("2.mask.png", mask(9))]
    first += [("3.jpg", image), ("3.png", image), ("3.mask.png", mask(4))]
    shards = [
        write_tar(tmp_path / "a.tar", first),
        write_tar(tmp_path / "b.tar", [("5.mask.png", mask(5)), ("5.jpg", image)]),
    ]
    corpus = open_corpus([SourceConfig(shards=shards, modality="image")], ShardStore(tmp_path))
    assert corpus.ignored == "1 .png"
    found, masks = masked_corpus(corpus)
    assert found.samples == 3 and found.sources[0].labels.tolist() == [0, 1, 2]
    views = masks.views([0, 1, 2, 0], 8)
    assert views.dtype == torch.uint8 and [view.unique().tolist() for view in views] == [[3], [4], [5], [3]]
