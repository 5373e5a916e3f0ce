import os
import re
import subprocess
import sys
from functools import partial

import pytest

from m3ae_fast.base.errors import exit_cleanly
from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.cli.shards import main
from tests.helpers.shards import caption, members, write_tar


def test_shards_are_indexed(tmp_path, capsys):
    write_tar(tmp_path / "a-0.tar", members(range(3)))
    write_tar(tmp_path / "a-1.tar", members(range(1200), "text"))
    (tmp_path / "a-2.tar").write_bytes(b"garbage" * 200)
    assert main(["table", str(tmp_path / "a-*.tar"), "--cache-dir", str(tmp_path / "cache")]) == 0
    out = capsys.readouterr().out
    assert sum(os.path.exists(tmp_path / f"a-{i}.tar.index") for i in range(3)) == 3
    for text in ("paired", "text", "no tar header", "1,203", "3 shards"):
        assert text in out


def test_the_table_of_shards_contains_the_number_of_images_and_captions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a long path would wrap
    mixed = [*members(range(4)), *members(range(4, 9), "image"), *members(range(9, 11), "text")]
    write_tar(tmp_path / "a.tar", mixed)
    assert main(["table", "a.tar", "--cache-dir", "cache"]) == 0
    out = capsys.readouterr().out.splitlines()
    header, row = ([word.strip() for word in re.split("[│┃]", line)[1:-1]] for line in (out[1], out[3]))
    assert header[:-3] == ["shard", "modality", "samples", "paired", "image-only", "text-only"]
    assert row[:-3] == ["a.tar", "any", "11", "4", "5", "2"] and header[-3:] == ["bytes", "not read", "damage"]


def test_a_tokenizer_is_trained(tmp_path, capsys):
    shards = write_tar(tmp_path / "a.tar", members(range(40)))
    out = tmp_path / "tokenizer.json"
    arguments = ["tokenizer", shards, "--cache-dir", str(tmp_path / "cache"), "--out", str(out), "--vocab-size"]
    assert main([*arguments, "100"]) == 0
    tokenizer = load_tokenizer(str(out), 8)
    assert tokenizer.decode(tokenizer.encode(caption(3))) == caption(3)
    assert f"{tokenizer.vocab_size} tokens" in capsys.readouterr().out
    for size in ("5", "20", "-1", "1000000000000"):
        assert exit_cleanly(partial(main, [*arguments, size])) == 2
        assert "--vocab-size" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["table", "none.tar"], ["tokenizer", "{}", "--vocab-size", "99", "--out", "."]])
def test_user_errors_are_printed_in_one_line(tmp_path, arguments):
    shards = write_tar(tmp_path / "a.tar", members(range(3)))
    arguments = [argument.format(shards) for argument in arguments] + ["--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([sys.executable, "-m", "m3ae_fast", "shards", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
