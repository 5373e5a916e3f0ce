"""Words that this project used privately stay out of texts, messages and identifiers: the field has terms for them."""

import re

import pytest

from tests.helpers.trainer import ROOT

# private word or phrase, as a pattern -> the term of the field. Identifiers are split into words first.
TERMS = {
    r"told apart|(tell|tells|telling) (\w+ ){0,3}apart": "significantly different",
    r"yardsticks?": "baseline",
    r"strange|familiar": "out-of-distribution, in-distribution",
    r"likeness": "cosine similarity",
    r"by heart": "overfits",
    r"comes? to|came to": "reaches",
    r"(made|makes?|make) again": "recomputed",
    r"signs? of life": "heartbeat",
    r"(stands?|stood) still": "stalls",
    r"without end": "infinite",
    r"hops": "sequential communication steps",
    r"remembers?": "is saved with the model",
    r"seen whole": "not cropped",
    r"whole or not there": "complete, or written atomically",
    r"in the way": "safeguard",
    r"(makes?|made) room": "is evicted",
    r"heeds?|heeding|heeded": "handles",
    r"remed(y|ies)": "suggested fix",
    r"slips?": "mutant",
    r"without a word": "silently",
    r"nothing reads": "ignored files",
    r"beside": "compared with, alongside, next to",
    r"anew": "again",
    r"likewise": "in the same way",
    r"pulses?": "heartbeat",
    r"rungs?": "model size",
    r"cautions?": "warning",
    r"(?<!alibi )slopes?": "gradient, derivative",
    r"settle[sd]?|settling": "resolved, configured",
    r"errors? of one line": "one-line error",
    r"must rise": "must increase",
    r"(is|are) (said|told)": "is printed, is reported",
    r"what is (black|white)": "the values of black and white",
    r"trained on too": "also used for training",
    r"(?<!there )(is|are) no (image|number|multiple|list|model|text|array|file|folder)s?": "is not a",
    r"half written": "incomplete",
    r"(here|there|where)(of|in|to|by|upon)|forthwith|notwithstanding|for want of|insofar|whichever": "plain words",
    r"(is|are) (called .{1,40}) now": "has been renamed to",
}
PRIVATE = re.compile("|".join(rf"(?P<t{i}>\b(?:{pattern})\b)" for i, pattern in enumerate(TERMS)), re.IGNORECASE)
FOLDERS = ("m3ae_fast", "kernels", "lab", "benchmarks", "examples", "docs", "configs")
KINDS = {".py", ".md", ".sh", ".ipynb", ".json", ".yaml", ".sbatch", ".c", ".h", ".cpp"}
MEASURED = {".json", ".ipynb"}  # files of these types are not read in folders of results
# words that are part of results: a former key, and a key that existing files have
FORMER = {
    "CHANGELOG.md": ["told apart"],
    "docs/guide/evaluating.md": ["cautions"],
    "docs/guide/evaluation-results.md": ["cautions"],
    "m3ae_fast/evaluation/job.py": ["cautions"],
}
# names of classes, functions and constants that the field's terms have replaced, in tests too
NAMES = "Facts Found Ladder Live Look Not(Here|There) Pulse Rung SoFar Standby Tried Watch Work LADDER".replace(
    " ", "|"
)
DEFINED = re.compile(rf"^[ \t]*(?:(?:class|def) ({NAMES})\b|({NAMES})\b[^\n]* = )", re.MULTILINE)


def read_by_users():
    """Yield each text file of the project, except tests, and the documents in its root."""
    yield from sorted(ROOT.glob("*.md"))
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            place = path.relative_to(ROOT).parts
            if path.suffix in KINDS and "tests" not in place and not (path.suffix in MEASURED and "results" in place):
                yield path


def words_of(text: str) -> str:
    """Return a text whose identifiers are split into words: `made_again`, `madeAgain` -> "made again"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text.replace("_", " "))


def private_words(text: str) -> list[str]:
    """Return "word: term" for each private word of a text."""
    text = re.sub(r"\s+", " ", words_of(text))
    terms = [*TERMS.values()]
    return [f"{found[0].lower()}: {terms[int((found.lastgroup or '')[1:])]}" for found in PRIVATE.finditer(text)]


@pytest.mark.parametrize(
    "text, word",
    [
        ("def told_apart(first):", "told apart"),
        ("class SignOfLife:", "sign of life"),
        ('raise UserError("files beside\n    the shards")', "beside"),
        ("**Strange** samples", "strange"),
        ("an array that is no image", "is no image"),
        ("the section thereof", "thereof"),
    ],
)
def test_private_words_are_found_in_identifiers_messages_and_prose(text, word):
    (found,) = private_words(text)
    assert found.startswith(f"{word}: ")


def test_an_absence_is_not_a_private_word():
    assert private_words("there is no image, and there are no texts") == []


def test_texts_do_not_contain_private_words():
    found, seen = {}, set()
    for path in read_by_users():
        name = str(path.relative_to(ROOT))
        seen.add(path.suffix)
        words = private_words(f"{name} {path.read_text(encoding='utf-8')}")
        if rest := [word for word in words if word.partition(":")[0] not in FORMER.get(name, [])]:
            found[name] = rest
    assert {".py", ".md", ".json", ".sh"} <= seen
    assert found == {}


def test_definitions_do_not_have_private_names():
    assert (
        DEFINED.search("class Pulse:") and DEFINED.search("LADDER: tuple = ()") and not DEFINED.search("    Found(1)")
    )
    found = {}
    for folder in (*FOLDERS, "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if names := [match[0].strip() for match in DEFINED.finditer(path.read_text(encoding="utf-8"))]:
                found[str(path.relative_to(ROOT))] = names
    assert found == {}
