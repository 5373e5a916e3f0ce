"""The Python API at the root of the package: the commands as functions."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import m3ae_fast
from m3ae_fast.base.errors import UserError
from m3ae_fast.embedding import features
from m3ae_fast.evaluation import task_runner
from m3ae_fast.evaluation.tasks import Knn
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.training.run_state import status
from tests.helpers.labelled import labelled_tar, tiny_run
from tests.helpers.trainer import ROOT, TINY

IMAGE = torch.zeros(3, 40, 40, dtype=torch.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder with images of several sizes and formats, some of them in sub-folders."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (folder / "more").mkdir()
    for name, size in (("a.png", (40, 64)), ("b.jpg", (50, 33)), ("more/c.png", (32, 32))):
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_a_model_is_loaded_from_a_run_an_export_and_with_random_weights(run, tmp_path):
    model = m3ae_fast.load_model(run)
    assert isinstance(model, M3AE) and not model.training
    m3ae_fast.convert(run, tmp_path / "out")
    exported, untrained = m3ae_fast.load_model(tmp_path / "out"), m3ae_fast.load_model(f"random:{run}", seed=3)
    same, other = ([*each.state_dict().values()] for each in (exported, untrained))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same))
    assert not all(torch.equal(a, b) for a, b in zip(same, other))
    again = m3ae_fast.load_model(f"random:{run}", seed=3).state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(other, again))


def test_the_output_of_preprocess_has_the_features_of_the_image(run, images):
    model = m3ae_fast.load_model(run)
    opened = [Image.open(path) for path in sorted(images.rglob("*.*"))]
    tensors = torch.stack([model.preprocess(image) for image in opened])
    size = model.config.image_size
    assert tensors.shape == (3, 3, size, size)
    assert torch.equal(model.encode(tensors), model.encode(opened))
    assert torch.equal(model.preprocess(images / "a.png"), tensors[0])


@pytest.mark.parametrize("kind", ["folder", "paths", "model"])
def test_images_outside_shards_are_embedded(run, images, tmp_path, kind):
    model = m3ae_fast.load_model(run)
    paths = [images / name for name in ("a.png", "b.jpg", "more/c.png")]
    source = paths if kind == "paths" else images
    settings = ["data.workers=0", "encode.batch=2", "encode.precision=fp32"]
    found = m3ae_fast.embed(
        model if kind == "model" else run, source, out=tmp_path / "out.npz", patches=True, overrides=settings
    )
    names = [str(path) for path in paths] if kind == "paths" else ["a.png", "b.jpg", os.path.join("more", "c.png")]
    assert found["keys"].tolist() == names
    expected = model.encode(paths, precision="fp32").numpy()
    np.testing.assert_allclose(found["features"], expected, atol=1e-5)
    written = np.load(tmp_path / "out.npz")
    assert all(np.array_equal(written[name], found[name]) for name in found)


def test_the_suffix_of_an_image_may_be_written_in_capitals(run, images, tmp_path):
    for name, own in (("a.png", "a.PNG"), ("b.jpg", "b.Jpg")):
        shutil.copy(images / name, tmp_path / own)
    names, settings = ["a.PNG", "b.Jpg"], ["data.workers=0"]
    assert m3ae_fast.embed(run, tmp_path, overrides=settings)["keys"].tolist() == names
    paths = [str(tmp_path / name) for name in names]
    assert m3ae_fast.embed(run, paths, overrides=settings)["keys"].tolist() == paths


@pytest.mark.parametrize(
    "name",
    ["encode_image", "encode_text", "forward_features", "get_image_features", "get_text_features"],
)
def test_a_method_of_another_library_names_the_one_that_replaces_it(run, name):
    model = m3ae_fast.load_model(run)
    with pytest.raises(AttributeError, match=rf"^M3AE has no {name}: use encode\((images|texts=texts)\) or"):
        getattr(model, name)
    with pytest.raises(AttributeError, match="'M3AE' object has no attribute 'nothing'"):
        _ = model.nothing
    with pytest.raises(
        TypeError, match=r"forward returns the losses of a PackedBatch, not of Tensor: .* use encode or"
    ):
        model(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.representation(np.zeros((1, 3, 32, 32))), "images must be a tensor, not ndarray; encode"),
        (lambda model: model.representation([torch.zeros(3, 32, 32)]), "images must be a tensor, not list; encode"),
        (lambda model: model.representation(text=[[1]]), "text must be a tensor, not list$"),
        (
            lambda model: model.encode(IMAGE, value_range=np.array([0, 1])),
            r"value_range array\(\[0, 1\]\): must be \(bl",
        ),
        (lambda model: model.encode(IMAGE, value_range=(0, "1")), r"value_range \(0, '1'\): must be \(black, white\)"),
        (lambda model: model.preprocess(IMAGE, np.array([0, 1])), "value_range array"),
        (lambda model: model.encode(IMAGE, batch_size=2.0), "batch_size 2.0: must be an integer of at least 1"),
        (
            lambda model: model.encode(np.zeros((32, 32, 4), np.uint8)),
            r"has 4 channels, but the model expects 3; pass it as PIL\.Image\.fromarray\(x\), which is converted$",
        ),
        (lambda model: model.patch_features(IMAGE, batch_size=0), "batch_size 0: must be an integer of at least 1"),
        (lambda model: model.encode(IMAGE, layer=1.5), "layer 1.5: the encoder has layers 1 to 2"),
        (lambda model: m3ae_fast.load_model(b"run"), "the name of a model must be a str or a path, not bytes"),
        (m3ae_fast.load_model, "the name of a model must be a str or a path, not M3AE"),
        (lambda model: m3ae_fast.load_model(""), "the name of the model is empty; specify a run"),
        (lambda model: m3ae_fast.load_model("run", device="cuda"), "device cuda: torch finds no GPU"),
        (lambda model: m3ae_fast.embed("", "a.tar"), "the name of the model is empty"),
        (
            lambda model: m3ae_fast.embed(model, "a.tar", columns="path,size"),
            "columns size: must be path, class or caption",
        ),
        (lambda model: m3ae_fast.embed(model, "a.tar", overrides={"encode.batch": 2.5}), "encode.batch: .*integer"),
        (lambda model: m3ae_fast.embed(model, "a.tar", batch=2), "batch: there is no such argument; did you mean pat"),
        (lambda model: m3ae_fast.embed(3, "a.tar"), "model: must be a name, a path or a model, not int"),
        (lambda model: m3ae_fast.embed(model, []), "source: is empty"),
        (lambda model: m3ae_fast.embed(model, "a.tar", overrides={"encode.batch": model}), "cannot be written as JSON"),
        (
            lambda model: m3ae_fast.evaluate("knn", model, train="a.tar", val="b.tar", out="out"),
            r"model: must be a name or a path, not M3AE; write the model with its method save_pretrained\(FOLDER\)",
        ),
        (
            lambda model: m3ae_fast.evaluate("knn", "run", train=["a.tar", 5], val="b.tar", out="out"),
            "train .*: must be a name or a path, not int$",
        ),
    ],
)
def test_a_wrong_argument_is_reported_in_one_line(run, tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises((TypeError, ValueError, UserError), match=message) as error:
        call(m3ae_fast.load_model(run))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("overrides", [{"encode.batch": 0}, "encode.batch=0", ["encode.batch=0"]])
def test_overrides_may_be_a_dict_or_one_text(run, images, tmp_path, overrides):
    where = {"train": "a.tar", "val": "b.tar", "out": tmp_path / "out"}
    for call in (
        lambda: m3ae_fast.embed(run, images, overrides=overrides),
        lambda: m3ae_fast.evaluate("knn", run, overrides=overrides, **where),
    ):
        with pytest.raises(UserError, match=r"overrides: encode.batch: input should be greater than 0"):
            call()
    other = json.loads(json.dumps(overrides).replace("encode.batch", "train.steps"))
    for call in (
        lambda: m3ae_fast.pretrain(images, tmp_path / "run", overrides=other),
        lambda: m3ae_fast.train("quickstart", out=tmp_path / "run", overrides=other, device="cpu"),
    ):
        with pytest.raises(UserError, match=r"train.steps: input should be greater than 0"):
            call()
    assert not (tmp_path / "run").exists()


def test_the_batch_size_and_the_columns_of_embed_are_given_as_to_the_command(run, tmp_path, monkeypatch):
    shard, sizes, embed = labelled_tar(tmp_path / "a.tar", range(5)), [], M3AE._input
    monkeypatch.setattr(M3AE, "_input", lambda self, batch: (sizes.append(len(batch.keys)), embed(self, batch))[1])
    found = m3ae_fast.embed(run, shard, columns="class,caption", overrides={"encode.batch": 2, "data.workers": 0})
    assert {"class", "caption"} <= found.keys() and sizes == [2, 2, 1]


@pytest.mark.slow
def test_a_model_is_trained_and_evaluated_in_a_thread(tmp_path):
    """Only the main thread of Python can handle signals."""
    train, val = labelled_tar(tmp_path / "train.tar", range(24)), labelled_tar(tmp_path / "val.tar", range(30, 42))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    where = {"train": train, "val": [val], "device": "cpu"}

    def work():
        settings = {"train.steps": 2, "data.workers": 0}
        run = m3ae_fast.train(tmp_path / "tiny.json", out=tmp_path / "run", overrides=settings, **where)
        again = m3ae_fast.train(tmp_path / "tiny.json", out=run, overrides=settings, resume="auto", **where)
        return again, m3ae_fast.evaluate("knn", run, out=tmp_path / "out", overrides="data.workers=0", **where)

    with ThreadPoolExecutor(1) as pool:
        run, found = pool.submit(work).result()
    assert run == tmp_path / "run" and status(run)[0] == "finished"
    assert found == json.loads((tmp_path / "out/result.json").read_text())


def test_an_unreadable_image_is_named_or_skipped(run, images, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    paths, settings = [images / "a.png", tmp_path / "bad.png"], ["data.workers=0"]
    with pytest.raises(
        UserError, match=r"1 of 2 samples cannot be used, for example .*bad.png: the file is not"
    ) as error:
        m3ae_fast.embed(run, paths, overrides=settings)
    assert str(error.value).count("bad.png") == 1
    found = m3ae_fast.embed(run, paths, overrides=[*settings, "data.max_bad_fraction=0.5"])
    assert found["keys"].tolist() == [str(images / "a.png")]


def test_embedding_a_folder_of_shards_equals_embedding_its_shards(run, tmp_path):
    shard = labelled_tar(tmp_path / "a.tar", range(6))
    one, other = (m3ae_fast.embed(run, source, overrides=["data.workers=0"]) for source in (tmp_path, shard))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    assert set(one) == {"keys", "shards", "features", "labels"}


@pytest.mark.parametrize("command", ["embed", "neighbours"])
def test_an_output_that_cannot_be_written_is_refused_before_the_features_are_computed(
    run, images, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(features, "encode_types", lambda *_, **__: pytest.fail("computed"))
    calls = {
        "embed": lambda out: m3ae_fast.embed(run, images, out=out),
        "neighbours": lambda out: m3ae_fast.neighbours(run, next(images.rglob("*.png")), images, out=out),
    }
    suffix = {"embed": "npz", "neighbours": "png"}[command]
    with pytest.raises(UserError, match=r"cannot be written \(.* is a file\)"):
        calls[command](f"{__file__}/out.{suffix}")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write to all folders
    with pytest.raises(UserError, match=rf"cannot be written \(no permission to write to {tmp_path}\); choose another"):
        calls[command](tmp_path / f"new/out.{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["caption"]}, "columns: images that are not in shards"),
        ({"modality": "text"}, "modality text: images that are not in shards"),
        ({"columns": ["size"]}, "columns size: must be path, class or caption"),
        ({"out": "features.csv"}, r"features.csv: must end in .parquet or .npz"),
    ],
)
def test_options_that_require_shards_are_refused_for_other_images(run, images, options, message):
    with pytest.raises(UserError, match=message):
        m3ae_fast.embed(run, images, **options)


def test_a_folder_without_images_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"has neither images .* nor .tar shards"):
        m3ae_fast.embed(run, tmp_path)


def test_a_model_is_evaluated_with_typed_arguments(run, tmp_path):
    train, val = labelled_tar(tmp_path / "train.tar", range(24)), labelled_tar(tmp_path / "val.tar", range(30, 42))
    out = tmp_path / "out"
    found = m3ae_fast.evaluate("knn", run, train=train, val=[val], out=out, overrides=["knn.k=3", "data.workers=0"])
    assert found == json.loads((out / "result.json").read_text())
    assert found["config"]["knn"]["k"] == 3 and found["val_samples"] == 12 and 0 <= found["top1"] <= 1


def test_a_task_with_its_options_may_be_passed_in_place_of_its_name(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(task_runner, "_perform", lambda options, *_, **__: given.append(options))
    options = {"model": tmp_path / "run", "train": "a.tar", "val": ["b.tar"], "out": tmp_path / "out", "layers": "all"}
    m3ae_fast.evaluate(Knn(**options), session=object())
    m3ae_fast.evaluate("knn", session=object(), **options)
    assert given[0] == given[1] and given[0].model == str(tmp_path / "run")
    with pytest.raises(UserError, match=r"^labels: pass it to Knn\(\.\.\.\), not to evaluate"):
        m3ae_fast.evaluate(Knn(**options), labels="cls")


@pytest.mark.parametrize(("device", "message"), [("cuda", "torch finds no GPU"), ("cuda:1", "must be cpu or cuda")])
def test_the_python_api_chooses_the_device_as_the_command(run, images, tmp_path, monkeypatch, device, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    where = {"train": "a.tar", "val": "b.tar", "out": tmp_path / "out"}
    for call in (
        lambda: m3ae_fast.embed(run, images, device=device),
        lambda: m3ae_fast.evaluate("knn", run, device=device, **where),
        lambda: m3ae_fast.pretrain(images, tmp_path / "run", device=device),
    ):
        with pytest.raises(UserError, match=f"device {device}: {message}"):
            call()
    assert not (tmp_path / "run").exists()
    found = m3ae_fast.embed(run, images, device="cpu", overrides=["data.workers=0"])
    assert len(found["features"]) == 3


@pytest.mark.parametrize("call", [m3ae_fast.embed, lambda run, images: m3ae_fast.evaluate("knn", run, **images)])
def test_an_error_that_another_rank_reports_is_a_user_error(run, images, tmp_path, monkeypatch, call):
    """When another rank reports the error, a command exits and prints nothing. A function raises a UserError instead,
    because it must not end the user's program."""
    monkeypatch.setattr("m3ae_fast.process.ranks.Ranks.first_error", lambda *_, **__: (False, 75))
    where = tmp_path if call is m3ae_fast.embed else {"train": "no.tar", "val": "no.tar", "out": tmp_path / "out"}
    with pytest.raises(UserError, match=r"has neither images|no\.tar") as error:
        call(run, where)
    assert error.value.exit_code == 75


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("kmeans", {}, "kmeans: no such task; choose from knn, logistic, linear"),
        ("knn", {"seeds": 5}, "seeds: knn does not use it"),
        ("finetune", {"layers": "all"}, "layers: finetune does not use it"),
        ("knn", {"train": ()}, "train: is empty"),
        ("attentive", {"modality": "text"}, "modality: attentive does not use it; leave it out"),
        ("knn", {"lables": "cls"}, "lables: there is no such argument; did you mean labels?"),
        ("compare", {"probes": ["svm"]}, "probes svm: must be knn, logistic or attentive"),
        ("ood", {"ood": {"val": ["a.tar"]}}, "ood val: the result already uses this name for val"),
        ("ood", {"ood": ["a.tar"]}, "ood .*: must be a dict of shards by the name of their set"),
        ("knn", {"shots": [5, 0]}, "shots 0: must be greater than 0"),
        ("knn", {"shots": "1,x"}, "shots x: must be a valid integer"),
        ("knn", {"layers": "0"}, "layers 0: must be all, or numbers of blocks from 1, such as 1,2"),
        ("compare", {"seeds": 101}, "seeds 101: must be less than or equal to 100"),
        ("compare", {"probes": []}, "probes: is empty"),
        ("knn", {"seed": 1, "overrides": "run.seed=2"}, "seed 1: the setting run.seed is given too"),
        ("knn", {"model": ["a", "b"]}, "knn evaluates one model, not 2"),
    ],
)
def test_an_option_that_a_task_cannot_use_is_refused(tmp_path, task, options, message):
    given = {"model": "run", "train": "a.tar", "val": "b.tar", "out": tmp_path} | options
    with pytest.raises(UserError, match=message):
        m3ae_fast.evaluate(task, given.pop("model"), **given)


def test_arguments_with_several_items_may_be_texts_as_on_the_command_line_or_single_values(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(task_runner, "_perform", lambda options, *_, **__: given.append(options))
    one = {"pools": "mean", "layers": 2, "shots": 5}
    several = {"pools": "cls,mean", "layers": [1, 2], "shots": [10, 5]}
    for more in (one, several, {"ood": {"other": "c.tar"}}, {"probes": "knn,logistic"}):
        task = "ood" if "ood" in more else "compare" if "probes" in more else "knn"
        m3ae_fast.evaluate(task, "run", train="a.tar", val="b.tar", out=tmp_path, session=object(), **more)
    first, second, third, fourth = given
    assert (first.pools, first.layers, first.shots) == (["mean"], [2], [5])
    assert (second.pools, second.layers, second.shots) == (["cls", "mean"], [1, 2], [5, 10])
    assert third.ood == {"other": ["c.tar"]} and fourth.probes == ["knn", "logistic"]


def test_shards_are_made_counted_and_described_through_the_python_api(images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a", "b", "more/c"):
        (images / f"{name}.txt").write_text(f"the picture {name}")
    shards, pattern = m3ae_fast.shards, str(tmp_path / "out/*.tar")
    made = shards.make(images, tmp_path / "out", held_out=0.4, workers=1)
    assert (made.samples, made.captions) == (3, 3)
    assert [path.name for path in made.shards] == ["train-00000.tar", "val-00000.tar"]
    monkeypatch.setattr("m3ae_fast.shards.statistics._SAMPLES", 2)
    found = shards.stats(pattern, out=tmp_path / "stats.png")
    assert (found.seen, found.of, found.unit) == (2, 3, "words") and (tmp_path / "stats.png").exists()
    counted = shards.table(pattern, tmp_path / "m.npy")
    assert (len(counted.rows), counted.samples, counted.unread, counted.notes) == (2, 3, 0, [])
    assert sorted(shard.summary.samples for shard in counted.indexed) == [1, 2]
    trained = shards.tokenizer(pattern, tmp_path / "t.json", vocab_size=60)
    assert trained.captions == 3 and shards.stats(pattern, tokenizer=tmp_path / "t.json").unit == "tokens"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda shards: shards.make("in", "out", short_side=0), "^short_side 0: must be greater than or equal to 1"),
        (
            lambda shards: shards.make("in.h5", "out", captions="a.csv"),
            "--captions can be used only with a folder of images; in.h5 is an",
        ),
        (
            lambda shards: shards.make("in/", "out", split="train"),
            "in/: is neither a folder, nor an HDF5 file",
        ),
        (lambda shards: shards.tokenizer("a.tar", "t.json", vocab_size=1), "--vocab-size 1: must be above"),
        (lambda shards: shards.make("in", "out", value_range=(9, 0)), r"value_range \(9, 0\): must be dtype"),
        (lambda shards: shards.make("in", "out", value_range=(5, 5)), r"value_range \(5, 5\): must be dtype"),
        (lambda shards: shards.make("in", "out", held_out=1), "held_out 1: must be less than 1"),
        (lambda shards: shards.make("in", "out", heldout=0.1), "heldout: there is no such argument; did you mean held"),
        (lambda shards: shards.make(3, "out"), "source 3: must be a name or a path, not int"),
        (lambda shards: shards.table("a.tar", "a.csv"), "a.csv: must end in .npy"),
        (lambda shards: shards.stats("a.tar", channels=0), "^channels 0: must be greater than or equal to 1"),
        (lambda shards: shards.stats("a.tar", dtype="int8"), "^dtype int8: must be uint8, uint16 or float32"),
        (lambda shards: shards.make("in", "out", workers=0), "workers 0: must be greater than or equal to 1"),
        (lambda shards: shards.stats("a.tar", value_range="uint16"), "value_range uint16: must be dtype"),
    ],
)
def test_invalid_arguments_for_making_shards_are_refused(tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call(m3ae_fast.shards)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "safetensors"}, "format safetensors: must be one of m3ae, timm, onnx"),
        ({"weights": "ema"}, "weights ema: must be one of average, last"),
    ],
)
def test_a_conversion_with_an_unknown_format_or_kind_of_weights_is_refused(run, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        m3ae_fast.convert(run, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_no_module_has_the_name_of_a_public_function():
    """A submodule that is imported becomes an attribute of its package, and would hide the function there. The module
    `train` itself can be called."""
    modules = {path.stem for path in (ROOT / "m3ae_fast").rglob("*.py") if path.parent.name != "cli"}
    packages = {path.parent.name for path in (ROOT / "m3ae_fast").rglob("__init__.py")}
    assert {*m3ae_fast.__all__} & (modules | packages) == {"train"}
    of_shards = {path.stem for path in (ROOT / "m3ae_fast/shards").glob("*.py")}
    assert not {*m3ae_fast.shards.__all__} & of_shards
    assert all(callable(getattr(m3ae_fast.shards, name)) for name in m3ae_fast.shards.__all__)
    assert all(callable(getattr(m3ae_fast, name)) for name in m3ae_fast.__all__ if name != "__version__")
