"""Settings of k-nearest-neighbour classification, in evaluations and while a model trains (`train.probe`)."""

from __future__ import annotations

from pydantic import Field

from m3ae_fast.config.section import Section

USUAL_K = 20  # number of neighbours in DINO (arXiv 2104.14294)


class KnnConfig(Section):
    """k-nearest-neighbour classification of frozen features."""

    k: int | None = Field(None, gt=0)
    """Number of neighbours that vote. null: the tasks `knn` and `compare`, and the probe during training, try 1 and 20
    neighbours, each with and without standardised features, and use the combination that is most accurate on held-out
    training samples; in all other tasks, the number is 20, and features are not standardised."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of the votes: a neighbour's vote is exp(cosine similarity / temperature)."""

    @property
    def fixed_k(self) -> int:
        """Return `k`, or the usual number of neighbours if it is null."""
        return self.k or USUAL_K
