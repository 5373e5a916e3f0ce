"""The bundled captions are clean, and the tool that cleaned them works as documented."""

import json
import tarfile

import pytest

from lab.openclipart import clean
from tests.helpers.trainer import CLIPART


def test_bundled_captions_are_clean():
    found = 0
    for shard in sorted(CLIPART.glob("*.tar")):
        with tarfile.open(shard) as tar:
            texts = {info.name: tar.extractfile(info).read().decode() for info in tar if not info.name.endswith(".jpg")}
        for name, text in texts.items():
            if name.endswith(".txt"):
                about = json.loads(texts[name.replace(".txt", ".json")])
                assert clean(text, about["source"], about["keywords"]) == text != ""
                found += 1
    assert found == 2048


@pytest.mark.parametrize(
    ("caption", "source", "keywords", "expected"),
    [
        ("AIGA_Symbol_Signs. EPS converted from. mapsym, aiga symbols", "t/aiga_bar1", ["symbol"], "bar. symbol"),
        ("gold-theme. icon", "openclipart/computer/icons/70a003", ["icon"], "icon"),
        ("czech_republic. europe, lemon theme icon, flag", "x/y", ["flag"], "czech republic. europe, flag"),
        ("Quaver. HASH(0x89fd810). music, recreation", "x/y", [], "Quaver. music, recreation"),
        ("BlueMan#105. people, stickmen", "x/y", [], "BlueMan. people"),
        ("mountain - RPG map elements. mapsym, map symbols", "x/y", ["mapsym"], "mountain"),
        ("Lemon (Half). food, fruit", "x/y", [], "Lemon (Half). food, fruit"),
        ("Heart. A normal heart. holiday", "x/y", [], "Heart. A normal heart. holiday"),
    ],
)  # fmt: skip
def test_captions_are_cleaned_without_losing_words(caption, source, keywords, expected):
    assert clean(caption, source, keywords) == expected
