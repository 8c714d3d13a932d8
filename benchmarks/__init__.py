"""The speed of the kernels against torch and other packages: ``python -m benchmarks [--device cuda]``."""

import os

# torch's profiler, which counts memory here, would write two lines about each use. It reads this when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
