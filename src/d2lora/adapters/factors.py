"""Linear algebra of LoRA's two factors. Pure functions; nothing is ever multiplied out.

Shapes: A (r, in), B (out, r). The update of a layer is `scale * B A`; scale is kept by the caller.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The factors of one layer's update."""

    a: Tensor
    b: Tensor


class Truncated(NamedTuple):
    """Factors of a lower rank and the share of the update's energy that they keep."""

    factors: Factors
    energy_kept: float


def experts_apart(factors: Factors, rank: int) -> list[Factors]:
    """Return the factors of each expert of a stack, as PEFT lays them out.

    The rows of A go through one expert after another, the columns of B through all experts of one
    direction after another.

    Args:
        factors: A (experts x rank, in), B (out, rank x experts).
        rank: The rank of each expert's update.
    """
    a = factors.a.reshape(-1, rank, factors.a.shape[1])
    b = factors.b.reshape(len(factors.b), rank, len(a))
    return [Factors(one, b[:, :, n]) for n, one in enumerate(a)]


def singular_values(factors: Factors) -> Tensor:
    """Return the r singular values of B A, largest first, in float64.

    QR of both factors leaves a core of r x r with the same singular values: O((in + out) r^2)
    instead of O(in out r) for the dense product.
    """
    _, core, _ = _orthogonal(factors)
    return torch.linalg.svdvals(core)


def truncate(factors: Factors, rank: int) -> Truncated:
    """Return the best approximation of B A of a lower rank (Eckart and Young 1936).

    The ratio of the norms of B and A stays as it was, so that a learning rate keeps its meaning.

    Args:
        factors: The factors, of any rank of at least `rank`.
        rank: The rank to keep.
    """
    q_b, core, q_a = _orthogonal(factors)
    u, s, vt = torch.linalg.svd(core)
    root = s[:rank].sqrt()
    b, a = (q_b @ u[:, :rank]) * root, root[:, None] * (vt[:rank] @ q_a.T)
    balance = _balance(factors)
    dtype = factors.a.dtype
    total = float(s.square().sum())
    kept = float(s[:rank].square().sum()) / total if total > 0 else 1.0
    return Truncated(Factors((a / balance).to(dtype), (b * balance).to(dtype)), kept)


def extend(factors: Factors, rank: int, generator: torch.Generator) -> Factors:
    """Return factors of a higher rank with the same product.

    New directions are initialized as in a fresh adapter: Kaiming-uniform A, zero B; so they train.

    Args:
        factors: The factors, of a rank of at most `rank`.
        rank: The new rank.
        generator: Source of the new rows of A.
    """
    n_new, n_in = rank - len(factors.a), factors.a.shape[1]
    bound = 1 / math.sqrt(n_in)  # kaiming_uniform_ with a = sqrt(5), as PEFT's own A
    new_a = torch.empty(n_new, n_in).uniform_(-bound, bound, generator=generator)
    new_b = torch.zeros(len(factors.b), n_new, dtype=factors.b.dtype)
    a = torch.cat([factors.a, new_a.to(factors.a.dtype)])
    return Factors(a, torch.cat([factors.b, new_b], dim=1))


def _orthogonal(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q_b, core, Q_a with B A = Q_b core Q_a', in float64."""
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    return q_b, r_b @ r_a.T, q_a


def _balance(factors: Factors) -> float:
    """Return the square root of |B| / |A|; 1 where one of them is zero."""
    norms = [float(torch.linalg.norm(factor.double())) for factor in (factors.b, factors.a)]
    return math.sqrt(norms[0] / norms[1]) if min(norms) > 0 else 1.0


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of normalised singular values (Roy and Vetterli 2007).

    1 for one direction, r for r equal ones, 0 for none.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def inner_product(first: Factors, second: Factors) -> float:
    """Return the Frobenius inner product of B1 A1 and B2 A2, through r1 x r2 matrices only."""
    b = first.b.double().T @ second.b.double()
    a = first.a.double() @ second.a.double().T
    return float((b * a).sum())


def subspace_overlap(first: Factors, second: Factors) -> float:
    """Return how much of the smaller output space lies in the larger one, 0 to 1.

    |U1' U2|^2 / min(r1, r2) over left singular vectors (Hu et al. 2021, section 7.2); a
    direction counts where its singular value is not zero. 0 where an update is zero.
    """
    bases = [_left_vectors(factors) for factors in (first, second)]
    smaller = min(basis.shape[1] for basis in bases)
    if smaller == 0:
        return 0.0
    return float((bases[0].T @ bases[1]).square().sum()) / smaller


def _left_vectors(factors: Factors) -> Tensor:
    q_b, core, _ = _orthogonal(factors)
    u, s, _ = torch.linalg.svd(core)
    return q_b @ u[:, s > s.max() * 1e-10] if s.max() > 0 else q_b[:, :0]
