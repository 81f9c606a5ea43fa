"""How long a pipeline takes to load and how much memory that takes: bf16, plain diffusers with torchao, and llm-dit.

Every measurement is a fresh process over the same folder. Host memory is anonymous memory (`RssAnon`): mapped files
are the page cache's and can be dropped. It is sampled every two milliseconds and counted from the level just before
`from_pretrained`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import Flux2Transformer2DModel
from torch import nn
from tqdm.auto import tqdm

from ..families import published_models
from ..load import load_pipeline
from ..names import check_name
from ..quantization.sizes import model_bytes
from ..writing import new_folder
from .fresh import FreshProcessError, in_fresh_process

MIB: Final = 1024**2
GEOMETRIES: Final = ("1gb", "klein-9b")


@dataclass(frozen=True)
class Case:
    """One measurement to make.

    Attributes:
        implementation: "bf16" (plain), "diffusers" (its TorchAoConfig), "llm-dit", or "llm-dit saved": a folder that it saved
            quantized, read back.
        method: the quantization method; "none" for bf16.
        device_map: "cuda", "cpu" or None.
    """

    implementation: str
    method: str
    device_map: str | None = None

    @property
    def label(self) -> str:
        method = "" if self.method == "none" else f" {self.method}"
        place = f", device_map={self.device_map!r}" if self.device_map else ""
        return f"{self.implementation}{method}{place}"


@dataclass(frozen=True)
class Measurement:
    """What one load took.

    Attributes:
        seconds: from the call of `from_pretrained` to its return; without device_map, on a GPU, moving there included.
        move_seconds: the part of `seconds` that moving to the GPU took.
        held_bytes: storage of all components afterwards.
        host_peak_bytes: peak of anonymous host memory above the level before.
        device_peak_bytes: peak of allocated device memory, 0 without a GPU.
        device_held_bytes: allocated device memory afterwards.
        error: why there is no measurement, or "".
    """

    case: Case
    seconds: float = 0.0
    move_seconds: float = 0.0
    held_bytes: int = 0
    host_peak_bytes: int = 0
    device_peak_bytes: int = 0
    device_held_bytes: int = 0
    error: str = ""


def build_folder(folder: Path, geometry: str) -> None:
    """Writes a klein pipeline with random weights: at "1gb" about 1.2 GB in bf16, half of it text encoder.

    Only the transformer (and at "1gb" the text encoder) has size; the rest is the tiny klein's.
    """
    from ..tiny import build
    from .geometry import random_model

    check_name(geometry, GEOMETRIES, "geometry")
    if (folder / "model_index.json").is_file():
        return
    pipe = build("flux2-klein")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if geometry == "1gb":
        pipe.transformer = random_model(lambda: Flux2Transformer2DModel(**_SMALL_TRANSFORMER), device)
        pipe.text_encoder = random_model(_small_text_encoder, device)
    else:
        pipe.transformer = random_model(published_models()[geometry].components["transformer"], device)
    with new_folder(folder) as beside:
        pipe.save_pretrained(beside, max_shard_size="5GB")


_SMALL_TRANSFORMER: Final[dict[str, Any]] = {
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 16,
    "joint_attention_dim": 1536,
    "guidance_embeds": False,
}


def _small_text_encoder() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=6,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=512,
        )
    )


def default_cases() -> tuple[Case, ...]:
    """The table's rows: int8 on the CPU, fp8-dynamic and int8 with and without device_map on a GPU."""
    if not torch.cuda.is_available():
        return (Case("bf16", "none"), Case("diffusers", "int8"), *_ours("int8"), *_ours("int4"))
    return (
        Case("bf16", "none", "cuda"),
        Case("bf16", "none"),
        *_ours("fp8-dynamic", "cuda"),
        Case("llm-dit", "fp8-dynamic"),
        Case("llm-dit", "int8", "cuda"),
        Case("llm-dit", "int8"),
        Case("llm-dit", "int4", "cuda"),
        Case("diffusers", "fp8-dynamic", "cuda"),
        Case("diffusers", "fp8-dynamic"),
        Case("diffusers", "int8", "cuda"),
    )


def _ours(method: str, device_map: str | None = None) -> tuple[Case, Case]:
    """Quantizing while loading, and reading what was saved quantized."""
    return Case("llm-dit", method, device_map), Case("llm-dit saved", method, device_map)


def run(folder: Path, cases: tuple[Case, ...], repeats: int = 1) -> Iterator[Measurement]:
    """Measures each case in a fresh process, as it comes; of several repeats the fastest counts, its memory with it."""
    if torch.cuda.is_available():
        _touch_host_memory(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    for case in tqdm(cases, desc="Loading", unit="case"):
        runs = [_in_fresh_process(folder, case) for _ in range(repeats)]
        yield min(runs, key=lambda run: (bool(run.error), run.seconds))


def _touch_host_memory(size: int) -> None:
    """Writes to `size` bytes of memory and frees them.

    A virtual machine is given its memory when it first touches it, at 2 to 3 GB/s, which the first row
    that parks weights on the host would pay for the others.
    """
    torch.ones(size, dtype=torch.uint8)


def _in_fresh_process(folder: Path, case: Case) -> Measurement:
    try:
        source = _saved(folder, case) if case.implementation == "llm-dit saved" else folder
        return Measurement(case, **in_fresh_process(measure, source, case))
    except FreshProcessError as error:
        return Measurement(case, error=str(error))


def measure(folder: Path, case: Case) -> dict[str, Any]:
    """Loads once in this process."""
    load = _loader(case)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        torch.cuda.reset_peak_memory_stats()
    with sampled_host_memory() as host:
        start = time.perf_counter()
        pipe = load(str(folder))
        loaded = time.perf_counter()
        if cuda and case.device_map is None:
            pipe.to("cuda")
        if cuda:
            torch.cuda.synchronize()
        end = time.perf_counter()
    return {
        "seconds": end - start,
        "move_seconds": end - loaded,
        "held_bytes": sum(model_bytes(c) for c in pipe.components.values() if isinstance(c, nn.Module)),
        "host_peak_bytes": max(host) - host[0],
        "device_peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "device_held_bytes": torch.cuda.memory_allocated() if cuda else 0,
    }


def _loader(case: Case) -> Any:
    """The call to measure, everything imported."""
    from functools import partial

    from diffusers import Flux2KleinPipeline, PipelineQuantizationConfig, TorchAoConfig
    from transformers import TorchAoConfig as EncoderTorchAoConfig

    from ..families.flux2 import QuantizableFlux2KleinPipeline
    from ..quantization import get_method

    keywords: dict[str, Any] = {"torch_dtype": torch.bfloat16}
    if case.device_map:
        keywords["device_map"] = case.device_map
    if case.implementation == "llm-dit saved":
        return partial(QuantizableFlux2KleinPipeline.from_pretrained, **keywords)
    if case.implementation == "llm-dit":
        both = {"transformer": case.method, "encoder": case.method}
        return partial(QuantizableFlux2KleinPipeline.from_pretrained, quantization=both, **keywords)
    if case.implementation == "diffusers":
        make_stock = get_method(case.method).make_stock_config
        assert make_stock is not None
        stock = make_stock("per-row")
        mapping = {"transformer": TorchAoConfig(stock), "text_encoder": EncoderTorchAoConfig(stock)}
        keywords["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
    return partial(Flux2KleinPipeline.from_pretrained, **keywords)


def _saved(folder: Path, case: Case) -> Path:
    """The folder with what `case` reads, beside `folder`; written by another process, if it is not there."""
    place = folder.with_name(f"{folder.name}-{case.method}")
    if not place.is_dir():
        in_fresh_process(_save_quantized, folder, place, case.method)
    return place


def _save_quantized(folder: Path, place: Path, method: str) -> None:
    keywords = {"device_map": "cuda"} if torch.cuda.is_available() else {}
    both = {"transformer": method, "encoder": method}
    with new_folder(place) as beside:
        load_pipeline(folder, quantization=both, torch_dtype=torch.bfloat16, **keywords).save_pretrained(beside)


@contextmanager
def sampled_host_memory() -> Iterator[list[int]]:
    """Samples of this process's anonymous memory in bytes; the first is the level at the start."""
    samples = [_anonymous_bytes()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(_anonymous_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
        samples.append(_anonymous_bytes())


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not report anonymous memory in /proc/self/status: run the benchmark on Linux")


HEADER: Final = "| load | s | held MiB | host peak MiB | device peak MiB | device held MiB |\n|---|---|---|---|---|---|"
"""First two lines of the Markdown table that `row` continues."""


def row(result: Measurement) -> str:
    """One line of the Markdown table."""
    if result.error:
        return f"| {result.case.label} | {result.error} | | | | |"
    seconds = f"{result.seconds:.1f}"
    if result.move_seconds > 0.05:
        seconds += f", {result.move_seconds:.1f} of it moving to the GPU"
    cells = (result.held_bytes, result.host_peak_bytes, result.device_peak_bytes, result.device_held_bytes)
    return f"| {result.case.label} | {seconds} | " + " | ".join(f"{cell / MIB:.0f}" for cell in cells) + " |"
