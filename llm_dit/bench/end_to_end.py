"""A whole pipeline in a fresh process: from its start to the first picture, and seconds a picture after that.

The pipeline has the published sizes and random weights, and the tokenizer and scheduler of the tiny pipeline of its
class. Its folder is written once, in bf16 or quantized, and kept.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import torch

from ..generate import GenerateOptions, call_arguments
from ..load import load_pipeline, pipeline_class_of
from ..names import check_name
from ..quantization import VALID_METHODS, detect_hardware
from ..writing import new_folder
from .implementations import COMPILE_MODES, MODES
from .results import END_TO_END_COLUMNS, Job, Row, Selection
from .timing import GIB, synchronize
from .worker import FATAL, ROW, emit, messages

SAVED: Final = ("bf16", "quantized")
PROMPT: Final = "a photograph of a lighthouse on a cliff in the evening light, long exposure, calm sea"


@dataclass(frozen=True)
class Case:
    """One measurement to make.

    Attributes:
        geometry: name of a geometry.
        method: quantization method of the transformer.
        mode: "eager", "compile" or "graph".
        saved: "bf16", quantized while it loads, or "quantized", saved so before.
    """

    geometry: str
    method: str
    mode: str
    saved: str = "bf16"


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        folder: where the pipelines lie, a folder each.
        steps: denoising steps; None for what the model card recommends.
        pictures: pictures after the first.
        timeout_s: seconds after which a process is given up.
    """

    folder: Path
    steps: int | None = None
    pictures: int = 2
    timeout_s: float = 1800.0


def plan(
    selection: Selection,
    saved: str = "bf16",
    folder: Path | None = None,
    steps: int | None = None,
    timeout_s: float = Options.timeout_s,
) -> Job:
    """All combinations of what is named; an empty sequence stands for a default.

    Raises:
        ValueError: for an unknown name, or an implementation other than llm-dit.
    """
    from .geometry import check_geometry

    cuda = torch.cuda.is_available()
    geometries = selection.geometries or ("klein-9b" if cuda else "tiny-klein",)
    methods = selection.methods or ("none", "fp8-dynamic" if cuda else "int8")
    modes = selection.modes or ("eager",)
    check_name(saved, SAVED, "state of the saved folder")
    for name in geometries:
        check_geometry(name)
    for names, valid, what in (
        (selection.implementations, ("llm-dit",), "implementation (end to end)"),
        (methods, VALID_METHODS, "method"),
        (modes, MODES, "mode"),
    ):
        for name in names:
            check_name(name, valid, what)
    cases = tuple(Case(*names, saved) for names in product(geometries, methods, modes))
    options = Options(folder or Path(tempfile.gettempdir()) / "llm-dit-bench", steps, timeout_s=timeout_s)
    return Job(cases, partial(run, options=options), END_TO_END_COLUMNS)


def run(cases: Sequence[Case], options: Options) -> Iterator[Row]:
    """Measures each case in a process of its own and yields its row, failed ones with `error`."""
    for case in cases:
        yield _measured(case, options)


def _measured(case: Case, options: Options) -> Row:
    folder = options.folder / case.geometry
    quantized = case.saved == "quantized" and case.method != "none"
    source = options.folder / f"{case.geometry}-{case.method}" if quantized else folder
    error = _built(folder, {"build": case.geometry, "folder": str(folder)}, options)
    if not error and quantized:
        error = _built(source, {"quantize": case.method, "folder": str(folder), "target": str(source)}, options)
    if error:
        return _failed(case, error)
    specification = {
        "case": asdict(case),
        "folder": str(source),
        "steps": options.steps,
        "pictures": options.pictures,
        "started": time.time(),
    }
    message = next(messages("llm_dit.bench.end_to_end", specification, options.timeout_s))
    return message.value if message.kind == ROW else _failed(case, message.value)


def _built(folder: Path, specification: Mapping[str, Any], options: Options) -> str:
    """Makes a folder in a process of its own, unless it is there; returns the error, or ""."""
    if (folder / "model_index.json").is_file():
        return ""
    options.folder.mkdir(parents=True, exist_ok=True)
    message = next(messages("llm_dit.bench.end_to_end", specification, options.timeout_s))
    return "" if message.kind == ROW else str(message.value)


def _failed(case: Case, error: str) -> Row:
    return {**asdict(case), "error": error, "device": detect_hardware().name, "torch": torch.__version__}


def build_folder(folder: Path, geometry: str) -> None:
    """Writes the pipeline of a geometry with random bf16 weights."""
    from ..families import published_models
    from ..tiny import build
    from .geometry import GEOMETRIES, random_model

    row = GEOMETRIES[geometry]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = build(row.tiny)
    components = published_models()[row.published].components if row.published else {}
    for name, make in components.items():
        setattr(pipe, name, random_model(make, device))
    _save(pipe, folder)


def quantize_folder(folder: Path, method: str, target: Path) -> None:
    """Loads a folder with its transformer quantized and saves it to `target`."""
    device = {"device_map": "cuda"} if torch.cuda.is_available() else {}
    _save(load_pipeline(folder, quantization=method, torch_dtype=torch.bfloat16, **device), target)


def _save(pipe: Any, folder: Path) -> None:
    with new_folder(folder) as beside:
        pipe.save_pretrained(beside, max_shard_size="5GB")


def measure(case: Case, folder: Path, steps: int | None, pictures: int, started: float) -> Row:
    """Loads and generates in this process.

    Args:
        started: `time.time()` when the process was started.
    """
    pipeline_class_of(folder)  # the family's module, with the diffusers classes that it imports
    imported = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = _load(case, folder, device)
    synchronize(device)
    loaded = time.time()
    first = _picture(pipe, case, folder, steps, device)
    first_picture = time.time() - started
    later = [_picture(pipe, case, folder, steps, device) for _ in range(pictures)]
    return {
        **asdict(case),
        "import_s": imported - started,
        "load_s": loaded - imported,
        **{f"{name}_s": seconds for name, seconds in first.items()},
        "first_picture_s": first_picture,
        "picture_s": statistics.median(sum(times.values()) for times in later) if later else None,
        **{f"later_{name}_s": statistics.median(times[name] for times in later) if later else None for name in first},
        "steps": pipe.num_timesteps,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None,
        "device": detect_hardware().name,
        "torch": torch.__version__,
    }


def _load(case: Case, folder: Path, device: torch.device) -> Any:
    keywords: dict[str, Any] = {"torch_dtype": torch.bfloat16}
    if device.type == "cuda":
        keywords["device_map"] = "cuda"
    if case.saved == "bf16" and case.method != "none":
        keywords["quantization"] = case.method
    if case.mode in COMPILE_MODES:
        keywords |= {"compile": True, "compile_mode": COMPILE_MODES[case.mode]}
    pipe = load_pipeline(folder, **keywords)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _picture(pipe: Any, case: Case, folder: Path, steps: int | None, device: torch.device) -> dict[str, float]:
    """Seconds of one picture: "encode" (the prompt), "steps" (the denoising loop) and "decode" (to the finished picture)."""
    arguments = _call(pipe, case, folder, steps)
    encoded = 0.0
    denoised = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal encoded
            synchronize(device)
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(device)
            encoded += time.perf_counter() - begin
            return result

        return call

    def step_ended(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal denoised
        if index + 1 == pipe.num_timesteps:
            synchronize(device)
            denoised = time.perf_counter()
        return {}

    with _replaced(pipe, timed):
        start = time.perf_counter()
        pipe(**arguments, callback_on_step_end=step_ended)
        synchronize(device)
        end = time.perf_counter()
    return {"encode": encoded, "steps": denoised - start - encoded, "decode": end - denoised}


@contextmanager
def _replaced(pipe: Any, timed: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While it lasts, `timed` wraps what encodes the prompt: `encode_prompt`, and LTX-2's connectors."""
    places = [(pipe, "encode_prompt")]
    if getattr(pipe, "connectors", None) is not None:
        places.append((pipe.connectors, "forward"))
    for owner, name in places:
        vars(owner)[name] = timed(getattr(owner, name))
    try:
        yield
    finally:
        for owner, name in places:
            del vars(owner)[name]


def _call(pipe: Any, case: Case, folder: Path, steps: int | None) -> dict[str, Any]:
    """The arguments of one picture: the model card's at full size, the tiny pipeline's own at tiny size."""
    from .geometry import GEOMETRIES

    chosen = {"num_inference_steps": steps} if steps else {}
    if GEOMETRIES[case.geometry].published:
        return call_arguments(pipe, GenerateOptions(str(folder), PROMPT, folder, call=chosen))
    from ..tiny import get

    return {**get(GEOMETRIES[case.geometry].tiny).call(), **chosen}


def main(specification: Mapping[str, Any]) -> None:
    """The working process: builds a folder, quantizes one, or measures a case."""
    try:
        folder = Path(specification["folder"])
        if "build" in specification:
            build_folder(folder, specification["build"])
            emit(ROW, {})
        elif "quantize" in specification:
            quantize_folder(folder, specification["quantize"], Path(specification["target"]))
            emit(ROW, {})
        else:
            case = Case(**specification["case"])
            emit(ROW, measure(case, folder, specification["steps"], specification["pictures"], specification["started"]))
    except Exception as error:
        emit(FATAL, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
