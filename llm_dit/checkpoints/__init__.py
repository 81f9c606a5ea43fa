"""Checkpoint files as the authors of models, and ComfyUI, publish them: what they hold, how they load, how they are written.

`header` and `layout` read a file's header alone, without torch. `names` finds which rows of which of its tensors become which
parameter of a diffusers model, `assemble` builds the model's weights from that, and `convert` writes such files.
"""
