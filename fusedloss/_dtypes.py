"""The dtype that a native formula computes in, and the dtype of its result."""

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
# Devices without autocast. torch.amp.is_autocast_available knows them, but torch.compile of torch 2.11 cannot trace it.
_WITHOUT_AUTOCAST = (
    "fpga", "hip", "ideep", "lazy", "meta", "metal", "mkldnn", "opencl", "opengl", "ve", "vulkan"
)  # fmt: skip


def in_float(tensor: Tensor) -> Tensor:
    """float32 for half-precision tensors; others stay as they are."""
    return tensor.float() if tensor.dtype == torch.bfloat16 or tensor.dtype == torch.float16 else tensor


def arithmetic(tensor: Tensor) -> torch.dtype:
    """The dtype of :func:`in_float`, without the copy."""
    return torch.float32 if tensor.dtype == torch.bfloat16 or tensor.dtype == torch.float16 else tensor.dtype


def widened(input: Tensor, wide: bool = False) -> bool:
    """Whether results are float32: where the caller asks for it, and under autocast, as in torch."""
    device = input.device.type
    return wide or (device not in _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device))
