"""What the processes of jobs.py and lives.py need, imported once in the process that they fork from.

What is imported late belongs here too. A model's `to` alone imports `diffusers.hooks`, and with it peft and
transformers: 2 s of CPU time in each process.
"""

import accelerate
import av
import diffusers.hooks
import diffusers.training_utils
import matplotlib.backends.backend_agg
import matplotlib.figure
import numpy
import PIL.Image
import safetensors.torch
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import yaml
from training import small

import pvdm_fast.diffusion.sampling
import pvdm_fast.diffusion.schedulers
import pvdm_fast.models
import pvdm_fast.sample
import pvdm_fast.train
import pvdm_fast.training.session
from pvdm_fast.training import previews

torch.set_num_threads(1)
for name in small.DRAWING:  # no test looks at these processes' pictures
    setattr(previews, name, small.plain_picture)
USED = (accelerate, av, diffusers.hooks, matplotlib.figure, numpy, PIL.Image, safetensors.torch, yaml, pvdm_fast)
