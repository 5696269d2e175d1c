"""How far a low-bit model's next-token distribution is from the float model's, given what their last blocks put out."""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.learn.block import Angles, read_block, run_block
from planish.compiler.learn.gradient.block_loss import rounded_to_nearest
from planish.compiler.learn.precision import fast_products
from planish.compiler.learn.transforms.factors import Factors
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES

__all__ = ["Head", "rounded_to_nearest_outputs"]


@dataclasses.dataclass(frozen=True)
class Head:
    """The last norm and lm_head, in floating point.

    Attributes:
        gain: of the norm, float32 [hidden].
        weight: of lm_head, float32 [vocab, hidden].
        epsilon: of the norm.
    """

    gain: Tensor
    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: torch.device | None = None) -> "Head":
        """Read the head of a checkpoint to `device`; None is the CPU."""
        config = checkpoint.config
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        gain, weight = (
            torch.from_numpy(checkpoint.tensor(each).astype(np.float32)).to(device)
            for each in ("model.norm.weight", name)
        )
        return cls(gain, weight, config.rms_norm_eps)

    def normalized(self, x: Tensor) -> Tensor:
        """Return what the last norm makes of hidden states [..., hidden]."""
        return self.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon))

    def log_probabilities(self, x: Tensor) -> Tensor:
        """Return the logarithms of the next token's probabilities, [..., vocab], given hidden states [..., hidden]."""
        return torch.log_softmax(self.normalized(x) @ self.weight.T, -1)

    def divergence(self, found: Tensor, expected: Tensor) -> Tensor:
        """Return KL(expected || found), the mean over tokens in nats, of two models' hidden states [..., hidden].

        The gradient reaches `found`.
        """
        with torch.no_grad():
            wanted = self.log_probabilities(expected)
        made = self.log_probabilities(found)
        lost = torch.nn.functional.kl_div(made, wanted, log_target=True, reduction="sum")
        return lost / expected[..., 0].numel()

    @torch.no_grad()
    def mean_divergence(self, found: Tensor, expected: Tensor) -> float:
        """Return the divergence of sequences [sequences, seq, hidden], brought to the head one by one."""
        device = self.gain.device
        lost = [float(self.divergence(*(x.to(device) for x in pair))) for pair in zip(found, expected, strict=True)]
        return sum(lost) / len(lost)

    @torch.no_grad()
    def mean_cross_entropy(self, found: Tensor, token_ids: npt.NDArray[np.int64]) -> float:
        """Return -log p(token) in nats, the mean over all tokens but the first of each sequence, one by one.

        Args:
            found: what the last block puts out, [sequences, seq, hidden].
            token_ids: int64 [sequences, seq].
        """
        lost = []
        for x, ids in zip(found, torch.from_numpy(token_ids).to(self.gain.device), strict=True):
            made = self.log_probabilities(x[:-1].to(self.gain.device))
            lost.append(float(torch.nn.functional.nll_loss(made, ids[1:])))
        return sum(lost) / len(lost)


@torch.no_grad()
def rounded_to_nearest_outputs(
    checkpoint: Checkpoint, scheme: Scheme, token_ids: npt.NDArray[np.int64], device: torch.device | None = None
) -> Tensor:
    """Return what the last block puts out where nothing is flattened and weights are rounded to nearest.

    Args:
        checkpoint: the float model, read one block at a time.
        scheme: with low-bit linears.
        token_ids: int64 [sequences, seq].
        device: where a block and a sequence are meanwhile; None is the CPU.

    Returns:
        float32 [sequences, seq, hidden], on the CPU.
    """
    config = checkpoint.config
    rows = checkpoint.tensor("model.embed_tokens.weight")[token_ids].astype(np.float32)
    x, angles = torch.from_numpy(rows).half().float(), Angles.of(config, token_ids.shape[1], device)
    nothing = {site: Factors("identity") for site in SITES}
    with fast_products():
        for layer in range(config.num_hidden_layers):
            hooks = rounded_to_nearest(read_block(checkpoint, layer).to(device), nothing, {}, scheme.block(layer))
            x = torch.cat([run_block(config, hooks, part.to(device), angles).cpu() for part in torch.split(x, 1)])
    return x
