"""Prompt in, PNG or MP4 out: the code behind `llm-dit generate` and the scripts under pipelines/."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from .families.base import Family
from .forwards import FRAME_RATE
from .load import load_pipeline, pipeline_class_of
from .loader import quantized_in, read_json
from .mixin import QuantizablePipelineMixin
from .names import CALL_FILE, CONTEXT_PARALLEL, check_name, nearest
from .parallel import process_group, rank
from .quantization.hardware import current_device
from .writing import check_place

logger = logging.getLogger(__name__)
OFFLOADS: Final = ("none", "model", "sequential")


@dataclass(frozen=True)
class GenerateOptions:
    """One generation.

    Attributes:
        model: a folder or repository id.
        prompt: the prompt.
        output: the file to write, .png or .mp4.
        load: keyword arguments of `from_pretrained`, quantization* among them.
        call: keyword arguments of the pipeline's call, over the family's defaults; None values are left out.
        guidance: value of the pipeline's guidance parameter, whatever it is called.
        seed: seed of the noise.
        device: "cuda", "cpu", or "" for the first that there is.
        offload: "none", "model" (one component on the device at a time) or "sequential".
        context_parallel: "ulysses" or "ring" to split the picture between the processes that torchrun started; "" for one.
    """

    model: str
    prompt: str
    output: Path
    load: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    seed: int = 0
    device: str = ""
    offload: str = "none"
    context_parallel: str = ""


@dataclass(frozen=True)
class Generated:
    """What came of it.

    Attributes:
        output: the file written.
        pipe: the pipeline, with its report.
        load_seconds, generate_seconds: time of the two parts.
    """

    output: Path
    pipe: QuantizablePipelineMixin
    load_seconds: float
    generate_seconds: float


def generate(options: GenerateOptions) -> Generated:
    """Loads a pipeline, generates once and writes the file.

    Raises:
        ValueError: for an argument that the pipeline does not take, or an output of the wrong kind.
    """
    check_name(options.offload, OFFLOADS, "offload")
    if options.context_parallel:
        check_name(options.context_parallel, CONTEXT_PARALLEL, "kind of context parallelism")
    check_output(options.output, pipeline_class_of(options.model).family.generation.video)
    with process_group(torch.device(_device(options))) if options.context_parallel else nullcontext():
        return _generate(options)


def _generate(options: GenerateOptions) -> Generated:
    start = time.perf_counter()
    pipe = load(options)
    if options.context_parallel:
        pipe.enable_context_parallel(options.context_parallel)
    loaded = time.perf_counter()
    call = call_arguments(pipe, options)
    result = pipe(**call)
    if not options.context_parallel or rank() == 0:
        write_output(options.output, result, pipe, call)
    return Generated(options.output, pipe, loaded - start, time.perf_counter() - loaded)


def load(options: GenerateOptions) -> QuantizablePipelineMixin:
    """The pipeline of `options`, on its device or offloaded; what it cannot make is refused before anything is read."""
    device = _device(options)
    check_sizes(pipeline_class_of(options.model).family, options.call)
    planned = options.load.get("quantization") == "auto"
    if options.offload != "none" and device == "cpu":
        raise ValueError(
            f"offload={options.offload!r} is for models that do not fit a GPU, and this runs on the CPU: leave it out"
        )
    if planned and options.device == "cpu" and torch.cuda.is_available():
        raise ValueError("quantization='auto' plans for the GPU, and device is 'cpu': leave it out, or name a method")
    if planned and options.offload != "none":
        raise ValueError("quantization='auto' offloads as its plan says: leave offload out, or name a method")
    on_device = options.offload == "none" and device != "cpu" and not planned
    dtype = {} if quantized_in(options.model) else {"torch_dtype": torch.bfloat16}  # what was saved quantized has its own
    keywords = {**dtype, **options.load}
    pipe = load_pipeline(options.model, **({"device_map": device} if on_device else {}), **keywords)
    if options.offload == "model":
        pipe.enable_model_cpu_offload(device=_numbered(device))
    elif options.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=_numbered(device))
    elif planned and not pipe.planned:
        pipe.to(device)
    return pipe


def check_sizes(family: Family, call: Mapping[str, Any]) -> None:
    """Raises ValueError for a height, width or number of frames in `call` that the family's pipelines cannot make."""
    family.forwards.check(family.title, call.get("height"), call.get("width"), call.get("num_frames"))


def _device(options: GenerateOptions) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _numbered(device: str) -> torch.device:
    """The device with its number: without one, offloading takes the first GPU, whichever is current."""
    return current_device() if device == "cuda" else torch.device(device)


def call_arguments(pipe: QuantizablePipelineMixin, options: GenerateOptions) -> dict[str, Any]:
    """The keyword arguments of the call: what the user gave, over the model's own call.json, over what the family recommends.

    A default that this pipeline of the family does not take is left out; an argument of the user's is refused.
    """
    family = pipe.family.generation
    accepted = tuple(inspect.signature(pipe.__call__).parameters)
    given = {name: value for name, value in options.call.items() if value is not None}
    if options.guidance is not None:
        given[family.guidance_argument] = options.guidance
    for name in given:
        if name not in accepted:
            raise ValueError(f"{type(pipe).__name__} takes no argument {name!r}: {nearest(name, accepted)}")
    if "prompt" not in accepted:
        raise ValueError(f"{type(pipe).__name__} takes no prompt: call it from Python with the inputs it wants")
    defaults = {**family.call, **family.adapt(pipe), **_own_call(options.model)}
    arguments = {name: value for name, value in defaults.items() if name in accepted}
    return {
        **arguments,
        **given,
        "prompt": options.prompt,
        "generator": torch.Generator("cpu").manual_seed(options.seed),
    }


def _own_call(model: str) -> dict[str, Any]:
    """What the folder of a model says it is called with, in its call.json; those that `llm_dit.tiny.training` trains have one."""
    return read_json(model, CALL_FILE, {}) if Path(model).is_dir() else {}


def check_output(output: Path, video: bool) -> None:
    """Raises ValueError unless the file's ending fits what is written, or its folder does not exist."""
    wanted = ".mp4" if video else ".png"
    if output.suffix.lower() != wanted:
        raise ValueError(f"the output {str(output)!r} must end in {wanted}, which is what this pipeline makes")
    check_place(output)


def write_output(output: Path, result: Any, pipe: QuantizablePipelineMixin, call: Mapping[str, Any]) -> None:
    """Writes the first result beside its place and then moves it there, so that a failure leaves no half file."""
    beside = output.with_name(f".{output.stem}.part{output.suffix}")
    try:
        if pipe.family.generation.video:
            _write_video(beside, result, pipe, float(call.get("frame_rate", FRAME_RATE)))
        else:
            images = result.images
            image = images[0][0] if isinstance(images[0], list) else images[0]
            assert isinstance(image, Image.Image)
            image.save(beside)
        beside.replace(output)
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()


def _write_video(path: Path, result: Any, pipe: QuantizablePipelineMixin, frame_rate: float) -> None:
    from diffusers.utils import encode_video

    audio = getattr(result, "audio", None)
    waveform = audio[0].float().cpu() if audio is not None else None
    rate = pipe.vocoder.config.output_sampling_rate if waveform is not None else None
    encode_video(result.frames[0], int(frame_rate), str(path), audio=waveform, audio_sample_rate=rate)
