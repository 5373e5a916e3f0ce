"""Tables of captions: captions are read as they were written. A text that cannot be read is reported, and never
guessed."""

import csv
import datetime
import json
import os
import re
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3ae_fast.base.errors import UserError
from m3ae_fast.shards.sources.caption_table import read_captions, samples_of_images

fuzz = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Text as in captions, with many characters that tables treat specially.
TEXT = st.text(st.sampled_from('"",\t\n ;\'ab') | st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"))
ONE_LINE = st.text(st.sampled_from('"", ;\'ab') | st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]))


def pairs(table, **columns):
    return [(row.image, caption) for row in read_captions(table, **columns) for caption in row.captions or [""]]


def error(table, text=None, **columns):
    """Return the one-line error for a table."""
    if text is not None:
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_captions(table, **columns)
    message = str(caught.value)
    assert "\n" not in message and str(table) in message and len(message) < 1000
    return message


def numbered(captions):
    return [(f"{number}.jpg", caption) for number, caption in enumerate(captions)]


@pytest.mark.parametrize("quoting", ["QUOTE_MINIMAL", "QUOTE_ALL", "QUOTE_NONNUMERIC"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@fuzz
@given(captions=st.lists(TEXT, min_size=1, max_size=5))
def test_any_csv_written_by_python_is_read_unchanged(tmp_path, quoting, end, captions):
    table = tmp_path / "captions.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=getattr(csv, quoting), lineterminator=end)
        writer.writerows([("image", "caption"), *numbered(captions)])
    assert pairs(table) == numbered(captions)


@fuzz
@given(captions=st.lists(TEXT, min_size=1, max_size=5))
def test_any_tsv_with_all_fields_quoted_is_read_unchanged(tmp_path, captions):
    table = tmp_path / "captions.tsv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, "excel-tab", quoting=csv.QUOTE_ALL).writerows([("image", "caption"), *numbered(captions)])
    assert pairs(table) == numbered(captions)


@fuzz
@given(captions=st.lists(ONE_LINE | ONE_LINE.map('"'.__add__), min_size=1, max_size=5))
def test_any_tsv_without_line_breaks_and_with_minimal_quoting_is_read_unchanged(tmp_path, captions):
    table = tmp_path / "captions.tsv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, "excel-tab").writerows([("image", "caption"), *numbered(captions)])
    assert pairs(table) == numbered(captions)


@fuzz
@given(captions=st.lists(ONE_LINE, min_size=1, max_size=5))
def test_no_quote_in_an_unquoted_tsv_swallows_a_row(tmp_path, captions):
    table = tmp_path / "captions.tsv"
    table.write_text("image\tcaption\n" + "".join(f"{name}\t{text}\n" for name, text in numbered(captions)))
    found = pairs(table)
    assert [name for name, _ in found] == [name for name, _ in numbered(captions)]
    for (_, read), written in zip(found, captions):
        quoted = re.fullmatch('"((""|[^"])*)"', written) and ('""' in written[1:-1] or written == '""')
        assert read == (written[1:-1].replace('""', '"') if quoted else written)


@fuzz
@given(captions=st.lists(TEXT | st.none() | st.lists(TEXT | st.none(), max_size=3), min_size=1, max_size=5))
def test_any_jsonl_and_parquet_with_texts_and_lists_agree(tmp_path, captions):
    lines = tmp_path / "captions.jsonl"
    lines.write_text("".join(json.dumps({"image": n, "caption": c}) + "\n" for n, c in numbered(captions)))
    expected = []
    for name, caption in numbered(captions):
        kept = [text for text in caption if text and text.strip()] if isinstance(caption, list) else [caption or ""]
        expected += [(name, text) for text in kept or [""]]
    assert pairs(lines) == expected
    as_lists = [caption if isinstance(caption, list) else [caption] for caption in captions]
    columns = {"image": [name for name, _ in numbered(captions)], "caption": as_lists}
    schema = pyarrow.schema({"image": pyarrow.string(), "caption": pyarrow.list_(pyarrow.string())})
    pyarrow.parquet.write_table(pyarrow.table(columns, schema), tmp_path / "captions.parquet")
    blank = [(name, text if text.strip() else "") for name, text in expected]
    assert pairs(tmp_path / "captions.parquet") == blank


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@fuzz
@given(
    data=st.binary(max_size=60), head=st.sampled_from([b"", b"image,caption\n", b"image\tcaption\na\t", b'{"image":'])
)
def test_any_bytes_are_read_as_rows_or_refused_in_one_line(tmp_path, suffix, data, head):
    table = tmp_path / f"captions.{suffix}"
    table.write_bytes(head + data)
    try:
        rows = read_captions(table)
    except UserError as caught:
        assert "\n" not in str(caught) and str(table) in str(caught)
    else:
        assert all(row.image and all(isinstance(text, str) for text in row.captions) for row in rows)


WRONG = {
    "": "has no columns",
    "sku,image,product_title\n7,0.jpg,a dog\n": "has the columns sku, image, product_title; specify one of them with "
    "--caption-column, or add --caption-column '' to read only fields",
    "image\n0.jpg\n": "has the columns image; specify one of them with --caption-column$",
    "a,b\n": "has the columns a, b; specify one of them with --image-column",
    "image,caption\n": "has no rows",
    "image,caption\n0.jpg,a dog, running\n": r"row 1 .*3 fields but the table has 2 columns: image, caption",
    "image,caption\n0.jpg,a dog\n1.jpg\n": r"row 2 .*1 field but",
    'image,caption\n0.jpg,one\n1.jpg,"a dog\n2.jpg,two\n': r"row 2 .*lines 3 to 4: a quote is not closed",
    'image,caption\n0.jpg,"a dog"s\n': "row 1 .*line 2",
    "image,caption,caption\n0.jpg,a,b\n": "has 2 matching columns, caption and caption; rename or remove",
    "image,caption,Caption\n0.jpg,a,b\n": "caption and Caption; specify one with --caption-column",
    "image,caption,year,year\n0.jpg,a,1,2\n": "has several columns year; rename or remove all but one",
    'image,caption\n0.jpg,"a\n' + "1.jpg,b\n" * 20_000: "lines 2 to .*131,072 characters; close its quote",
    "image,caption\n0.jpg,a\0b\n": "row 1 .*null byte",
    "image,caption\n,a\n": "row 1 .*image must be the name of a file",
    b"image,caption\n0.jpg,a\n1.jpg,caf\xe9\n": "line 3 is not UTF-8",
    "image,caption\n0.jpg,a\n".encode("utf-16"): "line 1 is not UTF-8",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items())
def test_the_error_for_an_invalid_csv_names_the_row(tmp_path, text, message):
    assert re.search(message, error(tmp_path / "captions.csv", text))


def test_columns_that_differ_only_in_case_can_be_selected(tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text("image,caption,Caption\n0.jpg,a,b\n")
    assert pairs(table, caption="Caption") == [("0.jpg", "b")]


def test_the_error_for_a_partly_quoted_tsv_names_the_row(tmp_path):
    table = tmp_path / "captions.tsv"
    assert "has no columns" in error(table, "\n")
    assert "row 2" in error(table, 'image\tcaption\n0.jpg\t"a dog\nrunning"\n')
    for fields in ("a dog\trunning", '"a dog"s\trunning', 'a "dog\trunning'):
        assert "row 1" in error(table, f"image\tcaption\n0.jpg\t{fields}\n")
    table.write_text(
        'image\tcaption\n0.jpg\t"a\tdog"\n1.jpg\t"quoth"\n2.jpg\t"""so"" it said"\n3.jpg\t5" wide\n4.jpg\t""\n'
    )
    assert [text for _, text in pairs(table)] == ["a\tdog", '"quoth"', '"so" it said', '5" wide', ""]


JSON_WRONG = {
    '{"a": 1}': "row 1 .*captions? is a dict",
    "5": "row 1 .*caption is a int",
    "true": "row 1 .*caption is a bool",
    '["a", {"raw": "b"}]': "caption is a list that contains a dict",
    '[["a"]]': "caption is a list that contains a list",
    '"\\ud800"': "caption is not UTF-8",
}


@pytest.mark.parametrize(("value", "message"), JSON_WRONG.items())
def test_the_error_for_an_invalid_caption_names_it(tmp_path, value, message):
    assert re.search(message, error(tmp_path / "captions.jsonl", f'{{"image": "0.jpg", "caption": {value}}}\n'))


def test_a_row_of_jsonl_that_lacks_its_caption_or_has_two_is_refused(tmp_path):
    first = '{"image": "0.jpg", "caption": "a", "id": 1}\n'
    assert "row 2" in (message := error(tmp_path / "a.jsonl", first + '{"image": "1.jpg", "captoin": "b"}')), message
    assert "has no field caption" in message
    assert "duplicate key 'caption'" in error(tmp_path / "a.jsonl", '{"image": "a", "caption": "a", "caption": "b"}')
    assert "nested too deeply" in error(tmp_path / "a.jsonl", first + '{"image":' * 100_000)
    (tmp_path / "a.jsonl").write_text(first + '{"caption": NaN, "image": "1.jpg"}\n')
    assert pairs(tmp_path / "a.jsonl") == [("0.jpg", "a"), ("1.jpg", "")]


def test_a_parquet_of_other_columns_or_types_is_refused(tmp_path):
    table = tmp_path / "captions.parquet"
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"], ["c"]], ["image", "caption", "caption"]), table)
    assert "has 2 matching columns, caption and caption" in error(table)
    pyarrow.parquet.write_table(pyarrow.table({"image": ["0.jpg", "1.jpg"], "caption": [float("nan"), 2.5]}), table)
    assert "row 2" in error(table)
    pyarrow.parquet.write_table(pyarrow.table({"image": [{"bytes": b"", "path": "a"}], "caption": ["a"]}), table)
    assert "image must be the name of a file" in error(table)
    late = pyarrow.array([1 << 62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"image": ["0.jpg"], "caption": ["a"], "date": late}), table)
    assert "row 1 cannot be read (date value out of range)" in error(table)
    table.write_bytes(table.read_bytes()[:-20])
    error(table)


@pytest.mark.parametrize("suffix", ["CSV", "Tsv", "JSONL", "PARQUET"])
def test_the_case_of_the_suffix_does_not_matter(tmp_path, suffix):
    table = tmp_path / f"captions.{suffix}"
    if suffix == "PARQUET":
        pyarrow.parquet.write_table(pyarrow.table({"image": ["0.jpg"], "caption": ["a"]}), table)
    else:
        text = {"CSV": "image,caption\n0.jpg,a", "Tsv": "image\tcaption\n0.jpg\ta"}
        table.write_text(text.get(suffix, '{"image": "0.jpg", "caption": "a"}'))
    assert pairs(table) == [("0.jpg", "a")]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_pipe_or_folder_in_place_of_a_table_is_refused(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    for kind in ("pipe", "folder"):
        assert "is not a regular file" in error(tmp_path / f"{kind}.{suffix}")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_byte_order_mark_is_not_part_of_the_first_column_name(tmp_path, suffix):
    row = {"image": "0.jpg", "caption": "a café"}
    lines = [json.dumps(row)] if suffix == "jsonl" else map({"csv": ",", "tsv": "\t"}[suffix].join, (row, row.values()))
    (tmp_path / f"a.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    assert pairs(tmp_path / f"a.{suffix}", image="image") == [("0.jpg", "a café")]


FIELDS = {
    "csv": 'path,caption,category,site,\n0.jpg,"one, two",bird,,7\n1.jpg,,3,"a ""b""",8\n',
    "tsv": 'path\tcaption\tcategory\tsite\n0.jpg\tone, two\tbird\t\n1.jpg\t\t3\ta "b"\n',
    "jsonl": '{"path": "0.jpg", "caption": "one, two", "category": "bird"}\n'
    '{"caption": null, "path": "1.jpg", "category": "3", "site": "a \\"b\\""}\n',
}


@pytest.mark.parametrize("kind", [*FIELDS, "parquet"])
def test_other_columns_become_metadata_fields(tmp_path, kind):
    table = tmp_path / f"t.{kind}"
    if kind == "parquet":
        rows = {"path": ["0.jpg", "1.jpg"], "caption": ["one, two", None], "category": ["bird", "3"]}
        rows |= {"site": [None, 'a "b"'], "thumbnail": [b"\xff", None], "parts": [[b"\xff"], None]}
        pyarrow.parquet.write_table(pyarrow.table(rows), table)
    else:
        table.write_text(FIELDS[kind])
    first, second = read_captions(table)
    assert (first.captions, json.loads(first.fields)) == (["one, two"], {"category": "bird"})
    assert json.loads(second.fields) == {"category": "3", "site": 'a "b"'}


def test_metadata_fields_keep_their_types(tmp_path):
    kinds = {"day": datetime.date(2020, 2, 3), "share": Decimal("1.50"), "count": 3, "sure": True, "parts": [1, None]}
    rows = {"path": ["0.jpg"], "nan": [float("nan")]} | {name: [value] for name, value in kinds.items()}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    (row,) = read_captions(tmp_path / "t.parquet", caption="")
    assert row.captions is None
    assert json.loads(row.fields) == kinds | {"day": "2020-02-03", "share": "1.50"}


def test_unused_caption_columns_are_not_metadata_fields(tmp_path):
    """In the sample's json file, such a field would be read as the caption."""
    (tmp_path / "t.csv").write_text("path,title,caption,site\n0.jpg,,long,here\n")
    (row,) = read_captions(tmp_path / "t.csv", caption="title")
    assert row.captions == [""] and json.loads(row.fields) == {"site": "here"}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_separator_of_a_csv_is_detected(tmp_path, separator):
    """In countries where the comma is the decimal separator, spreadsheets separate columns by semicolons."""
    rows = [("image", 'the "best" title', "price; net"), ("0.jpg", "one, two; three\tfour", "3,50")]
    with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    (row,) = read_captions(tmp_path / "t.csv", caption='the "best" title')
    assert (row.image, row.captions) == ("0.jpg", ["one, two; three\tfour"])
    assert json.loads(row.fields) == {"price; net": "3,50"}
    assert "has the columns image, the" in error(tmp_path / "t.csv")


def test_a_field_whose_name_is_not_valid_text_can_be_printed(tmp_path):
    table = tmp_path / "captions.jsonl"
    table.write_text('{"image": "0.jpg", "caption": "a", "f\\ud800": 1}\n')
    _, _, notes = samples_of_images(table, (None, None), tmp_path, ["0.jpg"], has_splits=False)
    assert "json.f" in "".join(notes).encode().decode()
