"""Courses train what their pipelines will do: the same tokens, the same signs, the same latents."""

import pytest
import torch

from llm_dit.tiny.training.__main__ import COURSES
from llm_dit.tiny.training.pictures import PictureCourse
from llm_dit.tiny.training.qwen_image import convolving_pictures

PICTURES = [name for name, course in COURSES.items() if isinstance(course, PictureCourse)]
CAPTION = "a small red circle to the left of a large yellow triangle"
UNGUIDED = {"z-image": {"guidance_scale": 0.0}, "flux2-klein": {"guidance_scale": 1.0}, "qwen-image": {"true_cfg_scale": 1.0}}


def test_one_frame_convolved_as_a_picture():
    """Qwen-Image's autoencoder computes the same in two dimensions, and is its own again afterwards."""
    course = COURSES["qwen-image"]
    vae = course.build().vae.eval()
    pictures = torch.rand(2, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        expected = course.moments(vae, pictures)
        decoded = course.decoded(vae, expected.chunk(2, dim=1)[0])
        with convolving_pictures(vae):
            found = course.moments(vae, pictures)
            assert torch.allclose(found, expected, atol=1e-4)
            assert torch.allclose(course.decoded(vae, found.chunk(2, dim=1)[0]), decoded, atol=1e-4)
    assert not any("forward" in vars(module) for module in vae.modules())


def shaken(course):
    """The untrained pipeline with every weight moved: the modulations start at zero, and would hide what they modulate."""
    pipe = course.build()
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    for model in (pipe.text_encoder, pipe.transformer):
        model.eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipe


def for_the_pipeline(name, clean):
    """Latents as the pipeline's call takes them."""
    return clean.transpose(1, 2).reshape(len(clean), -1, 8, 8) if name == "flux2-klein" else clean


def pictures(count=2):
    return torch.rand(count, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1


def call(course, pipe, clean, sigma, **others):
    return pipe(
        prompt=CAPTION,
        latents=for_the_pipeline(course.name, clean),
        sigmas=[sigma],
        **{**course.call, **UNGUIDED[course.name], "num_inference_steps": 1, **others},
    ).images


@pytest.mark.parametrize("name", PICTURES)
@torch.no_grad()
def test_one_step_of_the_pipeline_follows_the_trained_velocity(name):
    course = COURSES[name]
    pipe = shaken(course)
    course.set_statistics(pipe.vae, course.posterior(pipe.vae, pictures())[0])
    noisy = torch.randn(course.clean(pipe.vae, course.posterior(pipe.vae, pictures(1))[0]).shape)
    given = 0.4
    shift = pipe.scheduler.config.shift
    sigma = shift * given / (1 + (shift - 1) * given)
    tokens = course.tokens(pipe.tokenizer, [CAPTION])
    expected = noisy - sigma * course.velocity(pipe, noisy, torch.tensor([sigma]), tokens.ids, tokens.mask)
    found = call(course, pipe, noisy, given, output_type="latent")
    if name == "flux2-klein":  # hands its latents out as the autoencoder takes them
        found = course.clean(pipe.vae, found)
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PICTURES)
@torch.no_grad()
def test_captions_of_a_batch_do_not_disturb_each_other(name):
    course = COURSES[name]
    pipe = shaken(course)
    captions = [CAPTION, "a small red cross", ""]
    tokens = course.tokens(pipe.tokenizer, captions)
    course.set_statistics(pipe.vae, course.posterior(pipe.vae, pictures())[0])
    noisy = torch.randn(3, *course.clean(pipe.vae, course.posterior(pipe.vae, pictures(1))[0]).shape[1:])
    sigma = torch.tensor([0.2, 0.5, 0.9])
    whole = course.velocity(pipe, noisy, sigma, tokens.ids, tokens.mask)
    for index in range(3):
        one = slice(index, index + 1)
        alone = course.velocity(pipe, noisy[one], sigma[one], tokens.ids[one], tokens.mask[one])
        torch.testing.assert_close(whole[one], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PICTURES)
@torch.no_grad()
def test_the_pipeline_decodes_what_is_trained_on(name):
    course = COURSES[name]
    pipe = course.build()  # untrained, the transformer predicts 0, and the pipeline decodes the latents that it is given
    pipe.set_progress_bar_config(disable=True)
    latents = course.posterior(pipe.vae.eval(), pictures(64))[0]
    latents = course.set_statistics(pipe.vae, latents)
    torch.testing.assert_close(course.posterior(pipe.vae, pictures(64))[0], latents, rtol=1e-3, atol=1e-3)
    clean = course.clean(pipe.vae, latents)
    found = call(course, pipe, clean[:1], 1.0, output_type="pt")
    expected = (course.decoded(pipe.vae, latents[:1]) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_every_word_of_a_caption_is_a_token_and_qwens_template_is_as_long_as_the_published_one():
    course = COURSES["qwen-image"]
    tokens = course.tokens(course.build().tokenizer, [CAPTION, ""])
    assert tokens.mask.sum(dim=1).tolist() == [34 + 12 + 5, 34 + 5]


def test_a_longer_prompt_is_refused():
    course = COURSES["z-image"]
    with pytest.raises(ValueError, match="longer than the 32 tokens"):
        course.tokens(course.build().tokenizer, ["a small red circle " * 10])
