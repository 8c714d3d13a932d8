"""GPU architectures as TORCH_CUDA_ARCH_LIST lists them.

setup.py runs this file by itself, so it imports nothing of the package.
"""

import re

# What torch.utils.cpp_extension makes of names.
NAMED = {
    "Kepler+Tesla": ["3.7"],
    "Kepler": ["3.5+PTX"],
    "Maxwell+Tegra": ["5.3"],
    "Maxwell": ["5.0", "5.2+PTX"],
    "Pascal": ["6.0", "6.1+PTX"],
    "Volta+Tegra": ["7.2"],
    "Volta": ["7.0+PTX"],
    "Turing": ["7.5+PTX"],
    "Ampere+Tegra": ["8.7"],
    "Ampere": ["8.0", "8.6+PTX"],
    "Ada": ["8.9+PTX"],
    "Hopper": ["9.0+PTX"],
    "Blackwell+Tegra": ["11.0"],
    "Blackwell": ["10.0", "10.3", "12.0", "12.1+PTX"],
}


def listed(architectures: str) -> tuple[list[str], list[str]]:
    """The entries that the kernels are written for, 8.0 and newer, and the others, names as their numbers."""
    entries = [number for entry in re.split(r"[\s;]+", architectures) if entry for number in NAMED.get(entry, [entry])]
    new = [entry for entry in entries if re.match(r"([89]|\d\d)\.\d", entry)]
    return new, [entry for entry in entries if entry not in new]
