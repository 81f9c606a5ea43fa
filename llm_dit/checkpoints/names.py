"""Which rows of which tensors of a file become which parameter of a diffusers model, found with diffusers' own converters.

diffusers converts the names of a single file, splits fused projections and swaps halves with one function per model, which
works on tensors and knows nothing of scales. It is given probes: for every tensor a column of numbers that say which tensor and
which row each is. Where they come out says where every row goes, and with it the row's scale; no table per model is needed.

A converter that mixes elements within a row could not be probed; none of the four families' does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

from .encoders import Unread, encoder_name
from .layout import PREFIXES, Layout

Rename = Callable[[str, Collection[str]], str | None]
"""(name in the file, names of the model) -> the name to go on with, or None for a tensor that the model does without."""
_ROW_BITS: Final = 32


@dataclass(frozen=True)
class Part:
    """Where a component's tensors stand in a file.

    Attributes:
        prefixes: what their names begin with; "" takes any.
        without: what other components' names begin with, where those begin with a prefix as well.
        keep_prefix: leave the prefix for `rename`, which needs it.
        rename: changes a name before diffusers' converter, if the class has one, goes on.
        convert: hand the renamed tensors to diffusers' converter.
        unread: what a file may leave out.
    """

    prefixes: tuple[str, ...] = (*PREFIXES, "")
    without: tuple[str, ...] = ()
    keep_prefix: bool = False
    rename: Rename = lambda name, expected: name
    convert: bool = True
    unread: Unread = field(default_factory=Unread)

    def select(self, layout: Layout) -> dict[str, str]:
        """The names of the component's tensors in the file, by the names without the prefix; empty if it has none."""
        found: dict[str, str] = {}
        for prefix in self.prefixes:
            for key in layout.weights:
                name = key.removeprefix(prefix)
                if key.startswith(prefix) and not name.startswith(self.without or ("\0",)):
                    found[key if self.keep_prefix else name] = key
            if found and not self.keep_prefix:
                break
        return found


def encoder_part(unread: Unread | None = None) -> Part:
    """Where the tensors of a text encoder stand in a file of its own; no pipeline reads its head."""
    return Part(prefixes=("",), rename=encoder_name, convert=False, unread=unread or Unread(("lm_head",)))


@dataclass(frozen=True)
class OfficialName:
    """Where a tensor of a diffusers transformer stands in the file of its authors.

    Attributes:
        name: its name there, without a prefix.
        place: which part of that tensor it is, where several are fused, counted from 0.
        swapped: its two halves stand the other way round (shift and scale).
    """

    name: str
    place: int = 0
    swapped: bool = False


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of the tensor `key` of a file."""

    key: str
    start: int
    stop: int


def map_names(model: nn.Module, layout: Layout, part: Part) -> dict[str, tuple[Piece, ...]]:
    """By the name of every parameter and buffer of `model` that the file fills, the pieces that make it, in order.

    Args:
        model: the component, on meta.

    Raises:
        ValueError: if the file's tensors cannot be those of `model`.
    """
    selected = part.select(layout)
    expected = model.state_dict().keys()
    if not expected <= selected.keys():
        selected = _renamed(selected, part, expected)
    entries = layout.weights
    probes = {name: _probe(index, entries[key].shape) for index, (name, key) in enumerate(selected.items())}
    sources = list(selected.values())
    converter = SINGLE_FILE_LOADABLE_CLASSES.get(_single_file_class(model), {}).get("checkpoint_mapping_fn")
    if part.convert and converter is not None and not expected <= probes.keys():
        probes = _converted(converter, probes, model, layout, selected)
    return {name: _pieces(probe, sources) for name, probe in probes.items()}


def _renamed(selected: Mapping[str, str], part: Part, expected: Collection[str]) -> dict[str, str]:
    named = {}
    for name, key in selected.items():
        new = part.rename(name, expected)
        if new is not None:
            named[new] = key
    return named


def _probe(index: int, shape: tuple[int, ...]) -> Tensor:
    """[rows, 1, ...] int64: the index of the tensor in the high half, the row in the low one."""
    rows = shape[0] if shape else 1
    numbers = torch.arange(rows) | (index << _ROW_BITS)
    return numbers.reshape(rows, *[1] * (len(shape) - 1)) if shape else numbers.reshape(())


def _converted(
    converter: Any, probes: dict[str, Tensor], model: nn.Module, layout: Layout, selected: Mapping[str, str]
) -> dict[str, Tensor]:
    config = dict(getattr(model, "config", {}))
    try:
        return converter(checkpoint=dict(probes), config=config)
    except Exception as error:  # whatever a converter stumbles over in names that it does not know
        word = str(error).strip("'\"")
        named = [key for name, key in selected.items() if word and word in name]
        where = f", probably {named[0]!r}" if named else ""
        raise ValueError(
            f"{layout.header.path} is no checkpoint of a {type(model).__name__}: its names cannot be converted{where} "
            f"({type(error).__name__}: {error})"
        ) from error


def _single_file_class(model: nn.Module) -> str:
    """The name under which diffusers lists the class or the one it extends."""
    return next((base.__name__ for base in type(model).__mro__ if base.__name__ in SINGLE_FILE_LOADABLE_CLASSES), "")


def _pieces(probe: Tensor, sources: list[str]) -> tuple[Piece, ...]:
    """The runs of consecutive rows in a probe that came out of a converter."""
    numbers = probe.flatten()
    if numbers.numel() == 0:
        return ()
    breaks = (torch.nonzero(numbers[1:] != numbers[:-1] + 1).flatten() + 1).tolist()
    pieces = []
    for start, stop in zip([0, *breaks], [*breaks, numbers.numel()], strict=True):
        first = int(numbers[start])
        row = first & ((1 << _ROW_BITS) - 1)
        pieces.append(Piece(sources[first >> _ROW_BITS], row, row + stop - start))
    return tuple(pieces)
