"""Which dtype a native formula computes in, and which its result has."""

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
# torch.amp.is_autocast_available knows them too, but torch.compile of torch 2.11 cannot trace that question.
_WITHOUT_AUTOCAST = (
    "fpga", "hip", "ideep", "lazy", "meta", "metal", "mkldnn", "opencl", "opengl", "ve", "vulkan"
)  # fmt: skip


def in_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALVES else tensor


def widened(input: Tensor, wide: bool = False) -> bool:
    """Whether results are float32: asked for, or under autocast, as torch's losses are."""
    device = input.device.type
    return wide or (device not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device))
