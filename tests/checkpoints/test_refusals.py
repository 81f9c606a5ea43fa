"""Files that are broken, lie, or belong to another model: each is an error that names what is wrong, before a weight is read."""

import json
import pickle
import re
import shutil
import struct
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path

import pytest
import torch
from cases import BF16, FAMILIES, checkpoint, folder, load, official, same_weights, transformer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from writer import FP8, LAYOUTS, truncated, with_duplicate_key, with_header, with_tensor, without, write

from llm_dit import load_pipeline

DEV = "flux2-dev"
LAYER = "double_blocks.1.img_attn.qkv"
"""A Linear [384, 128], fp8 in all layouts but mixed, of which three of the model are made."""
PLAIN = "single_stream_modulation.lin"
"""A Linear in bf16."""


@cache
def empty_folder(tiny, name):
    """The pipeline's folder without any weight: whatever is refused here is refused before a component loads."""
    target = folder(tiny, name).with_name(f"{name}-empty")
    shutil.copytree(folder(tiny, name), target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


@pytest.fixture
def refuses(tiny):
    """`refuses(file, *words)`: loading the file is an error with all these words in it, and the device holds no more than before.

    The folder it is loaded into has no weights, so that an error comes before those are missed.
    """

    def check(file, *words, name=DEV, error=ValueError, **keywords):
        if torch.cuda.is_available():
            keywords["device_map"] = "cuda"
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with pytest.raises(error) as caught:
            load(empty_folder(tiny, name), file, **keywords)
        message = str(caught.value)
        assert type(caught.value) is error
        for word in words:
            assert word in message
        assert Path(file).name in message
        assert not torch.cuda.is_available() or torch.cuda.max_memory_allocated() == before
        assert "\n" not in message
        return message

    return check


@pytest.fixture
def copy(tiny, tmp_path):
    """`copy(layout)`: a file of FLUX.2 dev to break, in a folder of its own."""

    def make(layout="scaled", name=DEV):
        original, _ = checkpoint(folder(tiny, name), name, layout)
        # A file of its own each time: tensors of another may still be mapped from it.
        return Path(shutil.copy(original, tmp_path / f"x{next(numbers)}.safetensors"))

    numbers = count()

    return make


def test_an_empty_folder_says_nothing_of_the_file(tiny):
    with pytest.raises(ValueError, match=r"holds a config\.json and no weights"):
        load_pipeline(empty_folder(tiny, DEV), transformer_file=checkpoint(folder(tiny, DEV), DEV, "scaled")[0])


# --- headers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [1, 1000, 600_000])
def test_truncated(missing, copy, refuses):
    refuses(truncated(copy(), missing), "cut short")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 2000])
def test_truncated_within_the_header(size, copy, refuses):
    file = copy()
    file.write_bytes(file.read_bytes()[:size])
    refuses(file, "cut short")


def test_longer_than_the_header_says(copy, refuses):
    file = copy()
    file.write_bytes(file.read_bytes() + bytes(16))
    refuses(file, "padded")


def moved(header, by):
    """The tensor lies elsewhere."""
    begin, end = header[f"{LAYER}.weight"]["data_offsets"]
    header[f"{LAYER}.weight"]["data_offsets"] = [begin + by, end + by]


def dropped(header):
    """A hole where a tensor was."""
    del header[f"{LAYER}.weight"]


@pytest.mark.parametrize(
    "lie",
    [
        lambda entry: entry.update(shape=[128, 384, 2]),
        lambda entry: entry.update(shape=[383, 128]),
        lambda entry: entry.update(shape=[-384, -128]),
        lambda entry: entry.update(shape=[384.0, 128]),
        lambda entry: entry.update(shape="384"),
        lambda entry: entry.update(shape=None),
        lambda entry: entry.update(dtype="BF16"),
        lambda entry: entry.update(dtype="F8_E9M9"),
        lambda entry: entry.update(dtype=8),
        lambda entry: entry.update(data_offsets=[0, 1]),
        lambda entry: entry.update(data_offsets=[-8, 49144]),
        lambda entry: entry.update(data_offsets=list(reversed(entry["data_offsets"]))),
        lambda entry: entry.update(data_offsets=[True, 49153]),
        lambda entry: entry.update(data_offsets=[0]),
        lambda entry: entry.pop("dtype"),
        lambda entry: entry.pop("shape"),
        lambda entry: entry.pop("data_offsets"),
    ],
)
def test_a_header_that_lies(lie, copy, refuses):
    def change(header):
        lie(header[f"{LAYER}.weight"])

    refuses(with_header(copy(), change), f"'{LAYER}.weight'")


def test_overlaps_and_holes(copy, refuses):
    assert "overlaps" in refuses(with_header(copy(), lambda header: moved(header, -64)), f"'{LAYER}.weight'")
    for by in (64, 2**40, 2**70):
        refuses(with_header(copy(), lambda header, by=by: moved(header, by)), "its header lies about")
    assert "unused" in refuses(with_header(copy(), dropped), "its header lies about")


@pytest.mark.parametrize("entry", [None, 3, "text", [], {}])
def test_an_entry_that_is_none(entry, copy, refuses):
    refuses(with_header(copy(), lambda header: header.update({f"{LAYER}.weight": entry})), f"'{LAYER}.weight'")


def test_a_name_that_is_there_twice(copy, refuses):
    refuses(with_duplicate_key(copy(), f"{LAYER}.weight"), f"'{LAYER}.weight'", "twice")
    refuses(with_duplicate_key(copy("prefixed")), "'model.diffusion_model.", "twice")


@pytest.mark.parametrize("header", ["[]", '"text"', "3", "null", "{", "{]", '{"a": }', "{'a': 1}", "[" * 100_000, "\0" * 64])
def test_a_header_that_is_no_object(header, tmp_path, refuses):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    refuses(file, "not a safetensors file")


def test_a_header_behind_a_byte_order_mark(copy, refuses):
    """Python reads it, safetensors does not."""
    file = copy()
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    file.write_bytes(struct.pack("<Q", length + 3) + b"\xef\xbb\xbf" + content[8:])
    refuses(file, "not a safetensors file")


@pytest.mark.parametrize("metadata", [[], "text", {"a": 1}, {"a": None}, {"a": {}}])
def test_metadata_of_another_kind(metadata, copy, refuses):
    refuses(with_header(copy(), lambda header: header.update(__metadata__=metadata)), "__metadata__")


@pytest.mark.parametrize("told", ["{", "[]", "3", '{"layers": []}', '{"layers": {"a": 3}}', '{"layers": 1}'])
def test_metadata_of_formats_that_are_none(told, copy, refuses):
    metadata = {"_quantization_metadata": told}
    refuses(with_header(copy(), lambda header: header.update(__metadata__=metadata)), "_quantization_metadata")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_byte_of_a_header_loads_anything_else(data, tiny, tmp_path):
    source = folder(tiny, "flux2-klein")
    path, _ = checkpoint(source, "flux2-klein", "scaled")
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(8, 7 + length), st.integers(0, 40)))
        content[place] = data.draw(st.one_of(st.sampled_from(b'0123456789abcdeilmnstw_."{}[]:,F'), st.integers(0, 255)))
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with suppress(ValueError):
        same_weights(load(source, file, quantization_transformer="fp8-weight-only").transformer, unbroken(tiny))


@cache
def unbroken(tiny):
    source = folder(tiny, "flux2-klein")
    path, _ = checkpoint(source, "flux2-klein", "scaled")
    return load(source, path, quantization_transformer="fp8-weight-only").transformer


# --- scales --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["scaled", "prefixed", "row", "comfy_quant", "fp8r", "legacy", "legacy-input"])
def test_a_scale_without_its_weight(layout, copy, refuses):
    prefix, name = LAYOUTS[layout].prefix, "scale_weight" if LAYOUTS[layout].legacy else "weight_scale"
    refuses(without(copy(layout), f"{prefix}{LAYER}.weight"), f"'{prefix}{LAYER}.{name}'")


def test_a_scale_of_a_weight_that_is_not_fp8(copy, refuses):
    refuses(with_tensor(copy(), f"{PLAIN}.weight_scale", torch.tensor(0.5)), f"'{PLAIN}.weight_scale'", "BF16")
    refuses(with_tensor(copy("raw"), "nowhere.weight_scale", torch.tensor(0.5)), "'nowhere.weight_scale'")


def test_an_input_scale_without_a_weight(copy, refuses):
    refuses(with_tensor(copy(), "nowhere.input_scale", torch.tensor(0.5)), "'nowhere.input_scale'")
    refuses(with_tensor(copy("legacy-input"), "nowhere.scale_input", torch.tensor(0.5)), "'nowhere.scale_input'")


@pytest.mark.parametrize("layout", ["scaled", "prefixed", "row", "comfy_quant", "fp8r", "legacy", "legacy-input"])
def test_an_fp8_weight_without_its_scale_in_a_scaled_file(layout, copy, refuses):
    prefix, name = LAYOUTS[layout].prefix, "scale_weight" if LAYOUTS[layout].legacy else "weight_scale"
    refuses(without(copy(layout), f"{prefix}{LAYER}.{name}"), f"'{prefix}{LAYER}.weight'", "no scale")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -1e-3])
@pytest.mark.parametrize("layout", ["scaled", "row", "column", "legacy"])
def test_a_scale_that_is_none(layout, value, copy, refuses):
    file = copy(layout)
    key = f"{LAYER}.{'scale_weight' if LAYOUTS[layout].legacy else 'weight_scale'}"
    scale = load_file(file)[key].clone()
    scale.reshape(-1)[-1] = value
    refuses(with_tensor(file, key, scale), f"'{key}'", "finite and positive")


@pytest.mark.parametrize("shape", [(0,), (2,), (383,), (385,), (1, 384), (384, 2), (384, 128), (3, 1), (1, 1, 384), (128,)])
def test_a_scale_of_another_shape(shape, copy, refuses):
    refuses(with_tensor(copy(), f"{LAYER}.weight_scale", torch.full(shape, 0.001)), f"'{LAYER}.weight_scale'", f"{list(shape)}")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool])
def test_a_scale_of_another_kind(dtype, copy, refuses):
    refuses(with_tensor(copy(), f"{LAYER}.weight_scale", torch.ones((), dtype=dtype)), f"'{LAYER}.weight_scale'")
    refuses(with_tensor(copy(), f"{LAYER}.input_scale", torch.ones((), dtype=dtype)), f"'{LAYER}.input_scale'")


def test_an_input_scale_of_another_shape(copy, refuses):
    refuses(with_tensor(copy(), f"{LAYER}.input_scale", torch.ones(128)), f"'{LAYER}.input_scale'", "[128]")


def test_both_names_of_one_scale(copy, refuses):
    """Which of the two is meant, nobody knows."""
    refuses(with_tensor(copy(), f"{LAYER}.scale_weight", torch.tensor(0.5)), f"{LAYER}.")


def test_nan_among_the_weights(tiny, copy):
    file = copy()
    weight = load_file(file)[f"{LAYER}.weight"].view(torch.uint8).clone()
    weight[5, 7] = 0x7F
    file = with_tensor(file, f"{LAYER}.weight", weight.view(FP8))
    with pytest.raises((ValueError, RuntimeError), match="transformer_blocks.1.attn.to_q|" + re.escape(LAYER)):
        load(folder(tiny, DEV), file, quantization_transformer="fp8-dynamic")


# --- weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout", "key", "ours"),
    [
        (DEV, "bf16", "img_in.weight", "x_embedder.weight"),
        (DEV, "scaled", "single_blocks.1.norm.key_norm.scale", "single_transformer_blocks.1.attn.norm_k.weight"),
        ("z-image", "raw", "layers.1.attention.out.weight", "layers.1.attention.to_out.0.weight"),
        ("z-image", "bf16", "cap_pad_token", "cap_pad_token"),
        ("qwen-image", "raw", "transformer_blocks.1.attn.to_q.bias", "transformer_blocks.1.attn.to_q.bias"),
        ("qwen-image", "prefixed", "model.diffusion_model.img_in.weight", "img_in.weight"),
        ("ltx2", "bf16", "patchify_proj.bias", "proj_in.bias"),
        ("ltx2.3", "scaled", "prompt_adaln_single.linear.weight", "prompt_adaln.linear.weight"),
    ],
)
def test_a_weight_that_is_missing(name, layout, key, ours, copy, refuses):
    refuses(without(copy(layout, name), key), f"'{ours}'", name=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_tensor_can_be_left_out(name, tiny, refuses, tmp_path):
    """Every seventh, one at a time."""
    file = tmp_path / "x.safetensors"
    tensors = official(folder(tiny, name), name)
    for key in list(tensors)[::7]:
        write(file, {other: tensor for other, tensor in tensors.items() if other != key}, LAYOUTS["bf16"])
        refuses(file, name=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_scaled_weight_that_lands_nowhere(name, copy, refuses, tiny):
    """A model with one more Linear, wherever it is."""
    for key in ("extra", "transformer_blocks.0.extra", "double_blocks.0.extra", "layers.0.extra"):
        file = with_tensor(copy("scaled", name), f"{key}.weight_scale", torch.tensor(0.01))
        file = with_tensor(file, f"{key}.weight", torch.ones(32, 32).to(FP8))
        refuses(file, key, name=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tensor_that_lands_nowhere(name, copy, refuses):
    refuses(with_tensor(copy("raw", name), "extra.weight", torch.ones(32, 32).to(FP8)), "'extra.weight'", name=name)
    refuses(with_tensor(copy("bf16", name), "extra.bias", torch.ones(32)), "'extra.bias'", name=name)


def resized(tensors, axis):
    """Every matrix wider or longer by 16."""
    pads = {"columns": (0, 16), "rows": (0, 0, 0, 16)}
    return {key: torch.nn.functional.pad(t, pads[axis]) if t.ndim == 2 else t for key, t in tensors.items()}


@pytest.mark.parametrize("layout", ["bf16", "scaled", "raw"])
@pytest.mark.parametrize("axis", ["columns", "rows"])
@pytest.mark.parametrize("name", FAMILIES)
def test_another_size(name, axis, layout, tiny, refuses, tmp_path):
    """A file of the 9B model for the 4B one."""
    file = tmp_path / "x.safetensors"
    write(file, resized(official(folder(tiny, name), name), axis), LAYOUTS[layout])
    message = refuses(file, name=name)
    assert re.search(r"\[\d+, \d+\]|rows", message)
    assert any(f"'{key}'" in message for key in load_file(file))


def test_one_weight_of_another_size(copy, refuses):
    key = "double_blocks.0.txt_mlp.0.weight"
    weight = load_file(copy())[key]
    for shape in ((weight.shape[0] + 16, weight.shape[1]), (weight.shape[0], weight.shape[1] + 16), (*weight.shape, 1)):
        refuses(with_tensor(copy(), key, torch.ones(shape).to(FP8)), f"'{key}'")
    refuses(with_tensor(copy(), "img_in.weight", torch.ones(7, dtype=BF16)), "'img_in.weight'")
    refuses(with_tensor(copy(), "img_in.weight", torch.ones((), dtype=BF16)), "'img_in.weight'")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.bool])
def test_a_weight_that_is_no_float(dtype, copy, refuses):
    shape = load_file(copy())[f"{PLAIN}.weight"].shape
    refuses(with_tensor(copy(), f"{PLAIN}.weight", torch.zeros(shape, dtype=dtype)), f"'{PLAIN}.weight'")


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(
    ("name", "block"), [("z-image", "layers.1."), ("flux2-dev", "double_blocks.1."), ("qwen-image", "transformer_blocks.1.")]
)
def test_another_number_of_blocks(name, block, blocks, tiny, refuses, tmp_path):
    tensors = official(folder(tiny, name), name)
    if blocks == 1:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(block)}
    else:
        more = {key.replace(block, block.replace("1.", "2.")): t for key, t in tensors.items() if key.startswith(block)}
        tensors = {**tensors, **more}
    write(tmp_path / "x.safetensors", tensors, LAYOUTS["scaled"])
    message = refuses(tmp_path / "x.safetensors", name=name)
    assert "transformer_blocks.1." in message or block in message or block.replace("1.", "2.") in message


TITLES = {
    "z-image": "Z-Image",
    "flux2-klein": "FLUX.2",
    "flux2-dev": "FLUX.2",
    "qwen-image": "Qwen-Image",
    "ltx2": "LTX-2",
    "ltx2.3": "LTX-2",
}


@pytest.mark.parametrize("layout", ["bf16", "scaled", "raw", "legacy"])
@pytest.mark.parametrize(("name", "other"), [(a, b) for a in FAMILIES for b in FAMILIES if a != b])
def test_a_file_of_another_model(name, other, layout, tiny, refuses):
    file, _ = checkpoint(folder(tiny, other), other, layout)
    message = refuses(file, name=name)
    if FAMILIES[name] != FAMILIES[other]:
        assert f"holds a {TITLES[other]} transformer" in message
        assert f"a {TITLES[name]} pipeline" in message
    else:
        quoted = re.findall(r"'([\w.]+)'", message)
        known = {*official(folder(tiny, other), other), *transformer(folder(tiny, name)).state_dict()}
        assert any(key in known for key in quoted)


def test_an_encoder_is_no_transformer(tiny, refuses):
    file = folder(tiny, DEV) / "text_encoder" / "model.safetensors"
    refuses(file, "Flux2Transformer2DModel")


# --- other formats -------------------------------------------------------------------------------------------------------


def test_metadata_that_names_a_weight_that_is_not_fp8(copy, refuses):
    def change(header):
        told = json.loads(header["__metadata__"]["_quantization_metadata"])
        told["layers"][layer] = {"format": "float8_e4m3fn"}
        header["__metadata__"]["_quantization_metadata"] = json.dumps(told)

    for layer in (PLAIN, "nowhere"):
        refuses(with_header(copy(), change), f"'{layer}.weight'", "float8_e4m3fn")


def test_a_format_tensor_that_lies(copy, refuses):
    def told(text):
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    file = copy("comfy_quant")
    key = f"{LAYER}.comfy_quant"
    refuses(with_tensor(file, key, told('{"format": "float8_e5m2"}')), f"'{LAYER}.weight'", "float8_e5m2")
    refuses(with_tensor(file, key, told("{")), f"'{key}'")
    refuses(with_tensor(file, key, told("[]")), f"'{key}'")
    refuses(with_tensor(file, key, told("{}")), LAYER)
    refuses(with_tensor(file, key, told('{"format": 3}')), LAYER)
    refuses(with_tensor(file, key, told('{"format": ["float8_e4m3fn"]}')), LAYER)
    refuses(with_tensor(file, key, torch.zeros(100_000, dtype=torch.uint8)), f"'{key}'")
    refuses(with_tensor(file, f"{PLAIN}.comfy_quant", told('{"format": "float8_e4m3fn"}')), f"'{PLAIN}.weight'")


E8M0 = torch.float8_e8m0fnu
VARIANTS = {
    "mxfp8": {"weight": torch.zeros(384, 128).to(FP8), "weight_scale": torch.ones(384, 4, dtype=torch.uint8)},
    "mxfp8-e8m0": {"weight": torch.zeros(384, 128).to(FP8), "weight_scale": torch.ones(384, 4).to(E8M0)},
    "nvfp4": {
        "weight": torch.zeros(384, 64, dtype=torch.uint8),
        "weight_scale": torch.zeros(384, 8).to(FP8),
        "weight_scale_2": torch.tensor(0.1),
    },
    "int8": {"weight": torch.zeros(384, 128, dtype=torch.int8), "weight_scale": torch.full((384, 1), 0.1)},
    "int8-tensor": {"weight": torch.zeros(384, 128, dtype=torch.int8), "weight_scale": torch.tensor(0.1)},
    "blockwise": {"weight": torch.zeros(384, 128).to(FP8), "weight_scale_inv": torch.full((3, 1), 0.1)},
    "fnuz": {"weight": torch.zeros(384, 128).to(torch.float8_e4m3fnuz), "weight_scale": torch.tensor(0.1)},
}
NAMED = {"mxfp8-e8m0": "mxfp8", "int8-tensor": "int8", "fnuz": "FNUZ"}
FORMATS = {"mxfp8": "mxfp8", "nvfp4": "nvfp4", "int8": "int8_tensorwise"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", ["scaled", "bf16", "raw"])
def test_formats_that_are_not_read_are_named(variant, base, copy, refuses, tmp_path):
    tensors = {key: tensor for key, tensor in load_file(copy(base)).items() if not key.startswith(f"{LAYER}.")}
    tensors |= {f"{LAYER}.{name}": tensor for name, tensor in VARIANTS[variant].items()}
    file = tmp_path / "y.safetensors"
    save_file(tensors, file)
    refuses(file, LAYER, NAMED.get(variant, variant))


@pytest.mark.parametrize("variant", FORMATS)
def test_formats_that_are_told_are_named(variant, copy, refuses):
    told = torch.tensor(list(json.dumps({"format": FORMATS[variant]}).encode()), dtype=torch.uint8)
    refuses(with_tensor(copy("comfy_quant"), f"{LAYER}.comfy_quant", told), LAYER, variant)
    metadata = {"_quantization_metadata": json.dumps({"layers": {LAYER: {"format": FORMATS[variant]}}})}
    refuses(with_header(copy(), lambda header: header.update(__metadata__=metadata)), LAYER, variant)


def test_gguf_is_refused_with_a_pointer(tmp_path, refuses):
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(100))
    refuses(file, "GGUFQuantizationConfig", "from_single_file")


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def saved_zip(file, value):
    torch.save(value, file)


def saved_legacy(file, value):
    torch.save(value, file, _use_new_zipfile_serialization=False)


def dumped(file, value):
    file.write_bytes(pickle.dumps(value))


def dumped_oldest(file, value):
    file.write_bytes(pickle.dumps(value, protocol=0))


@pytest.mark.parametrize("suffix", ["pt", "ckpt", "bin", "safetensors"])
@pytest.mark.parametrize("save", [saved_zip, saved_legacy, dumped, dumped_oldest])
def test_nothing_is_unpickled(save, suffix, tmp_path, refuses):
    canary = tmp_path / "canary"
    file = tmp_path / f"x.{suffix}"
    save(file, {"state_dict": _Touch(canary)})
    refuses(file, *(["pickle", "safetensors"] if save in (saved_zip, saved_legacy) else ["not a safetensors file"][:1]))
    assert not canary.exists()
    # The canary would have been created.
    if save in (dumped, dumped_oldest):
        pickle.loads(file.read_bytes())
        assert canary.exists()


@pytest.mark.parametrize(
    "content", [b"x" * 5000, bytes(5000), b"\xff" * 5000, b'{"weight_map": {}}', b"<!DOCTYPE html><html>" * 50]
)
def test_garbage(content, tmp_path, refuses):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    refuses(file, "not a safetensors file")


def test_a_git_lfs_pointer_is_garbage(tmp_path, refuses):
    file = tmp_path / "x.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refuses(file, "not a safetensors file")


def test_a_file_that_is_not_there(tmp_path, refuses):
    refuses(tmp_path / "none.safetensors", "there is no file", error=FileNotFoundError)
    refuses("./none.safetensors", "there is no file", error=FileNotFoundError)
    refuses(tmp_path, "is a folder: give the .safetensors file in it", error=FileNotFoundError)


def test_a_file_without_tensors(tmp_path, refuses):
    save_file({}, tmp_path / "x.safetensors")
    refuses(tmp_path / "x.safetensors")


# --- arguments -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dev(tiny):
    source = folder(tiny, DEV)
    return source, {layout: checkpoint(source, DEV, layout)[0] for layout in ("scaled", "row", "raw", "bf16")}


def test_a_transformer_and_a_file_of_one(dev):
    source, files = dev
    with pytest.raises(ValueError, match=r"transformer was passed and transformer_file .*give one of the two"):
        load(source, files["scaled"], transformer=transformer(source))


def test_layerwise_casting_of_a_file(dev):
    source, files = dev
    for backend in ("layerwise", {"transformer": "layerwise"}):
        with pytest.raises(ValueError, match="'layerwise' has none"):
            load(source, files["scaled"], quantization_transformer="fp8-weight-only", quantization_backend=backend)


@pytest.mark.parametrize("layout", ["row", "raw", "bf16"])
def test_static_without_scales(layout, dev):
    source, files = dev
    with pytest.raises(ValueError, match=r"no usable scales of activations.*leave it at 'dynamic'"):
        load(source, files[layout], quantization_transformer="fp8-dynamic", activation_scale="static")


def test_static_with_a_method_that_does_not_quantize_activations(dev):
    """Asked for and not done would be silent."""
    source, files = dev
    for method in ("fp8-weight-only", "int8", "none"):
        with pytest.raises(ValueError, match=r"static.*fp8-dynamic"):
            load(source, files["scaled"], quantization_transformer=method, activation_scale="static")


def test_the_checkpoint_backend_is_a_word_about_the_file(dev):
    """The encoder beside it is quantized as usual."""
    source, files = dev
    pipe = load_pipeline(source, transformer_file=files["scaled"], quantization_encoder="int8", quantization_backend="checkpoint")
    assert pipe.quantization_report["transformer"].backend == "checkpoint"
    assert pipe.quantization_report["text_encoder"].backend == "torchao"


def test_a_device_by_its_number(dev, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"device_map='cuda:0', and diffusers takes 'cuda', 'cpu' or 'balanced'"):
        load(dev[0], dev[1]["scaled"], device_map="cuda:0")


def test_static_without_a_file(dev):
    with pytest.raises(ValueError, match="give transformer_file"):
        load(dev[0], quantization_transformer="fp8-dynamic", activation_scale="static")


def test_the_checkpoint_backend_without_a_file(dev):
    with pytest.raises(ValueError, match="give transformer_file or encoder_file"):
        load(dev[0], quantization_transformer="fp8-dynamic", quantization_backend="checkpoint")


def test_a_pipeline_without_a_transformer(tiny, dev):
    with pytest.raises(ValueError, match="transformer_file is for the transformer, and this pipeline has none"):
        load_pipeline(tiny("ltx2-latent-upsample"), transformer_file=dev[1]["scaled"])
