"""Muon for the matrices of blocks: all singular values of a step are near 1, so that no direction learns faster than another.

torch.optim.Muon does the same, and tests hold this to it; but it goes matrix by matrix, and its rate is a number: a CUDA graph
wants few kernels, and a rate that falls while it is replayed. On the tiny FLUX.2-klein, 600 steps of 32 leave the error that
AdamW alone leaves after 800.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

_COEFFICIENTS: Final = (3.4445, -4.775, 2.0315)
"""Of the polynomial of degree 5 that is applied to the singular values (Jordan 2024, kellerjordan.github.io/posts/muon)."""
_ITERATIONS: Final = 5
_MOMENTUM: Final = 0.95
_DECAY: Final = 0.01
_SCALE: Final = 0.2
"""Times the root of the longer side: an entry of the step is as large as one of AdamW's (arXiv:2502.16982, 2.2)."""


def block_matrices(module: nn.Module) -> list[Tensor]:
    """Weights [out, in] of the Linears inside repeated blocks that want gradients: what embeds and predicts is AdamW's."""
    blocks = [block for found in module.modules() if isinstance(found, nn.ModuleList) for block in found]
    linears = {id(one): one for block in blocks for one in block.modules() if isinstance(one, nn.Linear)}
    return [one.weight for one in linears.values() if one.weight.requires_grad]


class Muon:
    """Steps of matrices that have gradients.

    Args:
        matrices: [M, N] each.
        momenta: as many, of the same shapes; they are changed in place.
        rate: 0-dimensional; read at every step.
    """

    def __init__(self, matrices: Sequence[Tensor], momenta: Sequence[Tensor], rate: Tensor) -> None:
        self.rate = rate
        self.groups: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for matrix, momentum in zip(matrices, momenta, strict=True):
            self.groups.setdefault(matrix.shape, []).append((matrix, momentum))

    @torch.no_grad()
    def step(self) -> None:
        """Follows the gradients that are there; matrices of one shape together."""
        for shape, pairs in self.groups.items():
            found = [(matrix, momentum, matrix.grad) for matrix, momentum in pairs if matrix.grad is not None]
            if not found:
                continue
            matrices, momenta, gradients = map(list, zip(*found, strict=True))
            torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
            ahead = torch.stack(torch._foreach_lerp(gradients, momenta, _MOMENTUM))  # Nesterov's
            steps = orthogonalized(ahead).float() * (self.rate * (_SCALE * max(shape) ** 0.5))
            torch._foreach_mul_(matrices, 1 - self.rate * _DECAY)
            torch._foreach_sub_(matrices, steps.unbind())


def orthogonalized(matrices: Tensor) -> Tensor:
    """[K, M, N] -> bfloat16, with their singular vectors and singular values between about 0.7 and 1.2."""
    found = matrices.bfloat16()
    tall = found.shape[1] > found.shape[2]
    if tall:
        found = found.mT
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found
