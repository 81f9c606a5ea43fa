"""The course of LTX-2 trains what its pipeline will do, to what is seen and to what is heard."""

import json

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from llm_dit.tiny import scenes
from llm_dit.tiny.scenes.clips import SAMPLES, SOUND_RATE
from llm_dit.tiny.training import ltx2
from llm_dit.tiny.training import ltx2_models as models
from llm_dit.tiny.training.__main__ import COURSES
from llm_dit.tiny.training.course import Amounts, Plan
from llm_dit.tiny.training.data import draw_all
from llm_dit.tiny.training.ltx2_sound import SOUND_FRAMES, spectrograms

COURSE = COURSES["ltx-2"]
CAPTION = "a small red triangle moving right"
CLIP = 192 * 32
UNGUIDED = {"guidance_scale": 1.0, "audio_guidance_scale": 1.0, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def pipe():
    """The untrained pipeline, every weight moved: its modulations start at zero, and would hide what they modulate."""
    built = COURSE.build()
    built.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    for model in (built.text_encoder, built.connectors, built.transformer):
        model.eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    for vae in (built.vae, built.audio_vae):
        vae.latents_mean.uniform_(-1, 1, generator=generator)
        vae.latents_std.uniform_(0.5, 2, generator=generator)
    return built


def noise(count):
    return torch.randn(count, CLIP + 18 * 16, generator=torch.Generator().manual_seed(1))


def tones(count=2):
    generator = np.random.default_rng(0)
    return torch.from_numpy(np.stack([scenes.draw_tone(scenes.sample_clip(generator), generator) for _ in range(count)]))


def normalized(pipe, output):
    """What a pipeline hands out as latents, as one vector of what the transformer predicts."""
    seen = COURSE.seen.clean(pipe.vae, output.frames).flatten(1)
    return torch.cat((seen, COURSE.heard.clean(pipe.audio_vae, output.audio).flatten(1)), dim=1)


def call(pipe, prompts, clean, **others):
    audio = clean[:, CLIP:].unflatten(1, (18, 16)) * pipe.audio_vae.latents_std + pipe.audio_vae.latents_mean
    clip = clean[:, :CLIP].unflatten(1, (192, 32))  # packed ones are taken as they are, audio is normalized nevertheless
    return pipe(prompt=prompts, latents=clip, audio_latents=audio, **{**COURSE.call, **UNGUIDED, **others})


@torch.no_grad()
def test_one_step_of_the_pipeline_follows_the_trained_velocity(pipe):
    noisy, given, prompts, shift = noise(2), 0.4, [CAPTION, ""], pipe.scheduler.config.shift
    sigma = shift * given / (1 + (shift - 1) * given)
    tokens = COURSE.tokens(pipe.tokenizer, prompts)
    change = sigma * COURSE.velocity(pipe, noisy, torch.full((2,), sigma), tokens.ids, tokens.mask)
    found = normalized(pipe, call(pipe, prompts, noisy, sigmas=[given], output_type="latent"))
    assert change[:, :CLIP].std() > 0.1
    assert change[:, CLIP:].std() > 0.1
    torch.testing.assert_close(found, noisy - change, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_captions_of_a_batch_do_not_disturb_each_other(pipe):
    tokens = COURSE.tokens(pipe.tokenizer, [CAPTION, "a large cyan cross moving up", ""])
    noisy, sigma = noise(3), torch.tensor([0.2, 0.5, 0.9])
    whole = COURSE.velocity(pipe, noisy, sigma, tokens.ids, tokens.mask)
    for index in range(3):
        one = slice(index, index + 1)
        alone = COURSE.velocity(pipe, noisy[one], sigma[one], tokens.ids[one], tokens.mask[one])
        torch.testing.assert_close(whole[one], alone, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_pipeline_decodes_what_is_trained_on():
    pipe = COURSE.build()  # untrained, the transformer predicts 0, and the pipeline decodes the latents that it is given
    pipe.set_progress_bar_config(disable=True)
    clips = torch.rand(2, 3, 17, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    sounds = COURSE.heard.prepared(spectrograms(tones()))
    seen, heard = (
        coding.set_statistics(vae, coding.posterior(vae, data)[0])
        for coding, vae, data in ((COURSE.seen, pipe.vae, clips), (COURSE.heard, pipe.audio_vae, sounds))
    )
    clean = torch.cat((COURSE.seen.clean(pipe.vae, seen).flatten(1), COURSE.heard.clean(pipe.audio_vae, heard).flatten(1)), 1)
    found = call(pipe, [CAPTION] * 2, clean, sigmas=[1.0], output_type="pt")
    expected = (COURSE.seen.decoded(pipe.vae, seen) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found.frames, expected.movedim(1, 2), rtol=1e-3, atol=1e-3)
    wave = pipe.vocoder(COURSE.heard.decoded(pipe.audio_vae, heard))
    torch.testing.assert_close(found.audio, wave, rtol=1e-3, atol=1e-3)
    assert wave.shape == (2, 2, SOUND_FRAMES * models.HOP)
    assert SAMPLES >= SOUND_FRAMES * models.HOP


@torch.no_grad()
def test_a_weak_channel_of_a_clip_is_predicted_like_a_strong_one():
    """Channels share one small noise, beside which a thirtieth of another still tells much: shapes, in a trained model."""
    vae = COURSE.build().vae
    deviation = torch.logspace(-2, -0.5, models.CHANNELS).view(1, -1, 1, 1, 1)
    latents = deviation * torch.randn(16, models.CHANNELS, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    clean = COURSE.seen.clean(vae, COURSE.seen.set_statistics(vae, latents))
    torch.testing.assert_close(clean.std(dim=(0, 1)), torch.ones(models.CHANNELS), rtol=0.05, atol=0)


class FromHost(TorchFunctionMode):
    """Notes the calls that bring a value from the host to a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        moved = func is torch.Tensor.to and args[0].device.type == "cpu"
        if (moved or func in (torch.tensor, torch.as_tensor)) and result.device.type == "meta":
            self.found.append(func.__name__)
        return result


def test_a_step_can_be_captured():
    """On the meta device a value that the host needs is an error; the first step may copy what is then kept."""
    pipe = COURSE.build()
    for name in COURSE.learners:
        pipe.components[name].to("meta")
    noisy, sigma = torch.zeros(4, CLIP + 18 * 16, device="meta"), torch.zeros(4, device="meta")
    tokens = COURSE.tokens(pipe.tokenizer, [CAPTION] * 4)
    ids, mask = tokens.ids.to("meta"), tokens.mask.to("meta")
    uses = [FromHost(), FromHost()]
    for use in uses:
        with use, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            COURSE.velocity_error(COURSE.velocity(pipe, noisy, sigma, ids, mask).float(), noisy).backward()
    assert uses[0].found
    assert uses[1].found == []


def test_a_pitch_is_in_its_spectrogram():
    assert spectrograms(tones(4)).shape == (4, SOUND_FRAMES, models.MEL_BINS)
    for shape, pitch in scenes.PITCHES.items():
        clip = scenes.Clip(scenes.Thing("small", "red", shape), "up")
        mel = spectrograms(torch.from_numpy(scenes.draw_tone(clip, np.random.default_rng(0))[None]))[0]
        peaks = mel[5:-5].argmax(dim=-1)
        assert (peaks == peaks[0]).all()
        lowest, highest = (2595 * np.log10(1 + hertz / 700) for hertz in (pitch, SOUND_RATE / 2))
        assert abs(peaks[0].item() / models.MEL_BINS - lowest / highest) < 0.1


def test_every_word_of_a_caption_is_a_token_and_the_weights_fit():
    pipe = COURSE.build()
    assert COURSE.tokens(pipe.tokenizer, [CAPTION, ""]).mask.sum(dim=1).tolist() == [7, 1]
    modules = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    assert sum(2 * parameter.numel() for model in modules for parameter in model.parameters()) < 5e6
    assert json.loads(json.dumps(COURSE.call)) == COURSE.call


def test_the_stages_before_the_denoiser_go_on_from_their_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(ltx2, "_TESTED", 1)
    drawn = draw_all(tmp_path, 3, COURSE.subject)
    plan = Plan(tmp_path, torch.device("cpu"), Amounts(vae_minutes=0.002, vae_batch=1), captured=False)
    pipe = COURSE.build()
    clean = COURSE.latents(pipe, drawn, plan)
    assert (clean.shape, clean.dtype) == ((3, CLIP + 18 * 16), torch.bfloat16)
    assert clean.isfinite().all()
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {
        f"ltx-2-{name}.safetensors" for name in ("vae", "audio-vae", "vocoder")
    }
    again = COURSE.build()
    assert torch.equal(COURSE.latents(again, drawn, plan), clean)
    assert torch.equal(again.vocoder.conv_in.weight, pipe.vocoder.conv_in.weight)
