"""Which layers of a component are quantized, and why each of the others is not.

The decision is made once, module by module, with exact names. Everything else (the in-memory path, the loaders, the
estimate, the report) follows it, so they cannot disagree, and no pattern language of another library is involved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.core.config import AOBaseConfig

from .methods import Method
from .torchao_tensors.int8_conv import Int8ConvConfig

VAE_METHODS: Final = ("none", "int8")
"""See `vae_refusal`."""

COMPONENT_SKIPS: Final[Mapping[str, tuple[str, ...]]] = {
    "encoder": ("embed_tokens", "*norm*", "lm_head", "rotary_emb"),
    "transformer": ("*norm*",),
    "vae": (),
}


@dataclass(frozen=True)
class Layer:
    """One layer and what becomes of it.

    Attributes:
        name: its dotted name in the model.
        module: the Linear or, in a vae, the convolution.
        config: how its weight is quantized, or None if it is not.
        reason: why it is not, or "".
    """

    name: str
    module: nn.Module
    config: AOBaseConfig | None
    reason: str = ""

    @property
    def weight(self) -> Tensor:
        """The weight itself."""
        return self.module.get_parameter("weight")

    @property
    def parameter(self) -> str:
        """Dotted name of the weight."""
        return f"{self.name}.weight" if self.name else "weight"


def matches(name: str, pattern: str) -> bool:
    """True if `pattern` (shell wildcards) matches whole dotted parts of `name`.

    >>> matches("transformer.proj_out", "proj_out"), matches("audio_proj_out", "proj_out")
    (True, False)
    >>> matches("blocks.1.attn.to_q", "blocks.1"), matches("blocks.1.norm1.linear", "*norm*")
    (True, True)
    """
    return any(fnmatchcase(name, form) for form in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*"))


def check_patterns(patterns: Sequence[str], what: str) -> tuple[str, ...]:
    """The patterns; raises ValueError for a string, whose letters would be taken for patterns."""
    if isinstance(patterns, str):
        raise ValueError(f"{what} must be a list of name patterns, not the string {patterns!r}: write [{patterns!r}]")
    return tuple(patterns)


def is_fp8_compatible_layer(linear: nn.Module) -> bool:
    """True if both dimensions of the Linear are divisible by 16, which fp8 matrix multiplication asks for."""
    return isinstance(linear, nn.Linear) and linear.in_features % 16 == 0 and linear.out_features % 16 == 0


def named_layers(model: nn.Module, component_type: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a component: every `nn.Linear` and, in a vae, every convolution."""
    kinds = (nn.Linear, _ConvNd) if component_type == "vae" else (nn.Linear,)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module


def decide_layers(
    model: nn.Module, method: Method, component_type: str, granularity: str, skip_patterns: Sequence[str] = ()
) -> list[Layer]:
    """Every layer of `model` (which may be on meta) with its configuration or the reason to leave it alone."""
    if component_type == "vae" and method.name not in VAE_METHODS:
        raise ValueError(vae_refusal(method.name))
    owners = _weight_owners(model)
    layers = []
    for name, module in named_layers(model, component_type):
        reason = _skip_reason(name, module, method, component_type, skip_patterns) or _tie(name, module, owners)
        config = None if reason else _layer_config(module, method, granularity)
        layers.append(Layer(name, module, config, reason))
    return layers


def vae_refusal(method: str) -> str:
    """Why a VAE takes int8 only."""
    why = (
        "its convolutions lose 4 to 14 dB of PSNR against int8 when cast to fp8, and CUDA has no fp8 convolution below sm100"
        if method.startswith("fp8")
        else "four bits break the colours of its convolutions (17 to 33 dB of PSNR, against 41 to 58 with int8)"
    )
    return f"{method} is not offered for a vae, because {why}: use 'int8'"


def _skip_reason(name: str, module: nn.Module, method: Method, component_type: str, skip_patterns: Sequence[str]) -> str:
    if method.make_config is None:
        return "the method is 'none'"
    for pattern in COMPONENT_SKIPS[component_type]:
        if matches(name, pattern):
            return f"{component_type} filter {pattern!r}"
    for pattern in skip_patterns:
        if matches(name, pattern):
            return f"skip pattern {pattern!r}"
    if module._parameters.get("weight") is None:
        return "its weight is computed by a parametrization"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight directly"
    return _shape_reason(module, method)


def _shape_reason(module: nn.Module, method: Method) -> str:
    if isinstance(module, _ConvNd):
        return "the weight is empty" if 0 in module.weight.shape else ""
    assert isinstance(module, nn.Linear)
    if module.in_features == 0 or module.out_features == 0:
        return "the weight is empty"
    multiple = method.dims_multiple_of
    if module.in_features % multiple or module.out_features % multiple:
        return f"{module.in_features} x {module.out_features} is not divisible by {multiple}, which {method.name} needs"
    multiple = method.in_features_multiple_of
    if module.in_features % multiple:
        return f"in_features {module.in_features} is not divisible by the smallest group, {multiple}"
    return ""


def _layer_config(module: nn.Module, method: Method, granularity: str) -> AOBaseConfig:
    if isinstance(module, _ConvNd):
        return Int8ConvConfig(isinstance(module, _ConvTransposeNd), module.groups)
    assert method.make_config is not None
    return method.make_config(granularity)


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():  # each module once: one that is used twice is not tied to itself
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    return owners


def _tie(name: str, module: nn.Module, owners: Mapping[int, list[str]]) -> str:
    """A tied weight stays: a quantized copy beside the other owner's would take memory instead of saving it."""
    others = [owner for owner in owners[id(module.weight)] if owner != (f"{name}.weight" if name else "weight")]
    return f"its weight is tied to {others[0]!r}" if others else ""
