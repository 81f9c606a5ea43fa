"""Z-Image from the command line.

    python pipelines/z_image.py "a red circle" --model PATH --quantization-transformer int8 -o out.png

`--help` lists the options; they are those of `llm-dit generate`.
"""

from llm_dit.cli import run_family_script

if __name__ == "__main__":
    run_family_script("z_image")
