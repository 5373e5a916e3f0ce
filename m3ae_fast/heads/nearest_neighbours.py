"""Exact nearest neighbours by cosine similarity. Each rank searches its own samples, and the lists of all ranks are
merged.

The result does not depend on the number of ranks or on block sizes. Candidates are selected by a float32 matrix
product. Their similarities are then computed in float64 and rounded to float32; if two are equal, the sample with the
lower number comes first. If rounding may have excluded a neighbour, because too many samples are about as similar as
the last one, the search for the query is repeated in float64.

Shapes: N samples of the bank, R of them on this rank, Q queries, q of them at a time, B rows of a block, which form
G groups of g rows, K neighbours, C candidates, W ranks, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast.base.progress import track
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.process.collectives import all_gather, all_to_all

_MARGIN = 8  # number of candidates in addition to K
_GROUP = 32  # rows per group; only the groups with the highest maxima are searched row by row
_ROUNDING = 4e-6  # bound on the rounding error of a float32 similarity in practice; the theoretical bound is D * 2e-7
_AT_A_TIME = 16_384  # number of queries, from all ranks, that are processed at a time
_RESCORED = 1 << 23  # number of feature values of candidates that are processed at a time
_MISSING = torch.iinfo(torch.int64).min


class _Blocks(NamedTuple):
    queries: int
    rows: int


_BLOCKS = {"cpu": _Blocks(256, 16_384), "cuda": _Blocks(1024, 65_536)}


class Neighbours(NamedTuple):
    """The most similar samples of a bank for this rank's queries, the most similar first."""

    similarity_QK: Tensor  # float32, on the CPU
    number_QK: Tensor  # int64: numbers of the samples in the bank


def nearest(bank: FeatureBank, queries: FeatureBank, k: int, title: str | None = "k-NN") -> Neighbours:
    """Return the min(k, N) nearest neighbours of each of this rank's queries. Every rank of the bank must call it.
    `title`: title of the progress display; None: progress is not displayed."""
    ranks, device = bank.ranks, bank.ranks.device if bank.ranks else bank.stored_SD.device
    k = min(k, len(bank.keys))
    own = len(queries.own)
    most = own if ranks is None else max(ranks.gather(own))
    found = [torch.empty(0, k, dtype=torch.int64)]
    at_a_time = max(_AT_A_TIME // (ranks.world if ranks else 1), 1)
    for start in range(0, most, at_a_time):
        count = min(most - start, at_a_time)
        part_QD = queries.take(slice(start, start + count)).to(device)
        padded_QD = F.pad(part_QD, (0, 0, 0, count - len(part_QD)))  # this rank may have fewer queries than others
        asked_WQD = all_gather(padded_QD, ranks)
        order_WQK = _own_neighbours(bank, asked_WQD.flatten(0, 1), k, title).view(*asked_WQD.shape[:2], k)
        lists_QC = all_to_all(order_WQK, ranks).transpose(0, 1).flatten(1)
        found.append(lists_QC.topk(k, dim=1).values[: len(part_QD)].cpu())
    return Neighbours(*_decoded(torch.cat(found)))


def _own_neighbours(bank: FeatureBank, queries_QD: Tensor, k: int, title: str | None) -> Tensor:
    """Return the k nearest of this rank's samples for each query, as codes of `_encoded`, best first: int64 [Q, k]."""
    unit_QD = F.normalize(queries_QD.float(), dim=1)
    similarity_QC, place_QC = _candidates(bank, unit_QD, k + _MARGIN, title)
    order_QK = torch.full((len(unit_QD), k), _MISSING, device=unit_QD.device)
    if not len(bank.own):
        return order_QK
    own_R = bank.own.to(unit_QD.device)
    at_a_time = max(_RESCORED // (place_QC.shape[1] * unit_QD.shape[1]), 1)
    for first in range(0, len(unit_QD), at_a_time):
        part = slice(first, first + at_a_time)
        place_qC = place_QC[part].clamp(min=0)
        rows_qCD = bank.take(place_qC.flatten().cpu()).to(unit_QD.device).double().view(*place_qC.shape, -1)
        query_qD = F.normalize(queries_QD[part].double(), dim=1)
        length_qC = torch.linalg.vector_norm(rows_qCD, dim=2).clamp(min=1e-12)
        exact_qC = (rows_qCD @ query_qD[..., None])[..., 0] / length_qC
        order_qC = _encoded(exact_qC, own_R[place_qC]).masked_fill(place_QC[part] < 0, _MISSING)
        order_QK[part] = order_qC.topk(k, dim=1).values
    # A list of k neighbours is uncertain if an excluded sample may be as similar as the list's last neighbour.
    unsure_Q = (place_QC[:, -1] >= 0) & (similarity_QC[:, -1] >= similarity_QC[:, k - 1] - _ROUNDING)
    if unsure_Q.any():
        order_QK[unsure_Q] = _searched_exactly(
            bank, queries_QD[unsure_Q], k, title and f"{title}, ordering equally similar samples"
        )
    return order_QK


def _candidates(bank: FeatureBank, unit_QD: Tensor, count: int, title: str | None) -> tuple[Tensor, Tensor]:
    """Return the similarities and the indices of this rank's samples with the highest float32 similarity to each query,
    best first: [Q, C] each. The index is -1 if this rank has fewer samples."""
    similarity_QC = unit_QD.new_full((len(unit_QD), count), -torch.inf)
    place_QC = torch.full_like(similarity_QC, -1, dtype=torch.int64)
    at_a_time = _BLOCKS[unit_QD.device.type].queries
    for start, block_BD in _blocks(bank, unit_QD.device, title):
        unit_BD = F.normalize(block_BD.float(), dim=1)
        for first in range(0, len(unit_QD), at_a_time):
            part = slice(first, first + at_a_time)
            best_qC, best_at_qC = _best_of_block(unit_QD[part] @ unit_BD.T, count)
            both_q = torch.cat((similarity_QC[part], best_qC), 1)
            places_q = torch.cat((place_QC[part], best_at_qC + start), 1)
            similarity_QC[part], at_qC = both_q.topk(count, dim=1)
            place_QC[part] = places_q.gather(1, at_qC)
    return similarity_QC, place_QC


def _best_of_block(similarity_qB: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` highest similarities in a block (fewer if the block is smaller) and their indices, in any
    order.

    The highest similarities are in the groups with the highest maxima, so only these groups are searched. The maxima
    are computed in one pass over the memory.
    """
    queries, rows = similarity_qB.shape
    groups = rows // _GROUP
    if groups < 4 * count:
        return similarity_qB.topk(min(count, rows), dim=1)
    whole_qGg = similarity_qB[:, : groups * _GROUP].view(queries, groups, _GROUP)
    best_qC = whole_qGg.amax(2).topk(count, dim=1).indices
    within = torch.arange(_GROUP, device=similarity_qB.device)
    place_qc = torch.cat(
        (
            (best_qC[..., None] * _GROUP + within).flatten(1),
            torch.arange(groups * _GROUP, rows, device=similarity_qB.device).expand(queries, -1),
        ),
        1,
    )
    best_qC, at_qC = similarity_qB.gather(1, place_qc).topk(count, dim=1)
    return best_qC, place_qc.gather(1, at_qC)


def _blocks(bank: FeatureBank, device: torch.device, title: str | None) -> Iterator[tuple[int, Tensor]]:
    """Yield this rank's features in blocks on the device, each with the index of its first row."""
    rows, size = len(bank.own), _BLOCKS[device.type].rows
    for start in track(range(0, rows, size), title or "", show=title is not None):
        yield start, bank.take(slice(start, min(start + size, rows))).to(device)


def _searched_exactly(bank: FeatureBank, queries_QD: Tensor, k: int, title: str | None) -> Tensor:
    """Return the same result as `_own_neighbours`, with all similarities computed in float64."""
    device, own_R = queries_QD.device, bank.own.to(queries_QD.device)
    at_a_time = _BLOCKS[device.type].queries
    unit_QD = F.normalize(queries_QD.double(), dim=1)
    order_QK = torch.full((len(unit_QD), k), _MISSING, device=device)
    for start, block_BD in _blocks(bank, device, title):
        unit_BD, number_B = F.normalize(block_BD.double(), dim=1), own_R[start : start + len(block_BD)]
        for first in range(0, len(unit_QD), at_a_time):
            part = slice(first, first + at_a_time)
            order_qB = _encoded(unit_QD[part] @ unit_BD.T, number_B)
            order_QK[part] = torch.cat((order_QK[part], order_qB), 1).topk(k, dim=1).values
    return order_QK


def _encoded(similarity: Tensor, number: Tensor) -> Tensor:
    """Return int64 codes of pairs of similarity (float32) and sample number. A code is larger if the similarity is
    higher or, for equal similarities, if the number is lower."""
    bits = (similarity.float() + 0.0).view(torch.int32).long()  # + 0.0 converts -0 to 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFF_FFFF, bits)
    return (ordered << 32) + (0xFFFF_FFFF - number)


def _decoded(order: Tensor) -> tuple[Tensor, Tensor]:
    """Return the similarities and numbers in the codes of `_encoded`."""
    ordered = order >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFF_FFFF, ordered).int()
    return bits.view(torch.float32), 0xFFFF_FFFF - (order & 0xFFFF_FFFF)
