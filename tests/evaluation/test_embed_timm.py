"""`embed` and `neighbours` with the features of timm models."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from m3ae_fast import embed
from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.neighbours import main

SIDE = 64


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Return the name of a small network with random weights on the command line, and the network."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    model = timm.create_model("resnet10t", pretrained=False)
    save_file(model.state_dict(), file)
    model.reset_classifier(0)
    return f"timm:resnet10t@{SIDE}={file}", model.eval()


@pytest.fixture
def photos(tmp_path):
    """Write two families of similar images in a folder."""
    (tmp_path / "photos").mkdir()
    for family in range(2):
        base = np.random.default_rng(family).integers(40, 215, (4, 4, 3)).repeat(16, 0).repeat(16, 1)
        for number in range(3):
            noise = np.random.default_rng([family, number]).integers(-8, 9, base.shape)
            Image.fromarray((base + noise).astype(np.uint8)).save(tmp_path / f"photos/{family}{number}.png")
    return tmp_path / "photos"


def _expected(network, images_SCHW):
    about = network.pretrained_cfg
    mean, std = (torch.tensor(about[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        return network((images_SCHW / 255 - mean) / std).numpy()


def test_images_of_a_folder_have_the_features_of_the_network(network, photos):
    name, model = network
    found = embed(name, photos, overrides={"data.workers": 0, "encode.precision": "fp32"}, device="cpu")
    assert found["keys"].tolist() == [f"{family}{number}.png" for family in range(2) for number in range(3)]
    images = [torch.from_numpy(np.array(Image.open(photos / key))).movedim(2, 0) for key in found["keys"]]
    np.testing.assert_allclose(found["features"], _expected(model, torch.stack(images).float()), rtol=1e-3, atol=1e-4)


def test_samples_of_shards_are_embedded(network, shards, tmp_path):
    options = {"overrides": {"data.workers": 0, "encode.precision": "fp32"}, "device": "cpu"}
    found = embed(network[0], [*shards], out=tmp_path / "timm.npz", **options)
    assert found["features"].shape == (66, network[1].num_features) and len({*found["shards"]}) == 2
    with np.load(tmp_path / "timm.npz") as written:
        assert np.array_equal(written["features"], found["features"])


def test_neighbours_are_those_of_the_network(network, photos, tmp_path, capsys):
    out = tmp_path / "out.png"
    options = ["--out", str(out), "--pictures", "2", "--set", "data.workers=0"]
    assert main([network[0], str(photos / "00.png"), str(photos), *options]) == 0
    paths = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()[:2]]
    assert {*paths} == {str(photos / "01.png"), str(photos / "02.png")} and out.exists()


def test_user_errors_are_reported_in_one_line(network, photos):
    name = network[0]
    for options, message in (
        ({"patches": True}, f"patches: {name} has one vector of features for each image; leave it out"),
        ({"modality": "text"}, f"modality text: {name} has one vector"),
        ({"overrides": {"encode.pool": "grid2"}}, f"override encode.pool: {name} has one vector"),
    ):
        with pytest.raises(UserError) as error:
            embed(name, photos, **options)
        assert message in str(error.value)
    with pytest.raises(UserError, match="timm cannot open the model nothing"):
        embed("timm:nothing=x", photos)
