"""The compiler backend of our models: inductor, with two of its own extension points used.

`RealRotation` rewrites rotary embeddings. `WideRows` keeps a whole row in registers where inductor would read it two or three
times: quantizing activations row by row, after a norm or an activation function, is what takes the time that multiplying in fp8
saves. On an H200, GELU and quantizing rows of 12,288 took 168 us in inductor's loop, and bandwidth allows 40.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch._inductor import config, list_mode_options
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V
from torch.fx import GraphModule

from .real_rotation import RealRotation

LARGEST_ROW: Final = 16384
"""32 values a thread at 16 warps; a longer row would spill."""


class WideRows(InductorChoices):
    """Inductor's choices, but for reductions over contiguous rows: they hold up to `LARGEST_ROW` values at once, not 1,024."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        inner = features.get_reduction_hint() == ReductionHint.INNER
        if not inner or cooperative_reduction or not config.triton.persistent_reductions or torch.version.hip is not None:
            return False
        return bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, LARGEST_ROW))


def inductor_backend(mode: str) -> Callable[[GraphModule, Sequence[torch.Tensor]], Any]:
    """What `torch.compile(backend=...)` takes: inductor in `mode`, with the above.

    The models of one call share a backend, and by it what is compiled for blocks that are alike.
    """
    patches = {**list_mode_options(mode), "post_grad_custom_pre_pass": RealRotation(files=(__file__,))}

    def compile_graph(graph: GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        with V.set_choices_handler(WideRows()):
            return compile_fx(graph, list(inputs), config_patches=patches)

    return compile_graph
