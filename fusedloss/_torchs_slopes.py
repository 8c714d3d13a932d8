"""The flags that give the kernels the slopes of the torch that is installed. setup.py runs this file by itself."""

import torch


def flags() -> list[str]:
    """Losses of margins follow clamp_min, which has a slope where its input meets the bound only before torch 2.14."""
    x = torch.zeros(1, requires_grad=True)
    (slope,) = torch.autograd.grad(x.clamp_min(0).sum(), x)
    return [] if slope.item() else ["-DFUSEDLOSS_SLOPE_AT_BOUND=0"]
