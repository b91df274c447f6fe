"""From noise to latents: noise levels and the loss, schedulers, guidance, sampling, and the diffusers pipeline."""
