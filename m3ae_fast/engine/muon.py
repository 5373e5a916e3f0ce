"""The optimiser Muon, which orthogonalises each update of a hidden matrix: Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon, with the scale of Moonlight, arXiv 2502.16982.

Shapes: N matrices, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOMENTUM = "momentum_buffer"  # key in the state, as in torch.optim.Muon
UPDATE_RMS = 0.2  # root mean square of an update's elements at a learning rate of 1; 0.2 is typical of Adam
ITERATIONS = 5
# Jordan's coefficients: the singular values converge to values between 0.68 and 1.14
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPS = 1e-7


class Matrix(NamedTuple):
    """A matrix within a flat buffer."""

    start: int  # first element in the buffer
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        """Return the index after the last element in the buffer."""
        return self.start + self.rows * self.columns


class Part(NamedTuple):
    """The part of a flat buffer of matrices that is stored in one parameter of the optimiser."""

    start: int  # index of the parameter's first element in the buffer
    matrices: list[Matrix]  # matrices that overlap with the parameter
    gather: Callable[[Tensor], Tensor]  # all-gathers a buffer from the parts of all ranks


def orthogonalise(x_NRC: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return approximations of the nearest semi-orthogonal matrices, [N, R, C], computed by Newton-Schulz iterations in
    `dtype` (default: the dtype of `x`), which is also the dtype of the result. The result for a zero matrix is zero."""
    if x_NRC.shape[1] > x_NRC.shape[2]:
        return orthogonalise(x_NRC.mT, dtype).mT
    x_NRC = (x_NRC / (x_NRC.norm(dim=(1, 2), keepdim=True) + _EPS)).to(dtype or x_NRC.dtype)
    for _ in range(ITERATIONS):
        gram_NRR = x_NRC @ x_NRC.mT
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=_B, alpha=_C)
        x_NRC = torch.baddbmm(x_NRC, factor_NRR, x_NRC, beta=_A)
    return x_NRC


def orthogonalisation_flops(stacked: Mapping[Tensor, int]) -> int:
    """Return the FLOPs of the Newton-Schulz iterations of a step. `stacked`: number of equally large matrices that are
    stacked in each parameter. For a matrix of R rows and C >= R columns, an iteration multiplies R x C by C x R, R x R
    by R x R, and R x R by R x C."""
    flops = 0
    for p, number in stacked.items():
        short, long = sorted((p.shape[0] // number, p.shape[1]))
        flops += number * ITERATIONS * 2 * short**2 * (2 * long + short)
    return flops


class Muon(torch.optim.Optimizer):
    """An optimiser that uses Muon for one group of parameters, and another optimiser for all other groups.

    Muon's group has `momentum`, `weight_decay` (decoupled), and `matrices`: the number of equally large matrices that
    are stacked in each parameter. This optimiser shares the group dictionaries and the state of the other optimiser, so
    that both see the flat buffers with which ZeRO replaces parameters; see `shard`.
    """

    def __init__(self, group: dict[str, Any], others: torch.optim.Optimizer, dtype: torch.dtype) -> None:
        """Create the optimiser. `group`: the group that Muon updates; `others`: the optimiser of all other groups;
        `dtype`: dtype of the Newton-Schulz iterations."""
        self.others, self._dtype = others, dtype
        super().__init__([group, *others.param_groups], {"lr": 0.0})
        self.state = others.state
        self._stacked = dict(zip(group["params"], group.pop("matrices")))
        self._parts = {p: Part(0, self._matrices(p, 0), torch.flatten) for p in group["params"]}

    def _matrices(self, p: Tensor, start: int) -> list[Matrix]:
        """Return the matrices of a parameter that begins at element `start` of a buffer."""
        number = self._stacked[p]
        rows, columns = len(p) // number, p.shape[1]
        return [Matrix(start + i * rows * columns, rows, columns) for i in range(number)]

    def shard(self, flat: Tensor, start: int, starts: Mapping[Tensor, int], gather: Callable[[Tensor], Tensor]) -> None:
        """Register `flat` [elements] as this rank's part of a buffer. The part begins at element `start` of the buffer.
        `starts`: the first element of each parameter in the buffer; `gather`: see `Part`."""
        matrices = [matrix for p in self._stacked for matrix in self._matrices(p, starts[p])]
        own = [m for m in matrices if m.start < start + len(flat) and start < m.stop]
        self._parts = {flat: Part(start, own, gather)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters. Every rank must call it if Muon's group is sharded."""
        self.others.param_groups = [group for group in self.param_groups if "momentum" not in group]
        if self.others.param_groups:
            self.others.step()
        for group in self.param_groups:
            if "momentum" in group:
                self._step(group["params"], group["lr"], group["momentum"], group["weight_decay"])

    def _step(self, params: list[Tensor], lr: float, beta: float, weight_decay: float) -> None:
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Matrix, Tensor]]] = {}
        for p in params:
            if p.grad is None:
                continue
            state = self.state[p]
            if MOMENTUM not in state:
                state[MOMENTUM] = torch.zeros_like(p)
            momentum = state[MOMENTUM].lerp_(p.grad, 1 - beta)
            if lr == 0:  # the weights do not change, so no update is computed
                continue
            part = self._parts[p]
            whole = part.gather(torch.lerp(p.grad, momentum, beta))  # Nesterov momentum
            p.mul_(1 - lr * weight_decay)
            for matrix in part.matrices:
                x_RC = whole[matrix.start : matrix.stop].view(matrix.rows, matrix.columns)
                wide_RC = x_RC.mT if matrix.rows > matrix.columns else x_RC
                by_shape.setdefault((len(wide_RC), wide_RC.shape[1]), []).append((p, matrix, wide_RC))
        for (_, columns), members in by_shape.items():
            scale = UPDATE_RMS * math.sqrt(columns)
            stacked_NRC = torch.stack([wide_RC for *_, wide_RC in members])
            for (p, matrix, _), wide_RC in zip(members, orthogonalise(stacked_NRC, self._dtype)):
                update = (wide_RC.mT if matrix.rows > matrix.columns else wide_RC).flatten()
                first = matrix.start - self._parts[p].start  # position of the matrix in the parameter
                begin, end = max(first, 0), min(first + len(update), p.numel())
                p.view(-1)[begin:end].add_(update[begin - first : end - first], alpha=-lr * scale)
