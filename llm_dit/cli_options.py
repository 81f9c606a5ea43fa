"""Options that several commands take. A wrong name, or a place without its folder, is answered before torch is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .names import ACTIVATION_SCALES, BACKENDS, COMPILE_MODES, GRANULARITIES, check_name, method_name
from .terminal import METHODS_HELP
from .writing import check_place


def _method(option: typer.CallbackParam, value: str | None) -> str | None:
    """The method as it was given."""
    if value is not None and (value, option.name) != ("auto", "quantization"):
        method_name(value, str(option.name))
    return value


def _one_of(valid: tuple[str, ...]) -> Callable[[typer.CallbackParam, str | None], str | None]:
    def check(option: typer.CallbackParam, value: str | None) -> str | None:
        return None if value is None else check_name(value, valid, str(option.name))

    return check


def _method_option(text: str) -> Any:
    return typer.Option(help=text, callback=_method)


Model = Annotated[str | None, typer.Option("--model", "-m", help="A folder or a repository id.")]
Quantization = Annotated[str | None, _method_option(f"Method of the transformer: {METHODS_HELP}; or auto.")]
ForTransformer = Annotated[str | None, _method_option(f"Method of the transformer: {METHODS_HELP}.")]
ForEncoder = Annotated[str | None, _method_option(f"Method of the text encoder: {METHODS_HELP}.")]
ForVae = Annotated[str | None, _method_option("Method of the VAE: none or int8.")]
Granularity = Annotated[
    str | None, typer.Option(help="per-row or per-tensor, for the fp8 methods.", callback=_one_of(GRANULARITIES))
]
Backend = Annotated[str | None, typer.Option(help="torchao, layerwise or checkpoint.", callback=_one_of(BACKENDS))]
Skip = Annotated[list[str] | None, typer.Option(help="A name pattern left in bf16; may be given several times.")]
Config = Annotated[str | None, typer.Option(help="A config.toml; options win over it.")]
TransformerFile = Annotated[
    str | None, typer.Option(help="A single-file checkpoint of the transformer, fp8 or bf16: a path, or owner/repository/file.")
]
EncoderFile = Annotated[str | None, typer.Option(help="The same for the text encoder.")]
ActivationScale = Annotated[
    str | None,
    typer.Option(help="dynamic, or static: the scales that an fp8 checkpoint holds.", callback=_one_of(ACTIVATION_SCALES)),
]
CompileMode = Annotated[
    str | None,
    typer.Option(help="Compile, in a mode of torch.compile, cuda-graph or cuda-graph-eager.", callback=_one_of(COMPILE_MODES)),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Results = Annotated[
    Path | None, typer.Option("--output", "-o", help="JSON of the results; a later run goes on from it.", callback=check_place)
]
Table = Annotated[Path | None, typer.Option(help="Write the Markdown table.", callback=check_place)]
Again = Annotated[bool, typer.Option("--again", help="Measure what the results hold already too.")]
