"""The error that a channel scale in front of a Hadamard rotation leaves at the output of a rounded linear."""

import dataclasses

import torch
from torch import Tensor

from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.quantize.arithmetic import low_bit_linear, quantize_weight
from planish.passes.scheme import LinearFormat

__all__ = ["OutputError", "Tokens", "output_errors", "summed_up"]

#: Tokens that are worked on at a time; bounds the memory of what is computed from them.
_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Inputs of a linear and what it makes of them in floating point.

    Attributes:
        x: float32 [tokens, n].
        y: float32 [tokens, out].
        weights: what each token counts, float32 [tokens].
        first: whether it is the first of its sequence, bool [tokens].
    """

    x: Tensor
    y: Tensor
    weights: Tensor
    first: Tensor

    @classmethod
    def of(cls, inputs: Tensor, weight: Tensor, weights: Tensor) -> "Tokens":
        """Take in sequences [sequences, seq, n], the float weight [out, n], and weights [sequences, seq]."""
        first = torch.zeros(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        first[:, 0] = True
        x = inputs.flatten(0, 1)
        return cls(x, x @ weight.T, weights.flatten(), first.flatten())

    def __len__(self) -> int:
        return len(self.x)


@dataclasses.dataclass(frozen=True)
class OutputError:
    """Squared error of the outputs of a token, summed over the outputs, as a mean over tokens.

    Attributes:
        weighted: the mean with the weights of the tokens; what selection looks at.
        mean: the mean over all tokens alike.
        without_first: the mean without the first token of each sequence, whose activations are unlike all others.
    """

    weighted: float
    mean: float
    without_first: float


def output_errors(tokens: Tokens, weight: Tensor, scale: Tensor, rotation: Factors, form: LinearFormat) -> Tensor:
    """Return the squared output error of each token, float32 [tokens], as the compiled model would make it.

    Args:
        tokens: inputs and float outputs.
        weight: W, float32 [out, n].
        scale: what x is multiplied with and W divided by before the rotation, float32 [n].
        rotation: what follows the scale on both sides.
        form: how the two sides are rounded.
    """
    rounded = quantize_weight(rotation.apply_to_weight(weight / scale), form)
    errors = [
        (low_bit_linear(rotation.apply(x * scale), rounded, form) - y).square_().sum(1)
        for x, y in zip(torch.split(tokens.x, _TOKENS), torch.split(tokens.y, _TOKENS), strict=True)
    ]
    return torch.cat(errors)


def summed_up(errors: Tensor, tokens: Tokens) -> OutputError:
    """Return the means of the errors of `tokens`, float [tokens]."""
    errors = errors.double()
    return OutputError(
        float((errors * tokens.weights).sum() / tokens.weights.sum()),
        float(errors.mean()),
        float(errors[~tokens.first].mean()),
    )
