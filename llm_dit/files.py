"""The components of a pipeline that come from single checkpoint files (`transformer_file`, `encoder_file`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn

from .backends import ComponentRequest
from .backends.checkpoint import load_planned, require_kept_support
from .building import build_empty, component_class
from .checkpoints.again import remember_plan
from .checkpoints.header import read_header
from .checkpoints.layout import Layout, read_layout
from .checkpoints.names import Part
from .checkpoints.plan import PartsMissingError, Plan, Wanted, plan_component
from .checkpoints.recognize import recognize
from .families.base import Family
from .loader import component_report, read_json
from .names import first_line
from .quantization import METHODS, ComponentReport, get_method
from .request import LoadRequest

DEFAULT_METHODS = {"transformer": "fp8-dynamic", "encoder": "fp8-weight-only"}
"""By role, how a file's fp8 is multiplied where nothing is said: a transformer on the tensor cores, an encoder, which runs once,
in 16 bits."""


@dataclass(frozen=True)
class FileComponent:
    """A component that is about to be read from a file."""

    name: str
    model: nn.Module
    plan: Plan
    started: float

    def load(self, device: torch.device) -> tuple[nn.Module, ComponentReport]:
        """The filled component and its report."""
        stats = load_planned(self.model, self.plan, self.name, device)
        remember_plan(self.model, self.plan)
        backend = "checkpoint" if self.plan.kept else ("torchao" if stats["quantized_layers"] else None)
        report = component_report(
            self.name,
            self.model,
            stats,
            backend,
            time.perf_counter() - self.started,
            note="; ".join(self.plan.notes),
            dequantized=tuple(self.plan.dequantized),
        )
        return self.model, report


def plan_files(
    source: str,
    hub: Mapping[str, Any],
    request: LoadRequest,
    family: Family,
    roles: Mapping[str, str],
    passed: Collection[str],
    wanted_of: Callable[[str, str], ComponentRequest | None],
) -> list[FileComponent]:
    """Every component that the files of `request` hold, empty and planned; nothing is allocated on a device yet.

    A file that holds more than was asked for (LTX-2 publishes all but the text encoder in one) fills those components too, unless
    the caller passed one.

    Args:
        source, hub: the pipeline's folder or repository, which has the configurations.
        family: of the pipeline.
        roles: by component name, its role.
        passed: the components that the caller passed.
        wanted_of: from a component's name and role, what is asked for it.

    Raises:
        ValueError: for a file that cannot be read, or not as one of this component, naming the file's own keys.
    """
    index = read_json(source, "model_index.json", hub)
    parts = family.parts
    planned: dict[str, FileComponent] = {}
    for asked, file in request.files.items():
        layout = read_layout(read_header(resolve_file(file, hub)))
        _check_kind(layout, asked, family)
        others = [name for name in parts if name != asked and parts[name].prefixes[-1] and parts[name].select(layout)]
        _check_all_selected(layout, [parts[name] for name in (asked, *others) if name in parts])
        for name in (asked, *others):
            entry = index.get(name)
            if name in passed or name in planned or name not in roles or not isinstance(entry, list) or entry[0] is None:
                continue
            part = parts.get(name)
            if part is None:
                raise ValueError(f"{name} cannot be read from a file in this pipeline: it has {', '.join(parts)}")
            started = time.perf_counter()
            config = read_json(source, f"{name}/config.json", hub)
            model = build_empty(component_class(*entry), config, source, name, request.dtype_of(name), hub)
            wanted = _wanted(layout, request, name, roles[name], wanted_of(name, roles[name]), asked=name == asked)
            try:
                plan = plan_component(model, layout, part, wanted)
            except PartsMissingError as error:
                if name == asked or asked not in planned:
                    raise ValueError(str(error)) from None
                planned[asked].plan.notes.append(f"its {name} are not read, and come from the folder: {error}")
                continue
            require_kept_support(plan)
            planned[name] = FileComponent(name, model, plan, started)
    return list(planned.values())


def _check_kind(layout: Layout, component: str, family: Family) -> None:
    """Raises ValueError for a file that is recognized as something else, which its names would only say in detail."""
    kind = recognize(layout.weights.keys())
    wanted = family.name if component == "transformer" else ""
    if kind is not None and kind.family != wanted:
        raise ValueError(
            f"{layout.header.path} holds a {kind.title}, and was given for the {component} of a {family.title} pipeline"
        )


def _check_all_selected(layout: Layout, parts: Sequence[Part]) -> None:
    """Raises ValueError for a scaled weight that belongs to no component: its scale would land nowhere."""
    selected = {key for part in parts for key in part.select(layout).values()}
    lost = [key for key, weight in layout.fp8.items() if weight.scale and key not in selected]
    if lost:
        raise ValueError(f"{layout.header.path}: the scaled fp8 weight {lost[0]!r} belongs to no component that is read from it")


def _wanted(
    layout: Layout, request: LoadRequest, name: str, role: str, component: ComponentRequest | None, asked: bool
) -> Wanted:
    """What to make of a component: what was asked for or, where nothing was, the file's fp8 as it is.

    A hook that returns None where something was asked for wants the component unquantized.
    """
    method = component.method if component else METHODS["none"]
    unsaid = component is None and request.component(name, role) is None and not {name, role} & request.named
    if unsaid and asked and layout.fp8:
        method = get_method(DEFAULT_METHODS[role])
    if component is None:
        component = ComponentRequest(name, role, method, request.granularity, request.skip, request.dtype_of(name))
    static = request.activation_scale == "static" and asked and role == "transformer"
    if static and not method.quantizes_activations:
        raise ValueError(
            f"activation_scale='static' is for fp8-dynamic, which quantizes activations, and the {name} is to be {method.name}: "
            "use fp8-dynamic, or leave activation_scale at 'dynamic'"
        )
    return Wanted(method, role, component.granularity, component.skip, component.dtype, static)


def resolve_file(name: str, hub: Mapping[str, Any]) -> Path:
    """The path of a checkpoint file: a local one, or "repository/file" on the Hub ("owner/name/file.safetensors").

    Raises:
        FileNotFoundError: if there is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise FileNotFoundError(
            f"{name!r} is a folder: give the .safetensors file in it, or its pipeline's folder to load_pipeline"
        )
    if path.exists():
        return path
    words = name.split("/")
    if path.is_absolute() or len(words) < 3 or words[0] in (".", "..", "~"):
        raise FileNotFoundError(f"there is no file {name!r}: give a path, or owner/repository/file.safetensors on the Hub")
    try:
        # A revision is one of the pipeline's repository, and the file may be in another.
        keywords = {key: value for key, value in hub.items() if key != "revision"}
        return Path(hf_hub_download("/".join(words[:2]), "/".join(words[2:]), **keywords))
    except Exception as error:  # offline, no such repository, no such file, no access: the Hub's many errors
        raise FileNotFoundError(f"{name!r} is neither a local file nor one that the Hub gives: {first_line(error)}") from error
