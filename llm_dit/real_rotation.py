"""Rotary embeddings that a model writes as products of complex numbers, compiled as real arithmetic.

Qwen-Image and Z-Image rotate queries and keys by `view_as_real(view_as_complex(x) * table)`. Inductor generates no code for
complex numbers: such a product becomes kernels of its own, which read and write float32, between others that could have done it
on the way. The pass below, at inductor's own extension point `post_grad_custom_pre_pass`, writes (a + bi)(c + di) as the real
operators x * c + flip(x) * [-d, d], x being the pairs [a, b]; inductor fuses them with the norm before and the cast after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

aten = torch.ops.aten


class RealRotation(CustomGraphPass):
    """Replaces view_as_real(view_as_complex(x) * table), table complex, by real operators.

    Attributes:
        files: other source files that decide what is compiled, and enter the key of inductor's cache with this one.
    """

    def __init__(self, files: tuple[str, ...] = ()) -> None:
        self.files = files

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.view_as_real.default):
            factors = _factors(node.args[0])
            if factors is not None:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_rotated(graph, *factors))
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, *self.files))


def _factors(product: Any) -> tuple[Node, Node] | None:
    """(x, table) of view_as_complex(x) * table, or None for anything else."""
    if not isinstance(product, Node) or product.target is not aten.mul.Tensor:
        return None
    for rotated, table in (product.args, product.args[::-1]):
        if isinstance(rotated, Node) and rotated.target is aten.view_as_complex.default and isinstance(table, Node):
            pairs = rotated.args[0]
            if isinstance(pairs, Node) and table.meta["val"].dtype == rotated.meta["val"].dtype:
                return pairs, table
    return None


def _rotated(graph: Graph, pairs: Node, table: Node) -> Node:
    """[..., 2] times [...], as [..., 2]."""

    def call(operator: Callable[..., Any], *args: Any) -> Node:
        node = graph.call_function(operator, args)
        node.meta["val"] = operator(*torch.fx.map_arg(args, lambda argument: argument.meta["val"]))
        return node

    real = call(aten.view_as_real.default, table)
    cosine, sine = (call(aten.slice.Tensor, real, -1, part, part + 1) for part in (0, 1))
    signed = call(aten.cat.default, [call(aten.neg.default, sine), sine], -1)
    crossed = call(aten.mul.Tensor, call(torch.ops.prims.rev.default, pairs, [pairs.meta["val"].ndim - 1]), signed)
    return call(aten.add.Tensor, call(aten.mul.Tensor, pairs, cosine), crossed)
