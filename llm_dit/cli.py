"""The command line. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.table import Table

from .cli_bench import bench_app
from .cli_options import (
    ActivationScale,
    AsJson,
    Backend,
    CompileMode,
    Config,
    EncoderFile,
    ForEncoder,
    ForTransformer,
    ForVae,
    Granularity,
    Model,
    Quantization,
    Skip,
    TransformerFile,
)
from .cli_plan import plan
from .names import VALID_METHODS, format_bytes
from .terminal import as_typed, console, print_plain
from .writing import check_place, new_folder

if TYPE_CHECKING:
    from .generate import GenerateOptions

app = typer.Typer(
    name="llm-dit",
    help="Quantize FLUX.2, LTX-2, Z-Image and Qwen-Image pipelines while they load.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the names of long options on a terminal of 80 columns
)
app.add_typer(bench_app, name="bench")
app.command()(plan)


def _given(**keywords: Any) -> dict[str, Any]:
    """Of keyword arguments, those that were given."""
    return {name: value for name, value in keywords.items() if value is not None}


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="The prompt.")] = None,
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="out.png, or out.mp4 for LTX-2; with --prompts a folder, out.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A list: a prompt a line, or JSON lines; shared out by torchrun.")] = None,
    quantization: Quantization = None,
    quantization_transformer: ForTransformer = None,
    quantization_encoder: ForEncoder = None,
    quantization_vae: ForVae = None,
    quantization_granularity: Granularity = None,
    quantization_backend: Backend = None,
    skip: Skip = None,
    config: Config = None,
    transformer_file: TransformerFile = None,
    encoder_file: EncoderFile = None,
    activation_scale: ActivationScale = None,
    compile: Annotated[bool | None, typer.Option("--compile/--no-compile", help="Compile the transformer.")] = None,
    compile_mode: CompileMode = None,
    negative_prompt: Annotated[str | None, typer.Option()] = None,
    height: Annotated[int | None, typer.Option(min=1)] = None,
    width: Annotated[int | None, typer.Option(min=1)] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu; the first there is by default.")] = "",
    offload: Annotated[str, typer.Option(help="none, model or sequential.")] = "none",
    context_parallel: Annotated[
        str, typer.Option(help="ulysses or ring: one picture on the GPUs of all processes that torchrun starts.")
    ] = "",
    vram: Annotated[str | None, typer.Option(help="With --quantization auto: the memory to stay inside of, e.g. 12GB.")] = None,
) -> None:
    """Generate an image or a clip, or a list of them."""
    if (prompt is None) == (prompts is None):
        raise ValueError("give a prompt, or --prompts FILE, one of the two")
    if prompts and context_parallel:
        raise ValueError("--prompts gives each GPU prompts of its own and --context-parallel parts of one picture: leave one out")
    if not model and not context.obj:
        raise ValueError("which model? give --model a folder or a repository id")
    if compile_mode and compile is False:
        raise ValueError("--compile-mode says how to compile, and --no-compile not to: leave one out")
    if not prompts:
        check_place(output)

    from .families import get_family
    from .generate import GenerateOptions
    from .load import pipeline_class_of

    family = get_family(context.obj) if context.obj else None
    source = model or (family.published[0].repo_id if family else "")
    found = pipeline_class_of(source).family
    if family and found.name != family.name:
        raise ValueError(f"{source!r} holds a {found.title} pipeline: use pipelines/{found.name}.py or llm-dit generate")
    if frames and not found.generation.video:
        raise ValueError(f"{source!r} makes pictures, and --frames is for clips: leave it out")
    load = _given(
        quantization=quantization,
        quantization_transformer=quantization_transformer,
        quantization_encoder=quantization_encoder,
        quantization_vae=quantization_vae,
        quantization_granularity=quantization_granularity,
        quantization_backend=quantization_backend,
        quantization_skip=skip or None,
        config=config,
        transformer_file=transformer_file,
        encoder_file=encoder_file,
        activation_scale=activation_scale,
        compile=True if compile_mode else compile,
        compile_mode=compile_mode,
        vram_budget=vram,
    )
    call = {
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
    }
    target = output or Path("out" if prompts else "out.mp4" if found.generation.video else "out.png")
    options = GenerateOptions(source, prompt or "", target, load, call, guidance, seed, device, offload, context_parallel)
    if prompts:
        _generate_list(prompts, options)
    else:
        _generate_one(options)


def _generate_one(options: GenerateOptions) -> None:
    from .generate import generate as run
    from .parallel import rank

    result = run(options)
    if options.context_parallel and rank():
        return
    print_plain(str(result.pipe.quantization_report))
    console.print(f"{result.output}: loaded in {result.load_seconds:.1f} s, made in {result.generate_seconds:.1f} s")


def _generate_list(prompts: Path, options: GenerateOptions) -> None:
    from .parallel import rank
    from .prompts import read_prompts, run_prompts

    asked = read_prompts(prompts)
    ran = run_prompts(asked, options)
    if rank():
        return
    if ran.pipe is not None:
        print_plain(str(ran.pipe.quantization_report))
    print_plain(
        f"{options.output}: {len(asked) - len(ran.failed)} of {len(asked)} prompts done, {ran.made} of them by this process"
    )
    if ran.failed:
        number, error = next(iter(ran.failed.items()))
        raise RuntimeError(f"{len(ran.failed)} prompts failed, the first of them number {number}: {error}")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A folder or a repository id.")],
    output: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    quantization: Quantization = None,
    quantization_transformer: ForTransformer = None,
    quantization_encoder: ForEncoder = None,
    quantization_vae: ForVae = None,
    quantization_granularity: Granularity = None,
    skip: Skip = None,
    config: Config = None,
) -> None:
    """Load a pipeline, quantize it and save it."""
    if output.exists():
        raise ValueError(f"{str(output)!r} exists already: give a folder that does not")
    check_place(output)
    methods = (quantization, quantization_transformer, quantization_encoder, quantization_vae)
    if not any(methods) and config is None:
        raise ValueError("quantize needs a method: give --quantization, e.g. int8, one for a component, or a --config")
    if quantization == "auto":
        raise ValueError("--quantization auto plans for the card at hand: to save, name a method, e.g. int8")

    import torch

    from .load import load_pipeline
    from .loader import quantized_in

    if before := quantized_in(model):
        raise ValueError(f"{model} is quantized already ({', '.join(before)}): give the bf16 model")
    load = _given(
        quantization=quantization,
        quantization_transformer=quantization_transformer,
        quantization_encoder=quantization_encoder,
        quantization_vae=quantization_vae,
        quantization_granularity=quantization_granularity,
        quantization_skip=skip or None,
        config=config,
    )
    pipe = load_pipeline(model, torch_dtype=torch.bfloat16, **load)
    if all(report.method == "none" for report in pipe.quantization_report):
        raise ValueError(
            "quantize has nothing to quantize, for every component's method is 'none': give --quantization, e.g. int8"
        )
    with new_folder(output) as beside:
        pipe.save_pretrained(beside)
    print_plain(str(pipe.quantization_report))
    console.print(f"saved to {output}")


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="A folder, a repository id, a name such as klein-9b, or a class.")],
    quantization_granularity: Granularity = None,
    skip: Skip = None,
    as_json: AsJson = False,
) -> None:
    """Exact weight bytes per component and method; downloads and loads no weights."""
    from .estimate import estimate_pipeline

    result = estimate_pipeline(model, quantization_granularity or "per-row", skip or ())
    if as_json:
        console.print_json(json.dumps(result.to_dict()))
        return
    table = Table("component", "role", "parameters", *VALID_METHODS, title=f"{result.source}: {result.pipeline_class}")
    rows = [(one, one.name) for one in result.components]
    rows += [(one, f"{one.name}, encoder_layers='read'") for one in result.reading]
    for component, name in rows:
        cells = [format_bytes(component.bytes_for(m)) if m in component.methods else "-" for m in VALID_METHODS]
        if component.saved:
            cells = [f"saved: {format_bytes(component.saved)}"] + [""] * (len(VALID_METHODS) - 1)
        table.add_row(name, component.role, f"{component.parameters / 1e6:,.1f} M", *cells)
    table.add_section()
    table.add_row("all", "", "", *(format_bytes(result.held(m)) for m in VALID_METHODS))
    if result.freed:
        table.add_row("at once, with encode_then_free", "", "", *(format_bytes(result.held_at_once(m)) for m in VALID_METHODS))
    console.print(table)


@app.command()
def recommend(
    model: Annotated[str | None, typer.Argument(help="A folder, a repository id, a name, or a class.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which method for which component on this machine, and why."""
    from .estimate import estimate_pipeline
    from .quantization import detect_hardware
    from .recommend import recommend as decide

    result = decide(detect_hardware(), estimate_pipeline(model) if model else None)
    if as_json:
        console.print_json(json.dumps({"methods": dict(result.methods), "reasons": list(result.reasons)}))
        return
    for role, method in result.methods.items():
        console.print(f"{role}: {method}")
    for reason in result.reasons:
        console.print(f"  {reason}", soft_wrap=True)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A pipeline folder or a .safetensors file.")],
    as_json: AsJson = False,
) -> None:
    """What a pipeline folder or a checkpoint file holds."""
    from .inspection import inspect_path

    found = inspect_path(path)
    if as_json:
        console.print_json(json.dumps(found))
        return
    components = found.pop("components", None)
    for key, value in found.items():
        print_plain(f"{key}: {_readable(key, value)}")
    if components is not None:
        table = Table("component", "class", "saved as", "size", "by dtype")
        for name, part in components.items():
            size = format_bytes(part["bytes"]) if "bytes" in part else ""
            by_dtype = _readable("bytes_by_dtype", part.get("bytes_by_dtype", {}))
            table.add_row(name, part["class_name"], part.get("quantization", ""), size, by_dtype)
        console.print(table)


def _readable(key: str, value: Any) -> str:
    """A value in a line: bytes in their units, of a long list the first few."""
    if isinstance(value, list):
        return f"{len(value)}: {', '.join(map(str, value[:6]))}, ..." if len(value) > 6 else ", ".join(map(str, value)) or "none"
    if key == "bytes":
        return format_bytes(value)
    return ", ".join(f"{kind} {format_bytes(size)}" for kind, size in value.items()) if isinstance(value, dict) else str(value)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A pipeline folder, its transformer folder, or a .safetensors file, in bf16.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write; must not exist.")],
    layout: Annotated[str, typer.Option(help="bfl (FLUX.2), ltx (LTX-2) or comfy (all).")] = "comfy",
) -> None:
    """Write a transformer as scaled fp8 in an official layout, for ComfyUI and diffusers alike."""
    from .checkpoints.convert import convert as run

    result = run(source, output, layout)
    counts = f"{result.fp8_weights} weights in fp8, {result.other_tensors} tensors as they were"
    print_plain(f"{result.path}: {counts}, {result.nbytes:,} bytes")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the pictures and demo.png go.")] = Path("demo"),
    methods: Annotated[str, typer.Option(help="Methods beside bf16, with commas; by default all that run here.")] = "",
) -> None:
    """Draw three captions with a trained tiny Z-Image, in bf16 and quantized, and compare them on one sheet."""
    from .bench.quality import methods_of
    from .bench.quality_report import table
    from .demo import run_demo

    shown = run_demo(folder, methods_of(methods))
    for reason in shown.left_out:
        print_plain(f"left out: {reason}")
    print_plain(shown.report)
    print_plain(table(shown.rows))
    console.print(f"wrote {shown.sheet}")


def main() -> NoReturn:
    """The entry point `llm-dit`."""
    _run()


def run_family_script(family: str) -> NoReturn:
    """`pipelines/<family>.py`: `generate`, for one family."""
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    script.command()(generate)
    _run(script, obj=family)


def run_command(*words: str) -> NoReturn:
    """Runs a subcommand with the process's own arguments."""
    _run(args=[*words, *sys.argv[1:]])


def _run(typer_app: typer.Typer = app, args: list[str] | None = None, obj: Any = None) -> NoReturn:
    """Runs an app; a failure is one line on standard error and exit code 2, never a traceback."""
    _quiet_imports()
    try:
        code = typer_app(args=args, standalone_mode=False, obj=obj)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        # Usage errors are click's, of the copy that typer brings or of the installed one: told by what they can do.
        if not hasattr(error, "format_message"):
            _fail(error)
        elif type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
        else:
            print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code if isinstance(code, int) else 0)  # of a typer.Exit, which comes back as a result


def _fail(error: Exception) -> None:
    """One line on standard error; an error that is not made for users names its type too."""
    told = isinstance(error, ValueError | RuntimeError | OSError | ImportError | NotImplementedError)
    message = as_typed(" ".join(str(error).split()))
    print(f"error: {message if told and message else f'{type(error).__name__}: {message}'}", file=sys.stderr)


def _quiet_imports() -> None:
    """Silences what torchao 0.18, diffusers 0.42 and transformers 5 say at import about optional parts that are not there."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("torchao", "diffusers.quantizers.torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)


if __name__ == "__main__":
    main()
