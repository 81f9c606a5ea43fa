"""Context parallelism: two processes give the picture that one gives, and what cannot work is refused before it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import free_port
from split_worker import CASES

from llm_dit import load_pipeline
from llm_dit.families import get_family
from llm_dit.generate import GenerateOptions, generate
from llm_dit.graphs import graph_forward
from llm_dit.parallel import _check
from llm_dit.splitting import Share

REFUSED = {"klein with cached references": "kv_cache"}
ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]


def start(*arguments):
    command = [*TORCHRUN, "--master-port", free_port(), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    return done.returncode, done.stdout + done.stderr


def split(kind, tiny, folder):
    names = dict.fromkeys(name for name, _, _ in CASES.values())
    folders = {name: str(tiny(name)) for name in names if can_build(name)}
    code, text = start(ROOT / "tests/split_worker.py", kind, folder / "found.json", json.dumps(folders))
    assert code == 0, text[-3000:]
    found = json.loads((folder / "found.json").read_text())
    assert found.keys() == {case for case, (name, _, _) in CASES.items() if name in folders}
    return found


def can_build(name):
    from llm_dit.tiny import get

    return not get(name).missing()


def wrong(found, most):
    """By case, what two processes made where that is neither refused, as it has to be, nor what one makes."""
    return {
        case: one
        for case, one in found.items()
        if not (REFUSED[case] in one.get("refused", "") if case in REFUSED else one.get("error", most) < most)
    }


# One test for all cases: it takes a minute, and a fixture that several tests share runs in every worker.
def test_two_processes_give_what_one_gives(tiny, tmp_path):
    found = split("ulysses", tiny, tmp_path)
    assert wrong(found, most=0.02) == {}
    for case in found.keys() - REFUSED.keys():
        if not CASES[case][1].get("compile"):  # a hook would break the graph
            assert found[case]["part"] == [-(-tokens // 2) for tokens in found[case]["whole"]], case


@pytest.mark.gpu
def test_rings_on_gpus(tiny, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    found = split("ring", tiny, tmp_path)
    masked = {case for case in found if "length" in case and "even" not in case}
    for case in masked:
        assert "takes no mask" in found[case]["refused"], case
    assert wrong({case: one for case, one in found.items() if case not in masked}, most=0.05) == {}


def test_the_command_line_writes_one_picture(tiny, tmp_path):
    small = ["--height", "64", "--width", "64", "--steps", "2", "--device", "cpu", "--model", tiny("z-image")]
    script = ROOT / "pipelines/z_image.py"
    code, text = start(script, "a red circle", *small, "--context-parallel", "ulysses", "-o", tmp_path / "two.png")
    assert code == 0, text
    assert text.count("two.png") == 1
    size = {"height": 64, "width": 64, "num_inference_steps": 2}
    generate(GenerateOptions(str(tiny("z-image")), "a red circle", tmp_path / "one.png", call=size, device="cpu"))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_one_process_has_nothing_to_split(tiny):
    with pytest.raises(ValueError, match="several processes: start them with torchrun"):
        load_pipeline(tiny("z-image")).enable_context_parallel()
    with pytest.raises(ValueError, match="did you mean 'ulysses'"):
        load_pipeline(tiny("z-image")).enable_context_parallel("ulises")


def test_what_cannot_be_split_is_refused(tiny):
    cpu, klein = torch.device("cpu"), load_pipeline(tiny("flux2-klein")).transformer
    with pytest.raises(ValueError, match="attention heads cannot be split evenly between 3 processes: use 'ring'"):
        _check(klein, Share(3, 0, ring=False), cpu)
    with pytest.raises(ValueError, match="ring attention needs a CUDA device"):
        _check(klein, Share(2, 0, ring=True), cpu)
    with pytest.raises(ValueError, match="controlnet_block_samples"):
        get_family("qwen_image").splitting["QwenImageTransformer2DModel"].prepare(
            {"controlnet_block_samples": []}, Share(2, 0, ring=False)
        )
    with pytest.raises(ValueError, match="63 image tokens cannot be split evenly between 2 processes: give height and width"):
        get_family("flux2").splitting["Flux2Transformer2DModel"].prepare(
            {"hidden_states": torch.empty(1, 63, 4)}, Share(2, 0, ring=False)
        )
    klein.set_attention_backend("_native_math")
    try:
        with pytest.raises(ValueError, match="attention backend '_native_math' cannot be split"):
            _check(klein, Share(2, 0, ring=False), cpu)
    finally:
        klein.set_attention_backend("native")
    graph_forward(klein)
    with pytest.raises(ValueError, match="captured in CUDA graphs"):
        _check(klein, Share(2, 0, ring=False), cpu)


def test_a_controlnet_is_refused(tiny):
    with pytest.raises(ValueError, match="ControlNet"):
        load_pipeline(tiny("z-image-controlnet")).enable_context_parallel()
