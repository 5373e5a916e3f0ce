"""`lab.aspect` on a few synthetic drawings: they are cut, models are trained and tested, and completed runs are not
repeated."""

import io
import tarfile
from dataclasses import replace

from PIL import Image

from lab import aspect
from m3ae_fast.evaluation.default_hyperparameters import OFFICIAL
from tests.helpers.shards import write_tar


def drawn(width: int, height: int, level: int) -> bytes:
    """Return a JPEG of a grey box on white paper."""
    paper, stream = Image.new("RGB", (64, 64), "white"), io.BytesIO()
    paper.paste((level, level, level), (8, 16, 8 + width, 16 + height))
    paper.save(stream, "JPEG", quality=100)
    return stream.getvalue()


def test_native_and_square_models_are_trained_and_evaluated_in_the_same_way(tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    boxes = [(40, 10), (10, 40), (30, 30), (48, 24)]
    for name, sizes in (("train-0000", boxes * 2), ("val-0000", boxes[:2])):
        files = {}
        for i, (width, height) in enumerate(sizes):
            files |= {f"{i}.jpg": drawn(width, height, 10 * i), f"{i}.json": b'{"label": %d}' % (width > height)}
        files |= {"x.jpg": drawn(8, 8, 0), "x.json": b'{"label": -1}'}
        write_tar(tmp_path / f"in/{name}.tar", files.items())
    monkeypatch.setattr(aspect, "CLIPART", tmp_path / "in")
    monkeypatch.setattr(aspect, "SEEDS", (0, 1))
    monkeypatch.setitem(OFFICIAL, "linear", replace(OFFICIAL["linear"], fewest_steps=2))
    sizes = {"emb_dim": 16, "depth": 1, "num_heads": 2, "dec_emb_dim": 16, "image_size": 16}
    monkeypatch.setattr(aspect, "MODEL", aspect.MODEL | sizes)
    monkeypatch.setattr(aspect, "PATCHES", 4)
    arguments = ["--out", str(tmp_path / "out"), "--steps", "2"]
    assert aspect.main(arguments) == 0
    with tarfile.open(tmp_path / "out/shards/train-0000.tar") as tar:
        found = [Image.open(tar.extractfile(info)).size for info in tar if info.name.endswith(".png")]
    assert len(found) == 8 and all(abs(a - b) <= 2 for a, b in zip(found[0], (40, 10)))
    text = (tmp_path / "out/table.md").read_text()
    assert (
        text.startswith("10 drawings; quartiles of the longer side divided by the shorter side: ")
        and text.count(" ± ") == 12
    )
    capsys.readouterr()
    assert aspect.main(arguments) == 0
    assert "training is complete" in capsys.readouterr().out
