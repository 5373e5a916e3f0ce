"""A feature bank gives the same results for any distribution of its rows over ranks and devices."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m3ae_fast.base.errors import UserError
from m3ae_fast.heads import feature_bank, nearest_neighbours
from m3ae_fast.heads.feature_bank import FeatureBank, Rows, storage
from m3ae_fast.heads.nearest_neighbours import nearest
from m3ae_fast.process.ranks import join_ranks
from tests.helpers import bank_cases
from tests.helpers.ranks import run_ranks


def _by_a_sort(bank_ND, queries_MD, k):
    """Return the similarities and row numbers of the k nearest neighbours; equal similarities are in the order of the
    rows."""
    similarity_MN = (F.normalize(queries_MD.double(), dim=1) @ F.normalize(bank_ND.double(), dim=1).T).float()
    similarity_MN, number_MN = similarity_MN.sort(dim=1, descending=True, stable=True)
    return similarity_MN[:, :k], number_MN[:, :k]


def _bank(features):
    return FeatureBank([""] * len(features), features, None)


@pytest.mark.parametrize(("samples", "width", "k"), [(3003, 16, 20), (211, 6, 7), (9, 4, 20)])
@pytest.mark.parametrize("equal", [False, True])
def test_neighbours_equal_those_of_a_stable_sort(monkeypatch, samples, width, k, equal):
    """Samples are searched in blocks, which are divided into groups. The last block and the last group are incomplete.
    There may be more equally similar samples than the list of candidates can hold."""
    monkeypatch.setitem(nearest_neighbours._BLOCKS, "cpu", nearest_neighbours._Blocks(16, 2048))
    monkeypatch.setattr(nearest_neighbours, "_GROUP", 4)
    monkeypatch.setattr(nearest_neighbours, "_AT_A_TIME", 50)
    monkeypatch.setattr(nearest_neighbours, "_RESCORED", 1000)
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(count, width, generator=generator) for count in (samples, 70))
    if equal:
        bank[::2] = bank[0]
    similarity, number = _by_a_sort(bank, queries, k)
    found = nearest(_bank(bank), _bank(queries), k)
    assert torch.equal(found.similarity_QK, similarity) and torch.equal(found.number_QK, number)
    rows = [*range(1, samples, 3)]
    some = nearest(_bank(bank).rows(rows), _bank(queries), k)
    assert torch.equal(some.number_QK, _by_a_sort(bank[rows], queries, k)[1])


@pytest.mark.slow
def test_neighbours_do_not_depend_on_the_number_of_ranks(tmp_path):
    """Neighbours, votes, scores and trained heads are the same for banks that are split over ranks."""
    alone = bank_cases.found(None)
    with join_ranks() as ranks:
        segments = bank_cases.segmented(ranks)
        heads = bank_cases.heads(ranks)
    assert torch.equal(alone["number"], _by_a_sort(*(bank_cases.features(*of)[0] for of in ((211, 0), (61, 1))), 20)[1])
    for count in (2, 3):
        code, output = run_ranks("tests.helpers.bank_cases", [str(tmp_path / "found.pt")], count, tmp_path / "log")
        assert code == 0, output
        each = torch.load(tmp_path / "found.pt", weights_only=False)
        assert len(each) == count
        for found in each:
            for name in ("similarity", "number", "standard", "best", "scores", "rows"):
                assert torch.equal(found[name], alone[name]), name
            assert found["keys"] == alone["keys"]
            for name, expected in heads.items():
                torch.testing.assert_close(found["heads"][name], expected, rtol=1e-3, atol=1e-4, msg=name)
            for name, scores in alone["ood"].items():
                # logistic regression has larger rounding errors
                rounding = 1e-6 if name in ("knn", "mahalanobis") else 1e-3
                np.testing.assert_allclose(found["ood"][name], scores, rtol=rounding, atol=rounding)
            for name, scores in alone["regressions"].items():
                torch.testing.assert_close(found["regressions"][name], scores, rtol=1e-3, atol=1e-3)
            for name, scores in segments.items():
                torch.testing.assert_close(found[name], scores, rtol=1e-4, atol=1e-4)


def test_feature_rows_are_views_until_they_are_read():
    bank = FeatureBank([*"abcdef"], torch.arange(12.0).view(6, 2), torch.arange(6))
    some = bank.rows([1, 3, 4]).rows([0, 2])
    assert some.keys == ["b", "e"] and some.labels.tolist() == [1, 4]
    assert some.stored_SD is bank.stored_SD and some.features_RD.tolist() == [[2, 3], [8, 9]]
    assert some.take(slice(1, 9)).tolist() == [[8, 9]] and some.gathered().stored_SD.tolist() == [[2, 3], [8, 9]]


def test_features_are_stored_in_the_first_storage_with_room_for_all_ranks_of_a_node(monkeypatch, tmp_path):
    free = {"cuda": 100, "cpu": 300}
    lacking = lambda needed, device: "" if needed < free[device.type] else f"{needed} of {free[device.type]}"  # noqa: E731
    monkeypatch.setattr(feature_bank, "missing_memory", lacking)
    monkeypatch.setattr(feature_bank.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [storage(needed, gpu, 4) for needed in (40, 60, 80)] == ["device", "host", "file"]
    assert [storage(needed, cpu, 4) for needed in (40, 80)] == ["host", "file"]
    with pytest.raises(UserError, match=f"the features fit neither into memory .* nor into a file in {tmp_path} "):
        storage(250, gpu, 4, tmp_path)


def test_a_non_finite_feature_on_any_rank_is_named():
    ranks = SimpleNamespace(gather=lambda own: [[], own])
    features = torch.tensor([[1.0], [torch.nan]])
    bank = FeatureBank([*"abcd"], features, None, own_R=torch.tensor([1, 3]), ranks=ranks)
    with pytest.raises(UserError, match=r"1 of 4 samples \(for example, d\) have features that are not finite;"):
        bank.check_finite()


def test_storage_is_chosen_for_the_features_of_all_models_that_follow(monkeypatch, tmp_path):
    """The tensors of all models are allocated before they are filled, and allocated memory counts as free until it is
    written. The size of each tensor is therefore multiplied by the number of tensors that are still to be allocated."""
    asked = []
    monkeypatch.setattr(feature_bank, "storage", lambda *given: asked.append(given) or "host")
    cpu = torch.device("cpu")
    ranks = SimpleNamespace(device=cpu, of_node=[4, 5, 6], world=7, together=lambda work: work())
    for to_come in (3, 2, 1):
        Rows(9, ranks, tmp_path, to_come).append(torch.zeros(2, 5))
    assert asked == [(parts * 9 * 5 * 4, cpu, 3, tmp_path) for parts in (3, 2, 1)]  # three ranks are on this node


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_stored_in_a_file_are_unchanged_and_the_file_is_removed(monkeypatch, tmp_path, dtype):
    folders, real = [], feature_bank.tempfile.TemporaryFile
    monkeypatch.setattr(feature_bank, "storage", lambda *given: "file")
    monkeypatch.setattr(
        feature_bank.tempfile,
        "TemporaryFile",
        lambda dir: folders.append(dir) or real(dir=dir),  # `dir` must be the output folder
    )
    parts = [torch.randn(count, 3, 2).to(dtype) for count in (4, 0, 3)]
    with join_ranks() as ranks:
        rows = Rows(9, ranks, tmp_path)
        for part in parts:
            rows.append(part)
    assert torch.equal(rows.tensor(), torch.cat(parts)) and not [*tmp_path.iterdir()] and folders == [tmp_path]
