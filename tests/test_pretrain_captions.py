"""`pretrain` reads the captions of a table, or says why it cannot. It never trains without captions that the user has
named."""

import csv
import re

import pytest
from PIL import Image

from m3ae_fast.base.errors import UserError, exit_cleanly
from m3ae_fast.cli.pretrain import main
from m3ae_fast.pretraining.dataset_statistics import inspect
from m3ae_fast.shards.sources.columns import NO_CAPTIONS
from tests.helpers.shards import members, write_tar
from tests.helpers.source_shards import find_shards


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (40, 40), (30 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


def write_table(path, *columns, images=8, separator=","):
    """Write a csv with a row for each image. The first of the columns contains the images, and the others texts."""
    rows = [[f"{number}.png", *(f"{name} of {number}" for name in columns[1:])] for number in range(images)]
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([columns, *rows])
    return path


def captions_in(shards, run):
    """Return whether there are captions in shards."""
    return bool(inspect(shards, run, "cls")[0].vocab_size)


def test_a_named_table_without_captions_is_an_error_that_names_the_columns(tmp_path, photos, capsys):
    table, run = write_table(tmp_path / "t.csv", "image", "sku", "product_title"), tmp_path / "run"
    line = [str(photos), "--out", str(run), "--captions", str(table), "--dry-run"]
    assert exit_cleanly(lambda: main(line)) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {table}: has the columns image, sku, product_title; specify one of them with ")
    assert "--caption-column" in message and not run.exists()
    (tmp_path / "empty.csv").write_text("image,caption,sku\n0.png,,7\n1.png,,8\n")
    with pytest.raises(UserError, match="all captions are empty; specify the column of captions"):
        find_shards(str(photos), run, tmp_path / "empty.csv", [])


def test_the_columns_of_a_table_can_be_named(tmp_path, photos):
    table, run = write_table(tmp_path / "t.csv", "photo", "sku", "product_title", separator=";"), tmp_path / "run"
    with pytest.raises(UserError, match=r"has the columns photo, sku, product_title; specify one .*--image-column$"):
        find_shards(str(photos), run, table, [])
    shards = find_shards(str(photos), run, table, [], image_column="photo", caption_column="product_title")
    assert f"fields of {table} for --labels: json.sku" in shards.notes and captions_in(shards, run)
    shards = find_shards(str(photos), tmp_path / "fields", table, [], image_column="photo", caption_column=NO_CAPTIONS)
    assert not captions_in(shards, run)
    table.rename(photos / "t.csv")
    shards = find_shards(
        str(photos), tmp_path / "found", None, [], image_column="photo", caption_column="product_title"
    )
    assert captions_in(shards, run)
    mistakes = {("photo", "tittle"): "--caption-column tittle: .* no such", ("foto", "sku"): "--image-column foto: "}
    for wrong, message in mistakes.items():
        with pytest.raises(UserError, match=message):
            find_shards(str(photos), tmp_path / "wrong", None, [], image_column=wrong[0], caption_column=wrong[1])


def test_a_note_says_that_a_table_in_the_folder_has_no_captions(tmp_path, photos):
    table = write_table(photos / "t.csv", "image", "sku", "product_title")
    shards = find_shards(str(photos), tmp_path / "run", None, [])
    named = rf"no captions.* {re.escape(str(table))}: .*\(image, sku, product_title\).*--caption-column"
    assert re.search(named, shards.notes[0])
    shards = find_shards(str(photos), tmp_path / "fields", None, [], caption_column=NO_CAPTIONS)
    assert shards.notes[0] == f"fields are read from {table}"


def test_a_note_says_that_a_column_of_splits_is_not_used(tmp_path, photos):
    table = write_table(tmp_path / "t.csv", "image", "caption", "Split")
    note = f"the column Split of {table} is not used: only sub-folders, such as train and val, are splits"
    assert note in find_shards(str(photos), tmp_path / "run", table, []).notes
    for number in range(8):
        split = photos / ("val" if number > 5 else "train")
        split.mkdir(exist_ok=True)
        (photos / f"{number}.png").rename(split / f"{number}.png")
    table.write_text("image,caption,split\ntrain/0.png,zero,train\nval/7.png,seven,val\n")
    assert not any("is not used" in note for note in find_shards(str(photos), tmp_path / "splits", table, []).notes)


def test_a_note_counts_captions_that_look_like_missing_values(tmp_path, photos):
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n0.png,zero\n1.png,NaN\n2.png,null\n3.png,\n4.png,none of these\n")
    notes = find_shards(str(photos), tmp_path / "run", table, []).notes
    assert [note for note in notes if "missing" in note] == [
        f"{table}: texts such as 'NaN' are used as captions (2 times); if they are missing values, leave these fields "
        "empty"
    ]


@pytest.mark.parametrize("name", ["metadata.csv", "Metadata.jsonl", "metadata.parquet"])
def test_tables_in_sub_folders_are_refused_instead_of_ignored(tmp_path, photos, name):
    """The `datasets` library reads such tables, one in the folder of each split, so a user may expect that `pretrain`
    does, too."""
    for split in ("train", "validation"):
        (photos / split).mkdir()
        (photos / f"{split == 'train':d}.png").rename(photos / split / "a.png")
        (photos / split / name).write_text("file_name,text\na.png,a picture\n")
    for number in range(2, 8):
        (photos / f"{number}.png").unlink()
    found = (
        f"the tables of sub-folders (train/{name}, validation/{name}) are not read; specify one table with --captions"
    )
    with pytest.raises(UserError, match=re.escape(found)):
        find_shards(str(photos), tmp_path / "run", None, [])
    (tmp_path / "t.csv").write_text("file_name,text\ntrain/a.png,a picture\n")
    assert captions_in(find_shards(str(photos), tmp_path / "run", tmp_path / "t.csv", []), tmp_path / "run")


def test_columns_are_refused_where_there_is_no_table(tmp_path, photos):
    with pytest.raises(UserError, match=r"--caption-column: names a column of a table, but .* has no table; specify"):
        find_shards(str(photos), tmp_path / "run", None, [], caption_column="title")
    tar = write_tar(tmp_path / "a.tar", members(range(4)))
    with pytest.raises(UserError, match=r"--image-column and --caption-column cannot be used: .* consists of shards"):
        find_shards(str(tar), tmp_path / "run", None, [], image_column="image")


def test_a_corrected_table_replaces_the_shards_of_a_dry_run(tmp_path, photos):
    table, run = write_table(tmp_path / "t.csv", "image", "sku", "product_title"), tmp_path / "run"
    assert not captions_in(find_shards(str(photos), run, table, [], caption_column=NO_CAPTIONS), run)
    assert captions_in(find_shards(str(photos), run, table, [], caption_column="product_title"), run)


def test_rows_whose_image_is_missing_are_left_out_and_named_unless_they_are_half_of_the_rows(tmp_path, photos):
    table = write_table(tmp_path / "t.csv", "image", "caption", images=15)
    shards = find_shards(str(photos), tmp_path / "run", table, [])
    assert shards.notes[0] == (
        f"{table}: left out, because 7 of 15 rows refer to images that are not in {photos}, such as '8.png' (row 9), "
        "'9.png' (row 10), '10.png' (row 11)"
    )
    assert captions_in(shards, tmp_path / "run")
    write_table(table, "image", "caption", images=16)
    with pytest.raises(UserError, match=r"8 of 16 rows refer to .* such as '8.png' \(row 9\), '9.png' .*relative to"):
        find_shards(str(photos), tmp_path / "other", table, [])
