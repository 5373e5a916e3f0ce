"""A program that searches feature banks, which are split over ranks, and trains on them. `main([FILE])` saves the
results on rank 0."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from m3ae_fast.config.evaluation import EvaluationConfig
from m3ae_fast.evaluation.ood import Scores
from m3ae_fast.evaluation.segment import Images, Neighbours, fit
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.fit_heads import logits
from m3ae_fast.heads.knn import knn_scores
from m3ae_fast.heads.logistic_regression import fit_chosen
from m3ae_fast.heads.nearest_neighbours import nearest
from m3ae_fast.heads.probes import train_heads
from m3ae_fast.heads.recipe import Recipe
from m3ae_fast.process.ranks import Ranks, join_ranks

SAMPLES, QUERIES, WIDTH, CLASSES = 211, 61, 6, 3


def features(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random features, some of which are equal, and labels."""
    generator = torch.Generator().manual_seed(seed)
    features_ND = torch.randn(count, WIDTH, generator=generator)
    features_ND[::3] = features_ND[0]  # more equal features than a list of candidates can hold
    features_ND[1::17] *= 3  # the norm must not matter
    return features_ND, torch.randint(0, CLASSES, (count,), generator=generator)


def split(features_ND: Tensor, labels_N: Tensor | None, ranks: Ranks | None, batch: int = 5) -> FeatureBank:
    """Return a bank whose batches are distributed over the ranks in turn."""
    keys = [f"a.tar/{number:05d}" for number in range(len(features_ND))]
    if ranks is None:
        return FeatureBank(keys, features_ND, labels_N)
    own_R = torch.arange(len(keys))
    own_R = own_R[own_R // batch % ranks.world == ranks.rank]
    return FeatureBank(keys, features_ND[own_R], labels_N, own_R=own_R, ranks=ranks)


def found(ranks: Ranks | None) -> dict[str, object]:
    """Return the results, which must be the same on every rank."""
    bank, queries = split(*features(SAMPLES, 0), ranks), split(*features(QUERIES, 1), ranks, batch=7)
    few = bank.rows([*range(0, SAMPLES, 2)])
    near = nearest(bank, queries, 20)
    predictions = queries.predictions(knn_scores(few, queries, CLASSES, 5, 0.07), votes=True)
    return {
        "similarity": queries.complete(near.similarity_QK),
        "number": queries.complete(near.number_QK),
        "standard": torch.stack([*bank.measured()]),
        "keys": predictions.keys,
        "best": predictions.best_NK,
        "scores": predictions.scores_N,
        "ood": Scores(bank, 4)(queries),
        "regressions": regressions(bank, queries),
        "rows": few.gathered().stored_SD,
    }


def regressions(bank: FeatureBank, queries: FeatureBank) -> dict[str, Tensor]:
    """Return the scores of logistic regressions on single labels and on lists of labels."""
    lists_NC = torch.stack((bank.labels == 0, bank.labels < 2, bank.labels < 0), 1)
    heads = {
        "chosen": fit_chosen(bank, CLASSES)[0],
        "one class": fit_chosen(replace(bank, labels_N=0 * bank.labels), 1)[0],
        "lists": fit_chosen(replace(bank, labels_N=lists_NC), 3)[0],
    }
    return {name: queries.complete(logits(head, queries)) for name, head in heads.items()}


def segmented(ranks: Ranks) -> dict[str, Tensor]:
    """Return the scores of both segmentation heads for held-out patches."""
    parts = []
    for seed, count in ((3, 24), (4, 9)):
        generator = torch.Generator().manual_seed(seed)
        patches_NLD = torch.randn(count, 16, WIDTH, generator=generator).half()
        masks_NSS = torch.randint(CLASSES, (count, 8, 8), generator=generator).to(torch.uint8)
        masks_NSS[0] = 255  # ignored
        bank = split(patches_NLD, torch.arange(count), ranks, batch=2)
        parts.append(Images(bank, masks_NSS[bank.own]))
    train, held_out = parts
    whole = config(segment={"steps": 20, "batch": 7, "bank_patches": 50})
    job = SimpleNamespace(ranks=ranks, config=whole, heartbeats=SimpleNamespace(mark=lambda what: None))
    heads = {
        "linear patches": fit(train, CLASSES, whole.segment, job),
        "patches by neighbours": Neighbours(train, CLASSES, job),
    }
    return {name: held_out.bank.complete(head(held_out.bank.stored_SD.float())) for name, head in heads.items()}


def heads(ranks: Ranks) -> dict[str, object]:
    """Return the results and the training accuracies of linear and attentive heads that are trained on two layers of a
    bank."""
    layers = torch.stack([features(SAMPLES, seed)[0] for seed in (0, 1)], 1)  # [N, 2, D]
    tokens = torch.stack((layers, layers.flip(2), 2 * layers), 2)  # [N, 2, L, D]
    labels_N = features(SAMPLES, 0)[1]
    reached: dict[str, object] = {}
    whole = config(attentive={"steps": 30, "weight_decay": 0.01, "batch": 64})
    recipe = Recipe.of("attentive", whole, classes=CLASSES, samples=SAMPLES, encoder_heads=2, seed=5)
    banks = {
        number: split(features_ND, labels_N, ranks).part(number // 2)
        for number, features_ND in enumerate((layers, tokens, layers, tokens))
    }
    for name, trained in train_heads(banks, recipe, ranks, _Heartbeats()).items():
        reached[f"{type(trained.heads).__name__}, layer {name // 2}"] = {
            "weights": trained.heads.state_dict(),
            "accuracies": trained.accuracies,
            "tried": trained.tried,
            "logits": banks[name].complete(logits(trained.heads, banks[name])),
        }
    return reached


class _Heartbeats:
    def mark(self, doing: str) -> None:
        pass


def config(**sections: object) -> EvaluationConfig:
    """Return the config of an evaluation."""
    return EvaluationConfig.model_validate({"data": {"train": [{"shards": "x"}]}, **sections})


def main(arguments: list[str]) -> int:
    """Run the program."""
    with join_ranks() as ranks:
        each = ranks.gather(found(ranks) | segmented(ranks) | {"heads": heads(ranks)})
        if ranks.is_main:
            torch.save(each, arguments[0])
    return 0
