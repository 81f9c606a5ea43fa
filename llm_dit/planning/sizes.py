"""The bytes of a pipeline's components, of weights by method and of activations by size: everything a plan is made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from ..checkpoints.encoders import PRUNED, Unread, take_off_unread
from ..checkpoints.header import read_header
from ..decoding import TILES, WHOLE, Cut
from ..encoder_parts import unread_patterns
from ..estimate import ComponentEstimate, Maker, component_makers, estimate_component
from ..families.base import Family
from ..forwards import Size
from ..loader import method_in
from ..mixin import QuantizablePipelineMixin, diffusers_class
from ..writing import read_json_file
from .activations import activation_bytes, make_on_meta, shortened
from .candidates import LOSSES
from .constants import constants

AS_SAVED: Final = "as saved"
"""The method of a component that lies quantized in its folder: it is loaded so, whatever is asked for."""


@dataclass(frozen=True)
class ComponentSizes:
    """One component.

    Attributes:
        name, role: its name in the pipeline, and its role.
        weights: its bytes by method.
        kept: the same with the family's fragile blocks in bf16.
        largest: bytes in bf16 of the module with the most parameters of its own.
        left_out: the parts of a text encoder that nothing reads and that are left unread.
        saved_method: the method that it lies quantized with in its folder, or "".
    """

    name: str
    role: str
    weights: ComponentEstimate
    kept: ComponentEstimate
    largest: int
    left_out: tuple[str, ...] = ()
    saved_method: str = ""

    def bytes_for(self, method: str, keep_fragile: bool) -> int:
        """Bytes of the weights; a method that the component cannot take leaves it in bf16."""
        estimate = self.kept if keep_fragile else self.weights
        return estimate.bytes_for(self.method_for(method))

    def method_for(self, method: str) -> str:
        """The method it gets where its role has `method`."""
        if self.weights.saved:
            return AS_SAVED
        return method if method in self.weights.methods else "none"


@dataclass
class PipelineSizes:
    """A pipeline, whose activations are counted when they are asked for, each once.

    Attributes:
        source: as it was named.
        cls: our pipeline class.
        components: by name.
        skip: patterns of the fragile blocks, "" for none.
    """

    source: str
    cls: type[QuantizablePipelineMixin]
    components: Mapping[str, ComponentSizes]
    skip: tuple[str, ...]
    makers: Mapping[str, Maker] = field(repr=False)
    _models: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    _counted: dict[tuple[Any, ...], dict[str, int]] = field(default_factory=dict, repr=False)

    @property
    def family(self) -> Family:
        return self.cls.family

    @property
    def pipeline_class(self) -> str:
        return diffusers_class(self.cls).__name__

    @property
    def encoders(self) -> tuple[str, ...]:
        """The components that only encoding needs."""
        return tuple(name for name in self.family.encoding.encoders if name in self.components)

    def activations(self, component: str, phase: str, size: Size, method: str = "none", cut: Cut = WHOLE) -> int:
        """Bytes that a component takes beside its weights, cuDNN's and the kernels' workspaces included."""
        if component not in self.components:
            return 0
        key, part = (component, phase, size, cut), self.components[component]
        if key not in self._counted:
            model, forwards = self._model(component), self.family.forwards
            self._counted[key] = activation_bytes(model, component, phase, part.role, forwards, size, cut)
        counted = self._counted[key][part.saved_method if method == AS_SAVED else method]
        return constants().correct(phase, part.role, part.weights.class_name, counted)

    def cuts(self, size: Size) -> tuple[Cut, ...]:
        """Ways to decode, the least cut first."""
        vae: Any = self._model("vae") if "vae" in self.components else None
        if not hasattr(vae, "use_tiling"):
            return (WHOLE,)
        sliced = size.batch > 1 and hasattr(vae, "use_slicing")
        tiles = [tile for tile in TILES if tile < max(size.height, size.width)]
        return (WHOLE, *([Cut(sliced=True)] if sliced else []), *(Cut(sliced, tile) for tile in tiles))

    def saved_methods(self) -> dict[str, str]:
        """By role, the method of what lies quantized in the folder, where a role has such a method."""
        parts = [part for part in self.components.values() if part.saved_method in LOSSES[part.role]]
        return {part.role: part.saved_method for part in reversed(parts)}

    def _model(self, component: str) -> nn.Module:
        """On meta; of the transformer two blocks of each kind, which have the activations of all."""
        if component not in self._models:
            make: Callable[[], nn.Module] = partial(_model_of, self.makers[component])
            short = self.components[component].role == "transformer"
            self._models[component] = make_on_meta(shortened(make) if short else make)
        return self._models[component]


@cache
def pipeline_sizes(source: str, encoder_layers: str, /, **hub: Any) -> PipelineSizes:
    """The sizes of a pipeline; kept for the next call.

    Neither a default nor a keyword: a cache takes the same call in other words for another.

    Args:
        source: a folder, a repository id, or an offline name, as in `estimate_pipeline`.
        encoder_layers: "read" to leave parts of the text encoder unread that no call uses, or "all".
        **hub: where to find a repository, e.g. `revision`.

    Raises:
        ValueError: if `source` is none of these, or a pipeline that cannot be planned.
    """
    cls, makers, folder = component_makers(source, torch.bfloat16, hub)
    if not {"transformer", "vae"} <= makers.keys() or not hasattr(cls, "encode_prompt"):
        raise ValueError(
            f"{diffusers_class(cls).__name__} does not go from a prompt to a picture: a plan is made for those that do"
        )
    components: dict[str, ComponentSizes] = {}
    skip: tuple[str, ...] = ()
    for name, make in makers.items():
        role = cls.component_role(name)
        if role is None:
            continue
        model, saved = make()
        if name == "transformer":
            skip = _fragile(model, cls.family)
        part = cls.family.parts.get(name) if role == "encoder" and encoder_layers == "read" else None
        unread = part.unread if part is not None and part.unread.in_folders else None
        components[name] = _component(name, role, model, saved, unread, skip, (folder or Path(source)) / name)
    return PipelineSizes(source, cls, components, skip, makers)


def _component(
    name: str, role: str, model: nn.Module, saved: int, unread: Unread | None, skip: tuple[str, ...], folder: Path
) -> ComponentSizes:
    left_out: tuple[str, ...] = ()
    if unread is not None:
        take_off_unread(model, unread)
        saved = _read_bytes(folder, unread, model) if saved else 0
        left_out = tuple(getattr(model, PRUNED, ()))
    plain = estimate_component(name, role, model, saved, "per-row", (), torch.bfloat16)
    kept = estimate_component(name, role, model, saved, "per-row", skip, torch.bfloat16) if skip and role != "vae" else plain
    own = (sum(2 * parameter.numel() for parameter in module.parameters(recurse=False)) for module in model.modules())
    return ComponentSizes(name, role, plain, kept, max(own, default=0), left_out, _saved_method(folder) if saved else "")


def _saved_method(folder: Path) -> str:
    """The method that a component's config.json records; another library's is counted as int8."""
    config = read_json_file(folder / "config.json")
    return method_in(config) or "int8"


def _read_bytes(folder: Path, unread: Unread, model: Any) -> int:
    """Bytes of the tensors in a text encoder's files that are read with encoder_layers="read"."""
    left = re.compile("|".join(unread_patterns(unread, model.config)))
    entries = (entry for file in folder.glob("*.safetensors") for entry in read_header(file).tensors.items())
    return sum(entry.nbytes for key, entry in entries if not left.search(key))


def _model_of(make: Maker) -> nn.Module:
    return make()[0]


def _fragile(transformer: Any, family: Family) -> tuple[str, ...]:
    """Patterns of the blocks that the family's authors leave in bf16."""
    blocks = getattr(transformer, "transformer_blocks", ())
    return tuple(f"transformer_blocks.{index % len(blocks)}" for index in family.bf16_blocks) if len(blocks) > 4 else ()
