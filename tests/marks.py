"""Why a test is left out where it cannot run, and what covers it there."""

import shutil

import pytest
from compiler import COMPILER
from losses import extension

needs_extension = pytest.mark.skipif(
    extension is None, reason="no extension here; contract/test_fallback.py covers the native path"
)
needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER.split()[0]) is None,
    reason=f"no C++ compiler ({COMPILER}); accuracy/test_values.py covers the kernels as they were built",
)


def on_cpu_alone(reason: str) -> pytest.MarkDecorator:
    """For a test whose contract is another one on a GPU; the reason names what covers it there."""
    return pytest.mark.on_cpu_alone(reason=reason)


# What `--device cuda` cannot compare with torch; conftest.py knows the single cases of l1_loss with a weight.
UNDER_A_MODE = (
    "torch's default device is a function mode, under which torch itself warns from another file and F.l1_loss loses "
    "its weight; the kernels' values with weights are compared in the other tests"
)
not_under_a_default_device = on_cpu_alone(UNDER_A_MODE)
