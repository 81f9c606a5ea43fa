"""How a transformer's sequence is split between processes, for context parallelism: what a family says of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Share:
    """The part of a process.

    Attributes:
        count: processes that split a sequence.
        rank: which of them this one is.
        ring: keys and values go around in a ring, where no mask can follow them; otherwise heads are exchanged (Ulysses).
    """

    count: int
    rank: int
    ring: bool

    def check(self, tokens: int, what: str, instead: str) -> None:
        """Raises ValueError if `tokens` cannot be split evenly, saying what to do instead."""
        if tokens % self.count:
            raise ValueError(f"{tokens} {what} tokens cannot be split evenly between {self.count} processes: {instead}")

    def refuse(self, keywords: Arguments, *names: str) -> None:
        """Raises ValueError if any of these arguments of the transformer is given."""
        for name in names:
            if keywords.get(name) is not None:
                raise ValueError(f"context parallelism does not split {name}: run this pipeline on one GPU")

    def refuse_masks(self, masked: bool) -> None:
        """Raises ValueError if there is a mask and the processes form a ring."""
        if masked and self.ring:
            raise ValueError("ring attention takes no mask, and texts of several lengths or odd length need one: use 'ulysses'")

    def of(self, value: Tensor, dim: int = 1) -> Tensor:
        """This process's part of a tensor."""
        return value.chunk(self.count, dim=dim)[self.rank]


@dataclass(frozen=True)
class Splitting:
    """How one transformer class is split.

    Attributes:
        plan: from the transformer, diffusers' plan: by module, the arguments and outputs that are split or gathered.
        prepare: from the arguments of a forward and the share, the arguments that replace some of them.

            Raises ValueError for what cannot be split.
        prepare_block: the same for each of `transformer.transformer_blocks`.
    """

    plan: Callable[[Any], Mapping[str, Any]]
    prepare: Callable[[Arguments, Share], Arguments]
    prepare_block: Callable[[Arguments, Share], Arguments] | None = None


def diffusers_plan(transformer: Any) -> Mapping[str, Any]:
    """The plan of the diffusers class."""
    return transformer._cp_plan
