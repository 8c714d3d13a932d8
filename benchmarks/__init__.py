"""The speed of the kernels against torch and other packages: ``python -m benchmarks [--device cuda]``."""
