"""What inductor compiles dearly, written so that it compiles well, at its own extension point `post_grad_custom_pre_pass`.

Rotations. Qwen-Image and Z-Image rotate queries and keys by `view_as_real(view_as_complex(x) * table)`. Inductor makes no code
for complex numbers: such a product becomes kernels of its own, which read and write float32, between others that could have done
it on the way. (a + bi)(c + di) is written as the real operators x * c + flip(x) * [-d, d], x being the pairs [a, b], and is fused
with the norm before and the cast after.

GELU. Its approximation holds 1 + tanh(u), and the accurate tanh of CUDA's library takes a branch and some twenty instructions a
value; together with quantizing its rows to float8, GELU is bound by instructions and not by memory. 1 + tanh(u) is
2 / (1 + exp(-2 u)).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

aten = torch.ops.aten


class CheaperArithmetic(CustomGraphPass):
    """Both rewrites; the values are those of the original within rounding."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.view_as_real.default):
            factors = _complex_factors(node.args[0])
            if factors is not None:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_rotated(graph, *factors))
        for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            argument = _one_plus_tanh(node)
            if argument is not None:
                with graph.inserting_before(node):
                    twice = _call(graph, aten.mul.Tensor, argument, 2)
                    node.replace_all_uses_with(_call(graph, aten.mul.Tensor, _call(graph, aten.sigmoid.default, twice), 2))
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        """Enters the key of inductor's cache of compiled graphs."""
        return get_hash_for_files((__file__,))


def _complex_factors(product: Any) -> tuple[Node, Node] | None:
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
    real = _call(graph, aten.view_as_real.default, table)
    cosine, sine = (_call(graph, aten.slice.Tensor, real, -1, part, part + 1) for part in (0, 1))
    signed = _call(graph, aten.cat.default, [_call(graph, aten.neg.default, sine), sine], -1)
    flipped = _call(graph, torch.ops.prims.rev.default, pairs, [pairs.meta["val"].ndim - 1])
    crossed = _call(graph, aten.mul.Tensor, flipped, signed)
    return _call(graph, aten.add.Tensor, _call(graph, aten.mul.Tensor, pairs, cosine), crossed)


def _one_plus_tanh(node: Node) -> Node | None:
    """u of tanh(u) + 1, in float32, or None for anything else."""
    if len(node.args) != 2 or node.args[1] != 1 or node.kwargs:
        return None
    tanh = node.args[0]
    if not isinstance(tanh, Node) or tanh.target is not aten.tanh.default or tanh.meta["val"].dtype != torch.float32:
        return None
    argument = tanh.args[0]
    return argument if isinstance(argument, Node) else None


def _call(graph: Graph, operator: Callable[..., Any], *args: Any) -> Node:
    node = graph.call_function(operator, args)
    node.meta["val"] = operator(*torch.fx.map_arg(args, lambda argument: argument.meta["val"]))
    return node
