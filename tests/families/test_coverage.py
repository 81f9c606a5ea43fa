"""Every pipeline of the four families that diffusers has, we have, in our class and as a tiny pipeline."""

import importlib
import inspect
import pickle
import pkgutil

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from llm_dit.families import family_names, get_family, pipeline_classes, published_models, quantizable_class
from llm_dit.mixin import QuantizablePipelineMixin, diffusers_class
from llm_dit.tiny import tiny_pipelines

PACKAGES = ("flux2", "ltx2", "z_image", "qwenimage", "qwenimage21")


def diffusers_pipelines() -> set[str]:
    """The pipeline classes that diffusers defines in the packages of the families."""
    found = set()
    for package in PACKAGES:
        module = importlib.import_module(f"diffusers.pipelines.{package}")
        for info in pkgutil.iter_modules(module.__path__):
            # export_utils imports PyAV, which is an extra.
            if info.name == "export_utils":
                continue
            source = importlib.import_module(f"{module.__name__}.{info.name}")
            for name, value in vars(source).items():
                if inspect.isclass(value) and issubclass(value, DiffusionPipeline) and value.__module__ == source.__name__:
                    found.add(name)
    return found


def test_every_pipeline_of_diffusers_is_covered():
    assert len(diffusers_pipelines()) >= 29
    assert {f"Quantizable{name}" for name in diffusers_pipelines()} == set(pipeline_classes())


def test_every_pipeline_has_a_tiny_one():
    assert {row.pipeline_class for row in tiny_pipelines().values()} == diffusers_pipelines()


@pytest.mark.parametrize("name", sorted(pipeline_classes()))
def test_a_class_extends_its_diffusers_class_and_its_family(name):
    cls = pipeline_classes()[name]
    assert issubclass(cls, QuantizablePipelineMixin)
    assert diffusers_class(cls) is getattr(diffusers, name.removeprefix("Quantizable"))
    assert cls.family.name in family_names()
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert cls.__doc__
    expected, _ = cls._get_signature_keys(cls)
    assert expected == diffusers_class(cls)._get_signature_keys(diffusers_class(cls))[0]


@pytest.mark.parametrize("name", sorted(pipeline_classes()))
def test_every_model_of_a_pipeline_has_a_role(name):
    """Only what is no model, and the duration head, has none; a new kind of component in diffusers shows here."""
    cls = pipeline_classes()[name]
    expected, _ = cls._get_signature_keys(cls)
    without = {component for component in expected if cls.component_role(component) is None}
    assert without <= {"scheduler", "audio_scheduler", "tokenizer", "processor", "siglip_processor", "duration_head"}


def test_an_unknown_pipeline_is_refused_with_what_is_covered():
    with pytest.raises(ValueError, match=r"no quantizable pipeline for 'FluxPipeline': it covers .*ZImagePipeline"):
        quantizable_class("FluxPipeline")


# Published parameter counts in billions, as the model cards and repositories give them.
COUNTS = {
    ("flux2-dev", "transformer"): 32.22,
    ("flux2-dev", "text_encoder"): 24.01,
    ("klein-4b", "transformer"): 3.88,
    ("klein-4b", "text_encoder"): 4.02,
    ("klein-9b", "transformer"): 9.08,
    ("klein-9b", "text_encoder"): 8.19,
    ("z-image-turbo", "transformer"): 6.15,
    ("qwen-image", "transformer"): 20.43,
    ("qwen-image", "text_encoder"): 8.29,
    ("qwen-image-2.1", "transformer"): 7.12,
    ("ltx-2", "transformer"): 18.88,
    ("ltx-2", "text_encoder"): 12.19,
    ("ltx-2", "connectors"): 1.43,
    ("ltx-2", "vae"): 1.22,
    ("ltx-2.3", "transformer"): 18.99,
    ("ltx-2.3", "connectors"): 3.17,
    ("ltx-2.3", "vae"): 0.73,
}


@pytest.mark.parametrize(("model", "component"), COUNTS)
def test_published_sizes(model, component):
    with torch.device("meta"):
        built = published_models()[model].components[component]()
    assert sum(p.numel() for p in built.parameters()) / 1e9 == pytest.approx(COUNTS[model, component], abs=0.006)


def test_the_published_z_image_vae_scales_as_the_pipeline_decodes():
    with torch.device("meta"):
        config = published_models()["z-image-turbo"].components["vae"]().config
    assert (config.scaling_factor, config.shift_factor) == (0.3611, 0.1159)


def test_published_models_name_classes_and_roles():
    for family in map(get_family, family_names()):
        for model in family.published:
            cls = quantizable_class(model.pipeline_class)
            assert cls.family is family
            assert all(cls.component_role(component) for component in model.components)
