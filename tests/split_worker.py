"""One of the processes of test_parallel.py: makes every case alone and split, and process 0 writes what came of it."""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from conftest import generate, relative_error

from llm_dit import load_pipeline
from llm_dit.parallel import process_group, rank
from llm_dit.tiny import get

LENGTHS = ["a red circle", "a red circle above a blue square, seen from far away"]


def embeds(*lengths):
    """Encoded texts for Z-Image, whose tokenizer pads what it encodes."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(length, 128, generator=generator).bfloat16() for length in lengths]
    return {"prompt_embeds": texts, "negative_prompt_embeds": texts}


CASES = {
    "flux2-klein": ("flux2-klein", {}, {}),
    "klein with cached references": ("flux2-klein-kv", {}, {}),
    "qwen-image, a text of odd length": ("qwen-image", {}, {"prompt": "abc"}),
    "qwen-image, a text of even length": ("qwen-image", {}, {"prompt": "ab"}),
    "qwen-image, texts of two lengths": ("qwen-image", {}, {"prompt": LENGTHS, "negative_prompt": ["", " "]}),
    "qwen-image in fp8": ("qwen-image", {"quantization": "fp8-dynamic"}, {"prompt": "ab"}),
    "z-image": ("z-image", {}, {}),
    "z-image, texts of two lengths": ("z-image", {}, {"prompt": None, **embeds(20, 50)}),
    "ltx2": ("ltx2", {}, {}),
    "ltx2.3 in int8": ("ltx2.3", {"quantization": "int8"}, {}),
    "ltx2, a first frame": ("ltx2-image-to-video", {}, {}),
    "ltx2.3, frames at chosen times": ("ltx2-condition", {}, {}),
    "z-image in int8, compiled": ("z-image", {"quantization": "int8", "compile": True}, {}),
}


def tokens_of(pipe, name, call):
    """The picture, and how long the sequences are that the first block's queries are made of."""
    seen = []
    first = next(
        module for path, module in pipe.transformer.named_modules() if path.endswith(("layers.0", "transformer_blocks.0"))
    )
    query = next(module for path, module in first.named_modules() if path.endswith("to_q"))
    if not first._compiled_call_impl:
        query.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    return generate(pipe, name, **send_to_device(call, pipe.device)), seen


def main(kind, output, folders):
    """Writes, by case: the error against one process, and the lengths of sequences alone and split."""
    device = torch.device("cuda" if torch.cuda.device_count() > 1 else "cpu")
    found = {}
    with process_group(device):
        place = {"device_map": "cuda"} if device.type == "cuda" else {}
        for case, (name, load, call) in CASES.items():
            if name not in folders:
                continue
            plain = {**load, "compile": False}  # compiling takes half a minute
            one, both = (load_pipeline(folders[name], torch_dtype=torch.bfloat16, **place, **each) for each in (plain, load))
            (alone, whole), seen = tokens_of(one, name, call), None
            try:
                both.enable_context_parallel(kind)
                split, seen = tokens_of(both, name, call)
            except ValueError as error:
                found[case] = {"refused": str(error)}
                continue
            found[case] = {"error": relative_error(split.cpu(), alone.cpu()), "whole": whole, "part": seen}
    if rank() == 0:
        Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    assert get("z-image")
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
