"""Training tiny models that draw what captions say: the autoencoder first, then text encoder and transformer together.

    python -m llm_dit.tiny.training z-image --folder runs --output models

takes minutes on one GPU, and goes on where it was interrupted. What is particular to a family, the way from captions and
pictures to what its transformer reads, is a `Course` in the module of its name.
"""
