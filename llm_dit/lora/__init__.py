"""LoRAs in pipelines whose models are quantized: loading, fusing and unfusing, with peft and diffusers."""
