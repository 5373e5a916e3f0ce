import re
from dataclasses import replace

import pytest
import torch

from m3ae_fast.base.errors import UserError
from m3ae_fast.evaluation import retrieval
from m3ae_fast.evaluation.feature_bank import FeatureBank
from m3ae_fast.evaluation.retrieval import own_ranks, recalls
from tests.evaluation.conftest import figure_names
from tests.helpers.shards import members, write_tar

pytestmark = pytest.mark.slow


def _bank(features):
    return FeatureBank([""] * len(features), features, None)


def test_recalls_equal_those_of_sorted_cosine_similarities():
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randn(600, 6, generator=generator)
    queries = candidates + torch.randn(600, 6, generator=generator)
    found = recalls(own_ranks(_bank(queries), _bank(candidates)))
    order = torch.cosine_similarity(queries[:, None], candidates[None], dim=2).argsort(1, descending=True)
    for k in (1, 5, 10):
        expected = (order[:, :k] == torch.arange(600)[:, None]).any(1).double().mean().item()
        assert found[k] == pytest.approx(expected, abs=2 / 600)
    assert 0.05 < found[1] < found[5] < found[10] < 1


def test_identical_features_have_a_recall_of_0():
    assert set(recalls(own_ranks(_bank(torch.ones(20, 3)), _bank(torch.ones(20, 3)))).values()) == {0.0}
    assert set(recalls(own_ranks(_bank(torch.eye(3)), _bank(torch.eye(3)))).values()) == {1.0}


def test_recalls_are_reported_from_image_to_text_and_from_text_to_image(transfer, shards, tmp_path):
    result = transfer("retrieval", train=None)
    assert (result["pairs"], result["skipped"], result["chance_recall1"]) == (18, 0, 1 / 18)
    assert figure_names(tmp_path / "out") == ["image_to_text", "text_to_image"]
    for way in ("image_to_text", "text_to_image"):
        shares = [result[f"{way}_recall{k}"] for k in (1, 5, 10)]
        assert shares == sorted(shares) and 0 <= shares[0] <= shares[-1] <= 1


def test_progress_is_printed(transfer, capsys):
    transfer("retrieval", train=None)
    output = capsys.readouterr().out
    assert re.search(r"encoding images: 18 samples done \(50% of the encoding, about \d:\d\d:\d\d left\)", output)
    assert "encoding texts: 18 samples done (100% of the encoding)\n" in output


def test_a_sample_without_image_or_caption_is_left_out(transfer, tmp_path):
    files = dict(members(range(9)))
    del files["00003.txt"]
    files["00005.jpg"] = b"broken"
    result = transfer(
        "retrieval", "--set", "data.max_bad_fraction=0.5", train=None, val=write_tar(tmp_path / "a.tar", files.items())
    )
    assert (result["pairs"], result["skipped"]) == (7, 2)
    assert [result[f"chance_recall{k}"] for k in (1, 5, 10)] == [1 / 7, 5 / 7, 1]
    with pytest.raises(UserError, match="1 samples of --val have an image and a caption"):
        one = write_tar(tmp_path / "one.tar", members(range(1)))
        transfer("retrieval", train=None, val=one, out="one")


def test_samples_with_the_same_key_are_refused(transfer, tmp_path):
    twice = write_tar(tmp_path / "a.tar", [*members(range(3)), *members(range(1, 2))])
    with pytest.raises(UserError, match=r"two samples have the key .*a\.tar/00001; specify each shard only once"):
        transfer("retrieval", train=None, val=twice)


def test_a_result_at_chance_level_is_reported_as_such(transfer, monkeypatch, capsys):
    given = {"image": torch.eye(18), "text": torch.eye(18).roll(1, 0)}  # each is most like another's
    real = retrieval._encode

    def encode(job, pairs):
        return tuple(replace(part, stored_SD=given[kind]) for kind, part in zip(given, real(job, pairs)))

    monkeypatch.setattr(retrieval, "_encode", encode)
    monkeypatch.setattr(retrieval, "_draw", lambda *_: None)
    result = transfer("retrieval", train=None)
    assert retrieval.at_chance(result)
    output = capsys.readouterr().out
    assert "not to align the embeddings of captions and images" in output
    assert (
        "the images and the captions of 18 samples are encoded" in output
        and "text_to_image: text_to_image_recall1 " in output
    )
    given["text"] = torch.eye(18)
    assert not retrieval.at_chance(transfer("retrieval", train=None, out="found"))
    assert "no alignment" not in capsys.readouterr().out


def test_a_recall_is_above_chance_if_it_exceeds_chance_by_two_standard_errors():
    chance = {k: k / 100 for k in retrieval.RANKS}
    result = {"pairs": 100} | {f"chance_recall{k}": share for k, share in chance.items()}
    result |= {f"{way}_recall{k}": chance[k] for way in ("image_to_text", "text_to_image") for k in chance}
    assert retrieval.at_chance(result)
    for way in ("image_to_text", "text_to_image"):
        for k, share in chance.items():
            error = (share * (1 - share) / 100) ** 0.5
            for errors, at_chance in ((1.9, True), (2.1, False)):
                assert retrieval.at_chance(result | {f"{way}_recall{k}": share + errors * error}) == at_chance


def test_queries_and_candidates_are_those_that_the_direction_names(transfer, monkeypatch):
    """The expected ranks are computed by hand: image i is the unit vector e_i. Six captions equal their images; each
    other caption is twice as similar to image 0 as to its own image, to which no other caption is similar."""
    own = torch.eye(18)
    captions = own.clone()
    captions[6:] = own[0] + own[6:] / 2
    given = {"image": own, "text": captions * (1 + torch.arange(18))[:, None]}  # the lengths of features have no effect
    real = retrieval._encode

    def encode(job, pairs):
        return tuple(replace(part, stored_SD=given[kind]) for kind, part in zip(given, real(job, pairs)))

    monkeypatch.setattr(retrieval, "_encode", encode)
    monkeypatch.setattr(retrieval, "_draw", lambda *_: None)
    result = transfer("retrieval", train=None)
    assert [result[f"image_to_text_recall{k}"] for k in (1, 5, 10)] == [1, 1, 1]
    assert [result[f"text_to_image_recall{k}"] for k in (1, 5, 10)] == [6 / 18, 1, 1]
    assert [result[f"chance_recall{k}"] for k in (1, 5, 10)] == [1 / 18, 5 / 18, 10 / 18]
