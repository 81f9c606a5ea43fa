"""Decoding that would not fit is cut until it does; what fits, and what was cut by hand, stays as it is."""

import copy
import gc

import pytest
import torch
from conftest import generate
from torch import nn

from llm_dit import decoding, load_pipeline
from llm_dit.decoding import TILES, WHOLE, WORKSPACE, Cut, FittedDecode, apply_cut, fit_decoding
from llm_dit.families import published_models
from llm_dit.quantization.activations import peak_activation_bytes
from llm_dit.tiny import build

GIB = 1024**3
# (model, latents, measured peak of a decode on an H200 in bf16, weights of the VAE), GiB
MEASURED = [
    ("klein-9b", (1, 32, 128, 128), 2.57, 0.157),
    ("klein-9b", (1, 32, 256, 256), 7.20, 0.157),
    ("qwen-image", (1, 16, 1, 128, 128), 4.40, 0.236),
]


def published_vae(model):
    with torch.device("meta"):
        return published_models()[model].components["vae"]().bfloat16().eval()


@pytest.mark.parametrize(("model", "shape", "measured", "weights"), MEASURED)
def test_the_count_covers_what_was_measured(model, shape, measured, weights):
    fitted = FittedDecode(vae := published_vae(model))
    needed = fitted.needed_bytes(torch.empty(shape, dtype=torch.bfloat16, device="meta"), return_dict=False) / GIB
    assert vae is not None
    assert measured - weights <= needed <= (measured - weights) * 1.15


def test_counting_memory():
    """A chain holds two tensors at a time, whatever its length; what is kept is held."""
    layers = nn.Sequential(*(nn.Linear(64, 64, bias=False, device="meta") for _ in range(9)))
    rows = torch.empty(256, 64, device="meta")
    one = rows.numel() * rows.element_size()
    assert peak_activation_bytes(lambda: layers(rows)) == 2 * one
    assert peak_activation_bytes(lambda: [layer(rows) for layer in layers]) == 9 * one
    assert peak_activation_bytes(lambda: rows.view(-1)[5:]) == 0
    query = torch.empty(1, 4, 4096, 64, device="meta")
    attended = peak_activation_bytes(lambda: nn.functional.scaled_dot_product_attention(query, query, query))
    assert attended == query.numel() * query.element_size()


class Watched:
    """Mixed into a VAE's class: remembers how it was set when it decoded, and decodes nothing."""

    def decode(self, z, *args, **kwargs):
        self.set_to = {key: value for key, value in vars(self).items() if key.startswith(("use_", "tile_"))}


@pytest.mark.parametrize("gigabytes", [200, 20, 8, 3, 0])
@pytest.mark.parametrize("model", ["klein-9b", "qwen-image", "z-image-turbo", "ltx-2.3"])
def test_the_largest_cut_that_fits(model, gigabytes):
    """At the published sizes: what is chosen fits, and what is next larger would not; afterwards the VAE is as it was."""
    vae = published_vae(model)
    channels = vae.config.get("latent_channels") or vae.config.z_dim
    shape = {"qwen-image": (2, channels, 1, 256, 256), "ltx-2.3": (2, channels, 16, 32, 48)}.get(model, (2, channels, 256, 256))
    z = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    keywords = {"temb": None} if model == "ltx-2.3" else {}
    counter = FittedDecode(vae)
    cuts = [WHOLE, Cut(sliced=True), *(Cut(True, tile) for tile in TILES)]
    needed = [counter.needed_bytes(z, cut=cut, **keywords) for cut in cuts]
    budget = gigabytes * GIB
    expected = next((cut for cut, size in zip(cuts, needed, strict=True) if size <= budget), cuts[-1])

    vae.__class__ = type("WatchedVAE", (Watched, type(vae)), {})
    fit_decoding(vae, lambda device: budget)
    vae.decode._twin = counter._twin
    before = {key: value for key, value in vars(vae).items() if key.startswith(("use_", "tile_"))}
    vae.decode(z, **keywords)
    assert {key: vars(vae)[key] for key in before} == before
    assert vae.set_to["use_slicing"] == expected.sliced
    assert vae.set_to["use_tiling"] == bool(expected.tile)
    if expected.tile:
        assert vae.set_to.get("tile_sample_min_size", vae.set_to.get("tile_sample_min_height")) == expected.tile
    assert len(vae.decode.told) == (expected != WHOLE)


@pytest.mark.parametrize("model", ["klein-9b", "qwen-image", "ltx-2.3"])
def test_the_count_of_a_part_covers_the_tiled_decode(model):
    """Against the VAE's own tiling, counted whole."""
    vae = published_vae(model)
    channels = vae.config.get("latent_channels") or vae.config.z_dim
    shape = {"qwen-image": (2, channels, 1, 80, 80), "ltx-2.3": (2, channels, 4, 16, 24)}.get(model, (2, channels, 80, 80))
    z = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    keywords = {"return_dict": False, **({"temb": None} if model == "ltx-2.3" else {})}
    for cut in (Cut(sliced=True), Cut(True, 384), Cut(False, 384)):
        estimate = FittedDecode(vae).needed_bytes(z, cut=cut, **keywords) - WORKSPACE
        apply_cut(vae, cut)
        exact = peak_activation_bytes(lambda: vae.decode(z, **keywords))
        apply_cut(vae, WHOLE)
        assert exact <= estimate <= 1.6 * exact, cut


@pytest.mark.parametrize("name", ["flux2-klein", "z-image", "qwen-image", "ltx2.3"])
def test_pipelines_decode_as_before_where_there_is_room(name, tiny, reference):
    pipe = load_pipeline(tiny(name), dtype=torch.bfloat16)
    assert isinstance(pipe.vae.decode, FittedDecode)
    assert torch.equal(generate(pipe, name), reference(name))
    assert "decoding" not in str(pipe.quantization_report)


def test_a_pipeline_says_that_it_cut(tiny):
    pipe = load_pipeline(tiny("z-image"), quantization_vae="int8")
    del pipe.vae.decode
    fit_decoding(pipe.vae, lambda device: WORKSPACE)
    assert torch.isfinite(generate(pipe, "z-image")).all()
    assert "vae: decoding" in str(pipe.quantization_report)
    assert str(pipe.quantization_report) == str(pipe.quantization_report)


def test_a_wrong_ratio_is_not_tiled():
    """AutoencoderKLLTX2Video derives 64 where its configuration says nothing, and decodes by 32: its tiles would not join."""
    with torch.device("meta"):
        vae = published_models()["ltx-2.3"].components["vae"](spatial_compression_ratio=None).bfloat16()
    z = torch.empty(1, vae.config.latent_channels, 3, 16, 24, dtype=torch.bfloat16, device="meta")
    fit_decoding(vae, lambda device: 0)
    assert vae.decode(z, temb=None, return_dict=False)[0].shape[-2:] == (512, 768)
    assert not vae.decode.told


def test_a_decode_that_was_fitted_compiles(tiny):
    vae = load_pipeline(tiny("z-image"), dtype=torch.bfloat16).vae
    del vae.decode
    fit_decoding(vae, lambda device: 0)
    z = torch.zeros(1, vae.config.latent_channels, 4, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(vae.decode, backend="eager", fullgraph=True)
        assert torch.isfinite(compiled(z, return_dict=False)[0]).all()


def test_what_cannot_be_counted_decodes(tiny, monkeypatch):
    vae = load_pipeline(tiny("z-image"), dtype=torch.bfloat16).vae
    z = torch.zeros(1, vae.config.latent_channels, 4, 4, dtype=torch.bfloat16)
    del vae.decode
    with torch.no_grad():
        expected = vae.decode(z).sample
        fit_decoding(vae, lambda device: 0)
        monkeypatch.setattr(type(vae), "from_config", lambda config: 1 / 0)
        assert torch.equal(vae.decode(z).sample, expected)


def test_a_size_is_counted_once(tiny, monkeypatch):
    vae = load_pipeline(tiny("z-image"), dtype=torch.bfloat16).vae
    z = torch.zeros(1, vae.config.latent_channels, 4, 4, dtype=torch.bfloat16)
    del vae.decode
    fit_decoding(vae, lambda device: 10**12)
    counted = []
    monkeypatch.setattr(decoding, "peak_activation_bytes", lambda forward: counted.append(forward()) or 0)
    with torch.no_grad():
        for _ in range(3):
            vae.decode(z)
        vae.decode(z[..., :2])
    assert len(counted) == 2


def test_tiling_by_hand_stays(tiny):
    vae = load_pipeline(tiny("qwen-image"), dtype=torch.bfloat16).vae
    del vae.decode
    fit_decoding(vae, lambda device: 0)
    vae.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=64)
    vae.decode(torch.zeros(1, vae.config.z_dim, 1, 4, 4, dtype=torch.bfloat16))
    assert not vae.decode.told
    assert vae.tile_sample_min_height == 64


def test_copies_have_their_own_and_nothing_is_kept_alive():
    vae = build("z-image").vae
    fit_decoding(vae, lambda device: None)
    twin = copy.deepcopy(vae)
    z = torch.zeros(1, vae.config.latent_channels, 4, 4, dtype=vae.dtype)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert twin.decode(z).sample.abs().max() == 0
        assert vae.decode(z).sample.abs().max() > 0
    decode = vae.decode
    del vae
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        decode(z)
