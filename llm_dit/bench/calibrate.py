"""What one component takes in one phase: device memory above its weights, at real sizes, with random weights.

Denoisers and encoders have two blocks of each kind, VAEs are whole; every point is a fresh process, several of them at once. The
points are those that the constants of `llm_dit.planning` are fitted to, and those that they are tested on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from tqdm.auto import tqdm

from ..decoding import Cut, apply_cut
from ..families import published_models, quantizable_class
from ..families.base import Family
from ..forwards import Size
from ..names import nearest
from ..planning.activations import run_of, shortened
from ..quantization import detect_hardware, quantize_component
from ..quantization.sizes import model_bytes
from .fresh import FreshProcessError, in_fresh_process
from .geometry import random_model
from .results import Columns, Job, Row
from .timing import synchronize

CONTEXT: Final = "context"
"""The component of the point that measures what CUDA takes before anything is allocated."""
COLUMNS: Final[Columns] = (
    ("geometry", ""),
    ("component", ""),
    ("phase", ""),
    ("method", ""),
    ("height", "d"),
    ("width", "d"),
    ("frames", "d"),
    ("batch", "d"),
    ("references", "d"),
    ("tile", "d"),
    ("weights_bytes", ","),
    ("allocated_bytes", ","),
    ("reserved_bytes", ","),
)


@dataclass(frozen=True)
class Case:
    """One point.

    Attributes:
        geometry: offline name of a published model, or a tiny pipeline.
        component: its name in the pipeline.
        phase: "encode", "denoise" or "decode".
        height, width, frames, batch, references, text: as in `Size`.
        method: how its weights are quantized.
        tile: side of a tile of a decode in pixels; 0 for whole.
    """

    geometry: str
    component: str
    phase: str
    height: int = 1024
    width: int = 1024
    frames: int = 1
    batch: int = 1
    references: int = 0
    method: str = "none"
    tile: int = 0
    text: int = 0

    @property
    def size(self) -> Size:
        return Size(self.height, self.width, self.frames, self.batch, self.references, self.text)


def plan(geometries: Sequence[str] = (), jobs: int = 1, timeout_s: float = 300) -> Job:
    """The points of `geometries`; all published ones on a GPU, and a tiny one elsewhere, if there is none.

    Args:
        jobs: processes at once; each takes 5 to 20 GB of the GPU.

    Raises:
        ValueError: for an unknown geometry.
    """
    chosen = tuple(geometries) or (tuple(POINTS) if torch.cuda.is_available() else ("flux2-klein",))
    for name in chosen:
        if name not in POINTS and name not in _tiny_names():
            raise ValueError(f"unknown geometry {name!r}: {nearest(name, (*POINTS, *_tiny_names()))}")
    context = [Case(CONTEXT, CONTEXT, "load")] if any(name in POINTS for name in chosen) else []
    cases = [case for name in chosen for case in (points(name) if name in POINTS else _tiny_points(name))]
    return Job([*context, *cases], partial(run, jobs=jobs, timeout_s=timeout_s), COLUMNS)


def run(cases: Sequence[Case], jobs: int, timeout_s: float) -> Iterator[Row]:
    """Yields the row of each case as it is done, failed ones with `error`.

    What CUDA itself takes can only be told while nothing else is on the card, so that this point comes first, alone.
    """
    for case in (case for case in cases if case.component == CONTEXT):
        free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
        yield _row(case, timeout_s, measure_context, free)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(_row, case, timeout_s, measure, case) for case in cases if case.component != CONTEXT]
        for done in tqdm(as_completed(waiting), total=len(waiting), desc="Measuring", unit="point"):
            yield done.result()


def _row(case: Case, timeout_s: float, function: Callable[..., Row], *args: Any) -> Row:
    try:
        found = in_fresh_process(function, *args, timeout_s=timeout_s)
    except FreshProcessError as error:
        found = {"error": " ".join(str(error).split())[:300]}
    return {**asdict(case), "device": detect_hardware().name, "torch": torch.__version__, **found}


def measure(case: Case) -> dict[str, int | None]:
    """Measures in this process.

    Returns:
        Bytes: of the weights, and at most allocated and reserved above them while the component runs twice; None without a GPU.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    family, makers = components_of(case.geometry)
    role = family.role(case.component)
    assert role is not None
    model = random_model(makers[case.component], device)
    if case.method != "none":
        quantize_component(model, case.method, role)
    if case.tile:
        apply_cut(model, Cut(tile=case.tile))
    allocated = _emptied(device)
    forward = run_of(model, case.component, case.phase, family.forwards, case.size, device)
    with torch.no_grad():
        for _ in range(2):
            forward()
    synchronize(device)
    return {
        "weights_bytes": model_bytes(model),
        "held_bytes": allocated if cuda else None,
        "allocated_bytes": torch.cuda.max_memory_allocated() - allocated if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() - allocated if cuda else None,
    }


def _emptied(device: torch.device) -> int:
    """Gives back what is cached, starts counting anew, and returns the bytes that are allocated."""
    if device.type != "cuda":
        return 0
    synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measure_context(free_before: int) -> dict[str, int | None]:
    """What this process takes of the card without a tensor, after cuBLAS, cuDNN and the library's kernels were loaded.

    Args:
        free_before: bytes of the card that were free before this process began.
    """
    if not torch.cuda.is_available():
        return {"context_bytes": None}
    device = torch.device("cuda")
    family, makers = components_of("klein-4b")
    for component, phase, method in (("transformer", "denoise", "fp8-dynamic"), ("vae", "decode", "none")):
        model = random_model(makers[component], device)
        if method != "none":
            quantize_component(model, method, str(family.role(component)))
        with torch.no_grad():
            run_of(model, component, phase, family.forwards, Size(512, 512), device)()
        del model
    _emptied(device)
    return {"context_bytes": free_before - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()}


def components_of(geometry: str) -> tuple[Family, Mapping[str, Callable[[], nn.Module]]]:
    """A family, and what makes the components that are measured: shortened but for VAEs, or a tiny pipeline's own."""
    if geometry in published_models():
        model = published_models()[geometry]
        family = quantizable_class(model.pipeline_class).family
        return family, {name: make if family.role(name) == "vae" else shortened(make) for name, make in model.components.items()}
    from ..tiny import build, get

    pipe, family = build(geometry), quantizable_class(get(geometry).pipeline_class).family
    models = {name: model for name, model in pipe.components.items() if isinstance(model, nn.Module)}
    return family, {name: partial(_itself, model) for name, model in models.items()}


def _itself(model: nn.Module) -> nn.Module:
    return model


def _tiny_names() -> tuple[str, ...]:
    from ..tiny import tiny_pipelines

    return tuple(tiny_pipelines())


def _tiny_points(name: str) -> list[Case]:
    family, makers = components_of(name)
    frames = 9 if family.forwards.frames_step else 1
    small: dict[str, Any] = {"height": 64, "width": 64, "frames": frames, "text": 32}
    encoders = [Case(name, component, "encode", **small) for component in family.forwards.encoders if component in makers]
    steps = [Case(name, "transformer", "denoise", method=method, **small) for method in ("none", "int8")]
    return [*encoders, *steps, Case(name, "vae", "decode", **small)]


def points(geometry: str) -> list[Case]:
    """The points of a published geometry, smallest first."""
    found = []
    for component, phase, several in POINTS[geometry]:
        found += [Case(geometry, component, phase, **_fields(text)) for text in several.split(",")]
    return found


def _fields(text: str) -> dict[str, Any]:
    """Of "1024x768 f121 b2 r1 int8 t512": height x width, frames, batch, references, method, tile; the rest is the default."""
    names = {"f": "frames", "b": "batch", "r": "references", "t": "tile"}
    fields: dict[str, Any] = {}
    for word in text.split():
        if word[0] in names and word[1:].isdigit():
            fields[names[word[0]]] = int(word[1:])
        elif "x" in word:
            fields["height"], fields["width"] = map(int, word.split("x"))
        else:
            fields["method"] = word
    return fields


_PICTURES: Final = "512x512, 1024x1024, 1536x1536, 2048x2048"
POINTS: Final[Mapping[str, tuple[tuple[str, str, str], ...]]] = {
    "klein-9b": (
        ("transformer", "denoise", f"{_PICTURES}, b2, r1, fp8-dynamic, 2048x2048 fp8-dynamic, fp8-weight-only, int8, int4"),
        ("text_encoder", "encode", "none, b4, int8, int4"),
        ("vae", "decode", f"{_PICTURES}, b2, 2048x2048 t1024, t512"),
        ("vae", "encode", "512x512, 1024x1024"),
    ),
    "klein-4b": (
        ("transformer", "denoise", "1024x1024, 2048x2048, fp8-dynamic, int4"),
        ("text_encoder", "encode", "none, int4"),
    ),
    "flux2-dev": (
        ("transformer", "denoise", "512x512, 1024x1024, 2048x2048, fp8-dynamic, int8, int4"),
        ("text_encoder", "encode", "none, int8, int4"),
    ),
    "qwen-image": (
        ("transformer", "denoise", "512x512, 1024x1024, 2048x2048, b2, r1, fp8-dynamic, int8, int4"),
        ("text_encoder", "encode", "none, int8, int4"),
        ("vae", "decode", "512x512, 1024x1024, 1536x1536, t512, 2048x2048 t512"),
        ("vae", "encode", "1024x1024"),
    ),
    "z-image-turbo": (
        ("transformer", "denoise", "512x512, 1024x1024, 2048x2048, b2, fp8-dynamic, int4"),
        ("text_encoder", "encode", "none, int4"),
        ("vae", "decode", "1024x1024, 2048x2048, t512"),
    ),
    "ltx-2.3": (
        (
            "transformer",
            "denoise",
            "512x768 f33, 512x768 f121, 704x1216 f121, 512x768 f121 b2, 512x768 f121 fp8-dynamic, 512x768 f121 int4",
        ),
        ("text_encoder", "encode", "none, b2, int8, int4"),
        ("connectors", "encode", "none, int4"),
        ("vae", "decode", "256x384 f33, 512x768 f33, 512x768 f121, 512x768 f121 t256, 704x1216 f121 t512"),
    ),
    "ltx-2": (
        ("transformer", "denoise", "512x768 f121"),
        ("connectors", "encode", "none"),
        ("vae", "decode", "512x768 f121"),
    ),
}
"""By geometry: component, phase, and the points, which `_fields` reads."""
