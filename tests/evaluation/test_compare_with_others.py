"""`compare` with features of other programs: .npz files and timm models."""

import json
import pickle

import numpy as np
import pytest
import timm
import torch
from pyarrow import parquet
from safetensors.torch import save_file

import m3ae_fast
from m3ae_fast.base.errors import UserError
from m3ae_fast.cli.evaluate import main
from m3ae_fast.config import DataConfig
from m3ae_fast.data import ShardStore, open_corpus
from m3ae_fast.evaluation import compare
from m3ae_fast.evaluation.image_features import input_config
from m3ae_fast.evaluation.library_features import open_library_features
from m3ae_fast.evaluation.stored_features import open_features
from tests.helpers.labelled import labelled_tar

NETWORKS = ("vit_tiny_patch16_224", "resnet10t")


def _data(*shards):
    sources = [[{"shards": shard, "modality": "image"}] for shard in shards]
    return DataConfig.model_validate({"train": sources[0], "val": sources[-1]}, strict=False)


@pytest.fixture(scope="module")
def opened(shards):
    """Return the training and held-out samples, and the input of features without a network."""
    data = _data(*shards)
    store = ShardStore(data.cache_dir, data.cache_gb)
    return [open_corpus(sources, store) for sources in (data.train, data.val)], input_config(data)


@pytest.fixture
def stored(run, shards, tmp_path):
    """Return the path of the features of the tiny run, as `embed` writes them, and the arrays."""
    path = tmp_path / "own.npz"
    more = {"overrides": ["data.workers=0", "encode.precision=fp32"], "device": "cpu"}
    return path, m3ae_fast.embed(run, [*shards], out=path, **more)


def _weights(tmp_path, name, seed=0):
    """Write random weights of a timm model, with its classifier, and return its name on the command line."""
    torch.manual_seed(seed)
    file = tmp_path / f"{name}-{seed}.safetensors"
    save_file(timm.create_model(name, pretrained=False).state_dict(), file)
    return f"timm:{name}={file}"


def _compare(out, models, shards, *options):
    data = ["--train", shards[0], "--val", shards[1], "--set", "data.workers=0", "--set", "encode.precision=fp32"]
    assert main(["compare", *map(str, models), *data, "--out", str(out), "--seeds", "1", *options]) == 0
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
def test_features_from_a_file_have_the_results_of_the_model_that_computed_them(run, shards, stored, tmp_path, capsys):
    path, arrays = stored
    order = np.random.default_rng(0).permutation(len(arrays["keys"]))
    np.savez(tmp_path / "shuffled.npz", **{name: array[order] for name, array in arrays.items()})
    models = [path, run, tmp_path / "shuffled.npz"]
    result = _compare(tmp_path / "out", models, shards, "--probes", "knn,logistic")
    rows = {(row["model"], row["probe"]): row["top1"] for row in result["rows"]}
    table = parquet.read_table(tmp_path / "out/predictions.parquet").to_pandas()
    for probe in ("knn", "logistic"):
        assert rows["own.npz", probe] == rows[run.name, probe] == rows["shuffled.npz", probe]
        scores = [table[(table.model == name) & (table.probe == probe)] for name in ("own.npz", run.name)]
        assert scores[0].key.tolist() == scores[1].key.tolist()
        np.testing.assert_allclose(scores[0].score, scores[1].score, rtol=1e-4)
    assert ("random weights", "knn") in rows, "the random weights have the architecture of the first M3AE"
    assert "own.npz does not differ significantly from" in (tmp_path / "out/comparison.md").read_text().replace(
        run.name + " does not differ significantly from own.npz", "own.npz does not differ significantly from"
    )


@pytest.mark.slow
def test_timm_models_are_compared_by_the_same_probes(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "available", lambda: ([], ""))
    models = [_weights(tmp_path, name) for name in NETWORKS]
    result = _compare(tmp_path / "out", models, shards)
    assert [(row["model"], row["probe"]) for row in result["rows"]] == [
        (model, probe) for model in models for probe in ("knn", "logistic")
    ]
    assert {row["trials"] for row in result["rows"]} == {1}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "width"), [(NETWORKS[0], 224, 192), (NETWORKS[1], 176, 512)])
def test_a_timm_model_has_its_own_size_and_normalisation(tmp_path, opened, name, size, width):
    own = open_library_features(_weights(tmp_path, name), opened[1])
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False).eval()
    about = network.pretrained_cfg
    assert own.config.image_size == size == about["input_size"][1] and own.width == width
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    mean, std = (torch.tensor(about[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_head(network.forward_features((images / 255 - mean) / std), pre_logits=True)
        torch.testing.assert_close(own.features(images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_mistakes_with_timm_models_are_one_line_each(tmp_path, opened, monkeypatch):
    vit = _weights(tmp_path, NETWORKS[0])
    file = vit.partition("=")[2]
    evil = tmp_path / "evil.pth"
    evil.write_bytes(pickle.dumps(print))
    cases = {
        "timm:no_such_model=x": "timm cannot open the model no_such_model",
        f"timm:{NETWORKS[1]}={file}": "the file lacks the weight conv1.0.weight of this model",
        f"timm:vit_small_patch16_224={file}": "the weight cls_token in the file has the shape",
        f"timm:{NETWORKS[0]}={tmp_path / 'missing.safetensors'}": "missing.safetensors: cannot be read (No such file",
        f"timm:{NETWORKS[0]}={tmp_path / 'missing.pth'}": "missing.pth: cannot be read",
        f"timm:{NETWORKS[0]}={evil}": "cannot be read as torch weights",
    }
    for name, message in cases.items():
        with pytest.raises(UserError) as error:
            open_library_features(name, opened[1])
        assert message in str(error.value) and "\n" not in str(error.value), name
    torch.save(timm.create_model(NETWORKS[0], pretrained=False).state_dict(), tmp_path / "sound.pth")
    assert open_library_features(f"timm:{NETWORKS[0]}={tmp_path / 'sound.pth'}", opened[1]).width == 192
    monkeypatch.setattr("m3ae_fast.base.libraries._is_installed", lambda name: name != "timm")
    with pytest.raises(UserError, match=r"needs timm: pip install 'm3ae-fast\[evaluate\]'"):
        open_library_features(vit, opened[1])


def test_mistakes_with_files_of_features_are_one_line_each(tmp_path, opened):
    corpora, config = opened
    shard_of = [(shard.shard, key.decode()) for each in corpora for s in each.sources for shard in s.shards
                for key in shard.table()["key"]]  # fmt: skip
    shards, keys = (np.array(each) for each in zip(*shard_of))
    features = np.random.default_rng(0).normal(size=(len(keys), 5))
    sound = {"keys": keys, "features": features, "shards": shards}

    def attempt(**changes):
        arrays = {name: value for name, value in (sound | changes).items() if value is not None}
        np.savez(tmp_path / "a.npz", **arrays)
        return open_features(str(tmp_path / "a.npz"), config, corpora, 0.01)

    assert (
        attempt().width == 5 and attempt(shards=None).digest == attempt().digest != attempt(features=-features).digest
    )
    moved = np.array([f"/elsewhere/{shard.rpartition('/')[2]}" for shard in shards])
    assert attempt(shards=moved).digest == attempt().digest
    wrong = features.copy()
    wrong[3, 2] = np.nan
    cases = [
        ({"keys": None}, "contains no array keys"),
        ({"features": None}, "contains no array features"),
        ({"features": features[:-1]}, f"keys has the shape ({len(keys)},), but features has {len(keys) - 1} rows"),
        ({"shards": shards[1:]}, "shards has the shape"),
        ({"features": features[:, 0]}, "features has the dtype float64 and the shape"),
        ({"features": features.astype(str)}, "features has the dtype <U"),
        ({"features": wrong}, f"the features of 1 sample are not finite, for example {keys[3]}"),
        ({"keys": np.array(["a", *keys[1:]])}, "lacks the features of 1 sample, for example"),
        ({"keys": np.array([keys[1], *keys[1:]])}, "twice"),
        ({"keys": keys.astype(object)}, "Object arrays cannot be loaded when allow_pickle=False"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError) as error:
            attempt(**changes)
        assert message in str(error.value) and "\n" not in str(error.value), message
    for name, content in {"no.npz": None, "text.npz": b"text", "empty.npz": b""}.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            open_features(str(tmp_path / name), config, corpora, 0.01)


def test_keys_that_several_shards_share_need_the_shards(tmp_path):
    names = [labelled_tar(tmp_path / f"{part}.tar", range(12)) for part in ("one", "two")]
    data = _data(*names)
    corpora = [open_corpus(each, ShardStore(data.cache_dir, data.cache_gb)) for each in (data.train, data.val)]
    keys = [key.decode() for key in corpora[0].sources[0].shards[0].table()["key"]]
    path, features = tmp_path / "a.npz", np.arange(12.0)[:, None]
    np.savez(path, keys=keys, features=features)
    with pytest.raises(UserError, match=f"several samples are named {keys[0]}"):
        open_features(str(path), input_config(data), corpora, 0.01)
    both = {"keys": keys * 2, "features": np.concatenate((features, -features))}
    np.savez(path, **both, shards=[name for name in names for _ in keys])
    found = open_features(str(path), input_config(data), corpora, 0.01)
    assert found.width == 1


def test_features_of_other_programs_have_no_patch_tokens(shards, stored, tmp_path):
    with pytest.raises(UserError, match=r"own.npz: has no patch tokens, which attentive probes need; add knn or"):
        _compare(tmp_path / "out", [stored[0]], shards, "--probes", "attentive")
