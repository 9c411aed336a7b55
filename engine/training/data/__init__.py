"""What a stage trains on: sprite world or a folder of layered clips, as latents and texts."""
