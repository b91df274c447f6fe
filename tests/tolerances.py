"""Every tolerance of the tests, with its reason. Errors are relative, in the 2-norm, unless stated otherwise."""

from __future__ import annotations

import torch

# Golden values of the authors' release, float32 on a CPU: the design's own figures. Blocks differ only in the order of
# sums. Whole networks accumulate that over some hundred layers.
GOLDEN_BLOCK = 1e-5
GOLDEN_NETWORK = 1e-4

# If a bias precedes a norm with one channel per group, the norm removes it, and its gradient is only rounding noise.
# Such gradients (in the golden network up to 4.4e-7 of the layer's weight gradient) can't be compared. They can only be
# small.
NO_GRADIENT = 1e-6

# One operation against the float64 reference on the same (rounded) inputs. Results and gradients are rounded once to
# their dtype: half a unit in the last place is 6e-8, 3.9e-3 and 4.9e-4 relative. Sums are in float32. So what remains
# is that rounding, and in float32 sums of some thousand terms (measured here: up to 2e-6).
OPERATION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}

# Gradients that the reference rounds twice in 16 bits (conv: the sum of three planes' parts, each rounded).
CONV_SUM = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}

# The project's own requirements against float64. float32: only rounding, through whole networks too (measured: up to
# 1.4e-6). bfloat16: at most twice the error of the eager computation in bfloat16 (flash-attention's criterion).
FLOAT32_ERROR = 1e-5
BFLOAT16_FACTOR = 2.0

# Attention on tensor cores rounds the weights (and their gradients, and rotated q and k) to 16 bits before the second
# product, as every flash attention does. Eager attention in 16 bits rounds them too. That is half a unit in the last
# place for each of two or three roundings in a row: at most 3 x 3.9e-3 and 3 x 4.9e-4.
ATTENTION_16_BIT = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}

# A whole network in 16 bits on another backend: as close to the golden values as the reference in the same dtype, times
# this. Every operation of both rounds to 16 bits, with different orders of sums. So the errors are two draws of the
# same noise over millions of values.
NETWORK_16_BIT = 1.25

# A float32 norm of values around 1000 with a spread of 1: the values themselves are known only to 6e-5.
NORM_OF_LARGE_MEAN = 1e-4

# A Fréchet distance in float64 against scipy's general matrix square root, relative to the traces. The root of an
# eigenvalue that rounding moved by 2e-16 is wrong by up to 1.5e-8, and some hundred of them are summed.
FRECHET = 1e-7

# Means of the same clips in float64, added in another order by several processes.
SUM_ORDER = 1e-13

# LPIPS in float32 against float64, through VGG16's 13 convolutions of up to 4608 terms and the division by lengths. In
# 16 bits each convolution rounds its input, weights and result, and the distance is a small difference of these. Some
# thirty roundings of 3.9e-3 (bfloat16) add up like a random walk to 2e-2, relative to a distance of about 0.5.
LPIPS = 1e-5
LPIPS_16_BIT = 5e-2

# The discriminators and their losses in float64 against the same formulas written with functional operations.
PATCHGAN = 1e-10

# The slope of the penalty on the discriminators' gradient in float64, by a difference quotient over 2e-4. The function
# is smooth except for the corners of five leaky rectifiers.
PENALTY_SLOPE = 1e-4

# Gradients of the autoencoder and the discriminators in float32, summed in another order: one backward pass from the
# sum of losses, against one per loss up to the reconstruction. Convolutions have some thousand terms.
SECOND_PHASE_GRADIENT = 1e-4

# Pixels and features in [-1, 1] after an interpolation in float32, or from a network with another batch size: some
# roundings of 6e-8.
FLOAT32_PIXELS = 1e-6

# The covariance of an untrained I3D's features, which differ by a thousandth from clip to clip. float32 (6e-8 of the
# features) leaves an error of a hundredth of a per cent.
I3D_COVARIANCE = 1e-3

# Four training steps in two processes against one: only the order of sums differs. Losses and gradient norms (measured:
# up to 2e-6) and AdamW's mean of the gradients (up to 3e-5) come from gradients that a few rounded steps have moved
# apart. In the weights (up to 8e-5), AdamW turns the rounding noise of a gradient that should be 0 (see NO_GRADIENT)
# into a step as large as 3e-3. For comparison: wrongly divided noise moves gradients by 0.19, and an average that
# misses a step moves weights by 1.1e-3.
PROCESSES_RECORDS = 1e-5
PROCESSES_GRADIENTS = 1e-4
PROCESSES_WEIGHTS = 5e-4
# Forty steps, which amplify that.
PROCESSES_LONG = 1e-2

# The projection in 16 bits: each of its up to four layers rounds its four products' left operands to 16 bits, forward
# and backward, as the unfused layers do. Half a unit in the last place each, which adds up like a random walk.
PROJECTION_16_BIT = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
