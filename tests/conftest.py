"""Tiny pipelines with real diffusers, transformers and torchao, saved once per test process."""

from __future__ import annotations

import io
import os
import socket

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two test processes share two cores; the processes that tests start inherit this, and would each take both.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from llm_dit import cli
from llm_dit.tiny import get

torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def free_port() -> str:
    """A port that nothing listens on: tests run beside each other."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def typed(*arguments, cwd: Path) -> tuple[int, str, str]:
    """Runs `llm-dit` in this process, which has imported torch: its exit code, standard output and standard error."""
    out, error = io.StringIO(), io.StringIO()
    with chdir(cwd), redirect_stdout(out), redirect_stderr(error), pytest.raises(SystemExit) as ended:
        cli._run(args=[str(argument) for argument in arguments])
    return int(ended.value.code or 0), out.getvalue(), error.getvalue()


def tensors_of(result) -> torch.Tensor:
    """Everything a pipeline returned, as one flat float tensor."""
    found: list[torch.Tensor] = []

    def walk(value):
        if torch.is_tensor(value):
            found.append(value.float().flatten())
        elif hasattr(value, "__array__"):
            found.append(torch.as_tensor(value).float().flatten())
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)

    walk(list(result.values()))
    return torch.cat(found)


def generate(pipe, name: str, **others) -> torch.Tensor:
    """Two steps of the tiny pipeline called `name`, as one flat tensor; `others` go before its own arguments."""
    pipe.set_progress_bar_config(disable=True)
    return tensors_of(pipe(**{**get(name).call(), **others}))


def encoding_keywords(name: str) -> dict:
    """Those of the tiny pipeline's arguments that its `encode_prompt` takes."""
    call = get(name).call()
    return {key: call[key] for key in ("max_sequence_length", "text_encoder_out_layers") if key in call}


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny(name)`: the folder of a saved tiny pipeline, built at its first use; skips where a package is missing."""

    @cache
    def folder(name: str) -> Path:
        row = get(name)
        if row.missing():
            pytest.skip(f"{name} needs {', '.join(row.missing())}")
        path = tmp_path_factory.mktemp(name)
        row.build().save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def reference(tiny):
    """`reference(name)`: what the unquantized bf16 pipeline generates, through plain diffusers."""

    @cache
    def output(name: str) -> torch.Tensor:
        pipe = diffusers.DiffusionPipeline.from_pretrained(tiny(name), dtype=torch.bfloat16)
        return generate(pipe, name)

    return output
