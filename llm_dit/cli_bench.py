"""`llm-dit bench`. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import Again, Results, Table
from .names import VALID_METHODS, format_bytes
from .terminal import METHODS_HELP, print_plain
from .writing import check_place, write_text

bench_app = typer.Typer(help="Benchmarks, each measurement in a fresh process.", no_args_is_help=True, rich_markup_mode=None)


@bench_app.command()
def load(
    geometry: Annotated[str, typer.Option(help="1gb or klein-9b.")] = "1gb",
    folder: Annotated[Path | None, typer.Option(help="Where the random weights lie; kept between runs.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each case; the fastest counts.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the figures as JSON.", callback=check_place)
    ] = None,
) -> None:
    """Load time and peak memory: bf16, plain diffusers + TorchAoConfig, llm-dit."""
    import tempfile
    from dataclasses import asdict

    from .bench import load as bench

    place = folder or Path(tempfile.gettempdir()) / f"llm-dit-bench-{geometry}"
    bench.build_folder(place, geometry)
    print_plain(bench.HEADER)
    results = []
    for result in bench.run(place, bench.default_cases(), repeats):
        results.append(asdict(result))
        print_plain(bench.row(result))
        if output:
            write_text(output, json.dumps(results, indent=2) + "\n")


@bench_app.command()
def speed(
    geometry: Annotated[list[str] | None, typer.Option(help="klein-9b, ltx-2.3, tiny-klein ...; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"{METHODS_HELP}, or layerwise; repeatable; all.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="eager, compile, graph or eager-graph; repeatable; all.")] = None,
    implementation: Annotated[list[str] | None, typer.Option(help="llm-dit, torchao, diffusers, sdnq; repeatable.")] = None,
    output: Results = None,
    table: Table = None,
    plot: Annotated[Path | None, typer.Option(help="Draw speed by memory and error into a PNG.", callback=check_place)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Timed forwards (10); with --end-to-end, denoising steps.")] = None,
    warmups: Annotated[int, typer.Option(min=1, help="Forwards before the timed ones.")] = 3,
    fresh: Annotated[bool, typer.Option("--fresh/--no-fresh", help="A process for every case, or one a geometry.")] = True,
    profile: Annotated[bool, typer.Option("--profile", help="On a GPU, record the time by kind of kernel too.")] = False,
    again: Again = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a case is given up.")] = 900,
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="Whole pipelines, from process start to picture.")] = False,
    saved: Annotated[str, typer.Option(help="End to end: the folder holds the bf16 or the quantized model.")] = "bf16",
    folder: Annotated[Path | None, typer.Option(help="End to end: where the pipelines lie; kept between runs.")] = None,
) -> None:
    """Time, memory and error of one transformer step, beside stock torchao, diffusers and SDNQ."""
    from .bench.results import Selection, report

    selection = Selection(*(tuple(names or ()) for names in (geometry, implementation, method, mode)))
    if end_to_end:
        from .bench import end_to_end as pipelines

        job = pipelines.plan(selection, saved=saved, folder=folder, steps=steps, timeout_s=timeout)
    else:
        from .bench import speed as forwards

        job = forwards.plan(selection, steps=steps or 10, warmups=warmups, fresh=fresh, timeout_s=timeout, profile=profile)
    report(job, print_plain, output, table, plot, again)


@bench_app.command()
def checkpoint(
    geometry: Annotated[list[str] | None, typer.Option(help="klein-9b, ltx-2.3, tiny-klein ...; repeatable.")] = None,
    output: Results = None,
    table: Table = None,
    folder: Annotated[Path | None, typer.Option(help="Where the files lie while it runs.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed forwards.")] = 5,
    again: Again = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a case is given up.")] = 900,
) -> None:
    """An official-layout fp8 file against run-time quantization and layerwise casting."""
    import tempfile

    from .bench.checkpoint import plan
    from .bench.results import report

    place = folder or Path(tempfile.gettempdir()) / "llm-dit-bench-checkpoint"
    report(plan(geometry or ["tiny-klein"], place, steps, timeout), print_plain, output, table, None, again)


@bench_app.command()
def lora(
    geometry: Annotated[list[str] | None, typer.Option(help="klein-9b, z-image, tiny-klein ...; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"{METHODS_HELP}; repeatable; all.")] = None,
    output: Results = None,
    table: Table = None,
    folder: Annotated[Path | None, typer.Option(help="Where the bf16 model lies while it runs.")] = None,
    again: Again = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a case is given up.")] = 900,
) -> None:
    """Fusing 1, 2 and 4 LoRAs into quantized weights: seconds and peak memory."""
    import tempfile

    from .bench.lora import plan
    from .bench.results import report

    place = folder or Path(tempfile.gettempdir()) / "llm-dit-bench-lora"
    methods = method or [name for name in VALID_METHODS if name != "none"]
    report(plan(geometry or ["tiny-klein"], methods, place, timeout), print_plain, output, table, None, again)


@bench_app.command()
def calibrate(
    geometry: Annotated[list[str] | None, typer.Option(help="klein-9b, ltx-2.3 ..., or a tiny one; repeatable; all.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Points measured at once, 5 to 20 GB of the card each.")] = 1,
    output: Results = None,
    table: Table = None,
    again: Again = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a point is given up.")] = 300,
    fit: Annotated[Path | None, typer.Option(help="Measure nothing: write the constants that these results give.")] = None,
) -> None:
    """Device memory of single components by size and method: what the planner's constants come from."""
    from .bench.calibrate import plan
    from .bench.results import report

    if fit is not None:
        from .bench.fit import fit as fitted

        print_plain(fitted(fit).model_dump_json(indent=2))
        return
    report(plan(geometry or (), jobs, timeout), print_plain, output, table, None, again)


@bench_app.command()
def budgets(
    model: Annotated[
        list[str] | None, typer.Option(help="klein-4b, flux2-dev ..., or with --vram a tiny one; repeatable.")
    ] = None,
    vram: Annotated[str | None, typer.Option(help="Another budget than the one each model is promised in.")] = None,
    output: Results = None,
    table: Table = None,
    folder: Annotated[Path | None, typer.Option(help="Where the pipelines lie while they run: up to 45 GB.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 2,
    again: Again = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a process is given up.")] = 400,
) -> None:
    """Whole pipelines in the budgets that their plans promise, and plain diffusers in the same."""
    import tempfile

    from .bench.budgets import Options, plan
    from .bench.results import report

    options = Options(folder or Path(tempfile.gettempdir()) / "llm-dit-bench-budgets", steps, timeout)
    report(plan(model or (), vram, options), print_plain, output, table, None, again)


@bench_app.command()
def quality(
    source: Annotated[str, typer.Argument(help="A pipeline's folder or repository id.")],
    methods: Annotated[str, typer.Option(help="Methods of the transformer, separated by commas.")] = "int8,fp8-dynamic,int4",
    captions: Annotated[
        int | None, typer.Option(min=1, help="Prompts: so many captions of scenes (clips: LTX-2), and their score.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts: a text file, one a line.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Keeps pictures and results (quality/NAME); a later run goes on from it.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1)] = None,
    width: Annotated[int | None, typer.Option(min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    floor: Annotated[str, typer.Option(help="What bf16 itself is compared with: float32, compile or skip.")] = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Prompts of one call.")] = 1,
    sheet: Annotated[Path | None, typer.Option(help="A contact sheet, PNG.", callback=check_place)] = None,
    report: Annotated[Path | None, typer.Option(help="A report that holds all it shows, HTML.", callback=check_place)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The same prompts and seeds under each method: PSNR, SSIM, FLIP, latents, noisiest layers, caption score."""
    from .bench import quality as bench
    from .bench.quality_report import check_sheet, contact_sheet, table, write_report

    check_sheet(sheet)
    asked = _asked(source, captions, prompts)
    options = bench.Options(
        source,
        tuple(bench.methods_of(methods)),
        asked,
        folder or bench.default_folder(source),
        captions is not None,
        _call(height, width, steps),
        floor,
        batch,
    )
    rows = list(bench.run(options))
    if sheet:
        contact_sheet(rows, options.folder, asked).save(sheet)
    if report:
        write_report(report, rows, options.folder, asked)
    print_plain(json.dumps(rows, indent=2) if as_json else table(rows))


def _asked(source: str, captions: int | None, prompts: Path | None) -> tuple[str, ...]:
    """So many captions of what the pipeline of `source` makes, or the lines of a file."""
    from .bench.quality import captions_for

    if captions is not None and prompts is None:
        return captions_for(source, captions)
    if prompts is not None and captions is None:
        return _lines(prompts)
    raise ValueError("give --captions N or --prompts FILE, one of the two")


def _call(height: int | None, width: int | None, steps: int | None) -> dict[str, int]:
    """Those that are given, as a pipeline's call takes them."""
    given = {"height": height, "width": width, "num_inference_steps": steps}
    return {name: value for name, value in given.items() if value is not None}


def _lines(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not empty."""
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} of prompts")
    found = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not found:
        raise ValueError(f"{str(path)!r} holds no prompt: write one a line")
    return found


@bench_app.command()
def sensitivity(
    source: Annotated[str, typer.Argument(help="A pipeline's folder or repository id.")],
    method: Annotated[str, typer.Option(help="Method of the transformer.")] = "int4",
    at_least: Annotated[float, typer.Option("--psnr", help="The quality to hold: median PSNR in dB against bf16.")] = 30.0,
    by: Annotated[str, typer.Option(help="Groups of layers: kind (one Linear of all like blocks) or block.")] = "kind",
    captions: Annotated[int | None, typer.Option(min=1, help="Prompts: so many captions of scenes.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts: a text file, one a line.")] = None,
    height: Annotated[int | None, typer.Option(min=1)] = None,
    width: Annotated[int | None, typer.Option(min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    output: Results = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts of one call.")] = 1,
    toml: Annotated[Path | None, typer.Option(help="Write the section of config.toml.", callback=check_place)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Which layers a method harms most per byte, and the skip list that holds a quality at the fewest bytes."""
    from dataclasses import asdict

    from .bench import sensitivity as bench

    asked = _asked(source, captions, prompts)
    trial = bench.Sensitivity(bench.Options(source, method, asked, by, _call(height, width, steps), output, batch))
    rows = sorted(trial.rows(), key=lambda row: -row["harm_per_mib"])
    if not as_json:  # before it is known whether any mix holds what is asked for
        print_plain("| group | layers | saves | error | PSNR dB | harm per MiB |\n|---|---|---|---|---|---|")
        for row in rows:
            cells = (row["group"], row["layers"], format_bytes(row["bytes_saved"]), f"{row['error']:.4f}", f"{row['psnr']:.1f}")
            print_plain(f"| {' | '.join(map(str, cells))} | {row['harm_per_mib']:.3g} |")
    uniform, mix = trial.uniform, trial.best(rows, at_least)
    section = bench.toml_of(trial.pipe.family.name, trial.method.name, mix)
    if toml:
        write_text(toml, section)
    if as_json:
        print_plain(json.dumps({"groups": rows, "uniform": asdict(uniform), "mix": asdict(mix)}, indent=2))
        return
    for title, one in (("all groups", uniform), (f"{len(mix.skip)} groups left alone", mix)):
        print_plain(f"{title}: {one.psnr:.1f} dB, transformer {format_bytes(one.bytes)}")
    print_plain(section)


@bench_app.command("int4")
def int4_grids(
    source: Annotated[str, typer.Argument(help="A pipeline's folder or repository id.")],
    captions: Annotated[int, typer.Option(min=1, help="Prompts: so many captions of scenes.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Prompts of one call.")] = 10,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON of the rows.", callback=check_place)] = None,
) -> None:
    """Ways to choose int4 values, compared on pictures: group sizes, symmetry, clipping, HQQ, a low-rank correction."""
    from .bench import int4_grids as bench
    from .bench.sensitivity import Options, Sensitivity

    bench.require_pictures(source)
    rows = list(bench.compare(Sensitivity(Options(source, "int4", _asked(source, captions, None), batch=batch))))
    if output:
        write_text(output, json.dumps(rows, indent=2) + "\n")
    print_plain(bench.table(rows))


@bench_app.command()
def parallel(
    geometry: Annotated[str, typer.Option(help="The transformer that is split: qwen-image, tiny-qwen-image ...")] = "",
    pipeline: Annotated[str, typer.Option(help="The pipeline that a list goes through: klein-4b, tiny-z-image ...")] = "",
    method: Annotated[str, typer.Option(help=f"Method of the transformer: {METHODS_HELP}.")] = "",
    gpus: Annotated[int, typer.Option(min=0, help="Processes, a GPU each; all GPUs.")] = 0,
    pixels: Annotated[int, typer.Option(min=0, help="Side of the picture that is split.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Prompts of the list.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a prompt.")] = 8,
    output: Results = None,
    table: Table = None,
    folder: Annotated[Path | None, typer.Option(help="Where the pipeline lies; kept between runs.")] = None,
    again: Again = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds without a result after which processes are given up.")] = 600,
) -> None:
    """Several GPUs against one: a large picture split between them, and a list of prompts shared out."""
    import tempfile

    from .bench.parallel import Options, plan
    from .bench.results import report

    options = Options(folder or Path(tempfile.gettempdir()) / "llm-dit-bench", timeout_s=timeout)
    report(plan(geometry, pipeline, method, gpus, pixels, count, steps, options), print_plain, output, table, None, again)


@bench_app.command()
def soak(
    pipeline: Annotated[list[str] | None, typer.Option(help="A tiny pipeline: z-image, flux2-klein ...; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"{METHODS_HELP}; repeatable.")] = None,
    generations: Annotated[int, typer.Option(min=1, help="Generations of each.")] = 200,
    output: Results = None,
    again: Again = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a soak is given up.")] = 1800,
) -> None:
    """Is memory flat over many generations, through compiling, LoRA swaps and offloading?"""
    from .bench.results import report
    from .bench.soak import plan

    report(plan(pipeline or ["z-image"], method or ["int8"], generations, timeout), print_plain, output, None, None, again)
