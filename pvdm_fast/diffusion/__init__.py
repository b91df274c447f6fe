"""From noise to latents: noise levels and their loss, schedulers, guidance, sampling, and the diffusers pipeline."""
