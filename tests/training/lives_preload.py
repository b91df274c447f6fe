"""What every process of lives.py needs, imported once in the process that they fork from."""

import accelerate
import av
import diffusers.training_utils
import matplotlib.figure
import numpy
import PIL.Image
import safetensors.torch
import torch

import pvdm_fast.diffusion.sampling
import pvdm_fast.sample
import pvdm_fast.train
import pvdm_fast.training.session

torch.set_num_threads(1)
USED = (accelerate, av, diffusers.training_utils, matplotlib.figure, numpy, PIL.Image, safetensors.torch, pvdm_fast)
