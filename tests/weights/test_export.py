"""The contents of an export, and its upload to the Hub."""

import json
import os
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image
from transformers import AutoImageProcessor

import m3ae_fast
from m3ae_fast.base.errors import UserError
from m3ae_fast.batch.inputs import prepare_image
from m3ae_fast.cli.convert import main
from m3ae_fast.config import LossConfig, ModelConfig
from m3ae_fast.model import M3AE
from tests.helpers.labelled import tiny_run
from tests.helpers.trainer import CLIPART
from tests.weights.test_timm import TINY


def losses_of(run) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.slow
def test_an_export_is_self_contained(run, tmp_path, monkeypatch):
    """The tokenizer and the sizes are stored together with the weights."""
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    monkeypatch.chdir(tmp_path)
    model = M3AE.from_pretrained("out")
    ids = model.tokenizer.encode("a red apple")
    assert len(ids) and model.tokenizer.vocab_size == model.config.vocab_size == 2048
    assert model.representation(text=torch.from_numpy(ids)[None]).isfinite().all()
    model.save_pretrained("again")
    again = M3AE.from_pretrained("again")
    assert (again.tokenizer.encode("a red apple") == ids).all()
    assert all((again.state_dict()[name] == tensor).all() for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("norm_pix", [True, False])
def test_an_export_keeps_the_standardisation_of_the_targets(tmp_path, norm_pix):
    """Reconstructions of an export are therefore in the same units as those of its run."""
    run = tiny_run(tmp_path / "run", loss=LossConfig(norm_pix=norm_pix))
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    m3ae_fast.convert(tmp_path / "out", tmp_path / "again")
    for folder in (run, tmp_path / "out", tmp_path / "again"):
        assert m3ae_fast.load_model(folder).loss_config.norm_pix is norm_pix


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_image_processor_of_transformers_prepares_images_as_encode(tmp_path, channels):
    mean, std = (0.5, 0.4, 0.3, 0.6)[:channels], (0.2, 0.3, 0.25, 0.4)[:channels]
    config = ModelConfig(**TINY, channels=channels, image_mean=mean, image_std=std)
    model = M3AE(config)
    model.save_pretrained(tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    pixels = np.random.default_rng(0).integers(0, 256, (57, 57, 4), dtype=np.uint8)
    for height, width in ((24, 24), (57, 40), (33, 44), (20, 57)):  # unchanged, cropped by odd numbers, enlarged
        image = Image.fromarray(pixels[:height, :width, : max(channels, 3)])
        image = image.convert("L") if channels == 1 else image
        options = {"input_data_format": "channels_first"} if channels == 4 else {}  # transformers 5.20 cannot infer it
        theirs = processor(image, return_tensors="pt", **options)["pixel_values"]
        torch.testing.assert_close(
            theirs[0], (prepare_image(image, model.config) / 255 - mean) / std, rtol=0, atol=1e-6
        )
        torch.testing.assert_close(model.encode(theirs, precision="fp32"), model.encode([image], precision="fp32"))
    grey = Image.fromarray(pixels[..., 0])  # is converted to the model's channels
    if channels == 3:
        theirs = processor(grey, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(theirs, (prepare_image(grey, model.config) / 255 - mean) / std, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "white"), [("uint8", 255), ("uint16", 65535), ("float32", 1)])
def test_exported_image_processors_scale_white_to_one(tmp_path, dtype, white):
    M3AE(ModelConfig(**TINY, image_dtype=dtype)).save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert saved["do_rescale"] and saved["rescale_factor"] * white == 1


@pytest.mark.slow
def test_a_run_whose_tokenizer_is_missing_is_exported_without_it(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run").rglob("state.json"):
        path.write_text(path.read_text().replace(str(CLIPART / "tokenizer.json"), "/nowhere/tokenizer.json"))
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "the tokenizer is left out: data.tokenizer /nowhere/tokenizer.json: no such file" in capsys.readouterr().out
    assert M3AE.from_pretrained(tmp_path / "out").tokenizer is None


def test_the_model_card_describes_the_run_without_secrets(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run").rglob("state.json"):
        info = json.loads(path.read_text().replace(str(CLIPART), "https://me:secret@host/d"))
        info["config"]["train"]["probe"] = {"train": info["config"]["data"]["train"]}
        path.write_text(json.dumps(info).replace(".tar", ".tar?key=secret"))
    with open(tmp_path / "run/metrics.jsonl", "a") as file:  # the run has continued since the exported checkpoint
        file.write(json.dumps({"step": 7, "loss": 123.0, "val_image_loss": 123.0}) + "\n")
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "123" not in card.partition("| metric |")[2].partition("With ")[0]
    assert card.startswith("---\nlibrary_name: m3ae-fast\nlicense: other\n") and "Licence: to be filled in" in card
    assert "6 steps, 96 samples seen" in card and "`https://host/d/train-0000.tar`" in card and "secret" not in card
    assert f"| val_image_loss | {losses_of(run)['val_image_loss']:.4g} | 6 |" in card
    assert '"emb_dim": 32' in card and '"global_batch": 16' in card


def test_exported_files_contain_no_local_paths(run, tmp_path):
    """The files do not contain the text of a command either, because it may include a password."""
    shutil.copytree(run, tmp_path / "run")
    sources = [str(CLIPART / "train-{0000..0001}.tar"), f"file:{CLIPART}/a.tar", f"{CLIPART}/b.tar::{CLIPART}/c.tar"]
    sources += [f"pipe:cat {CLIPART}/d.tar"]
    for path in (tmp_path / "run").rglob("state.json"):
        info = json.loads(path.read_text())
        info["config"]["data"]["train"][0]["shards"] = sources
        info["config"]["model"]["init_from"] = str(CLIPART / "weights")
        path.write_text(json.dumps(info))
    for kind in ("m3ae", "timm"):
        assert main([str(tmp_path / "run"), "--out", str(tmp_path / kind), "--format", kind]) == 0
        for path in (tmp_path / kind).iterdir():
            assert not any(str(folder).encode() in path.read_bytes() for folder in (CLIPART, tmp_path)), path
    card = (tmp_path / "m3ae/README.md").read_text()
    for name in ("train-{0000..0001}.tar", "a.tar", "b.tar::c.tar", "pipe:..."):
        assert f"- `{name}`" in card


class Hub:
    """A folder of models that replaces the Hub."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def repo_info(self, name: str, repo_type: str, timeout: float) -> None:
        assert repo_type == "model"

    def snapshot_download(self, name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert not local_files_only
        if not (self.folder / name).is_dir():
            raise OfflineModeIsEnabled("no network in tests\nsecond line")
        assert "model.safetensors" in allow_patterns
        return str(self.folder / name)

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
        self.private = private
        (self.folder / name).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub/{name}"

    def upload_folder(self, repo_id: str, folder_path, commit_message: str) -> None:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setenv("HF_TOKEN", "token")
    monkeypatch.chdir(tmp_path)
    return hub


def test_a_run_is_uploaded_to_the_hub_and_loaded_from_it(run, tmp_path, hub, capsys):
    assert main([str(run), "--out", "out", "--push", "me/tiny"]) == 0
    assert "uploaded to https://hub/me/tiny" in capsys.readouterr().out and not hub.private
    assert m3ae_fast.convert("out", "other", push="me/other").notes == ("uploaded to https://hub/me/other",)
    assert "# me/tiny" in (tmp_path / "hub/me/tiny/README.md").read_text()
    model = M3AE.from_pretrained("me/tiny")
    assert model.push_to_hub("me/hidden", private=True) == "https://hub/me/hidden" and hub.private
    assert model.push_to_hub("me/again") == "https://hub/me/again" and not hub.private
    assert "# again" in (tmp_path / "hub/me/again/README.md").read_text()
    again = M3AE.from_pretrained("me/again")
    assert all((again.state_dict()[name] == tensor).all() for name, tensor in model.state_dict().items())
    assert again.tokenizer.encode("a red apple").tolist() == model.tokenizer.encode("a red apple").tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "me/other",
            r"me/other: no such file or folder, and the Hub cannot be reached \(no network in tests second line\)",
        ),
        ("nowhere", "nowhere: no such file or folder; specify an export, a model on the Hub as owner/name, or, where"),
        ("a/b/c", "no such file or folder"),
    ],
)
def test_a_missing_model_is_reported(hub, name, message):
    with pytest.raises(UserError, match=message):
        M3AE.from_pretrained(name)


def test_an_upload_without_token_or_network_is_reported(hub, tmp_path, monkeypatch):
    model = M3AE(ModelConfig(size=None, emb_dim=8, depth=1, num_heads=1, dec_emb_dim=8, dec_depth=1, dec_num_heads=1))
    monkeypatch.setattr(hub, "upload_folder", lambda **_: (_ for _ in ()).throw(ConnectionError("reset")))
    with pytest.raises(UserError, match=r"me/x: cannot be uploaded: the Hub cannot be reached \(reset\)"):
        model.push_to_hub("me/x")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="run `hf auth login`"):
        model.push_to_hub("me/x")
    assert os.listdir(tmp_path) == ["hub"]
