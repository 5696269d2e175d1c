"""Weights that are hard to round, moments of correlated inputs, and the output error of a rounding."""

import torch

from planish.compiler.learn.rounding.row_errors import row_errors

__all__ = ["error", "moment", "weights"]


def moment(n: int, seed: int, tokens: int = 400) -> torch.Tensor:
    """Return E[x^T x] of inputs that follow a few common causes, channels of different size, float64 [n, n]."""
    causes = torch.randn(n // 4, n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n // 4, generator=generator, dtype=torch.float64) @ causes
    x = (x + torch.randn(tokens, n, generator=generator, dtype=torch.float64)) * torch.linspace(0.2, 3, n).exp()
    return x.T @ x / tokens


def weights(rows: int, n: int) -> torch.Tensor:
    """Return heavy-tailed weights, float32 [rows, n]."""
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(5)) ** 3


def error(weight: torch.Tensor, rounded: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Return the output error of every row, float64 [rows]."""
    return row_errors((weight - rounded).double(), H)
