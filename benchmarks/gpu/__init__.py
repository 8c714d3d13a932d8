"""The speed of the CUDA kernels against the memory of the GPU and against their peers: ``python -m benchmarks.gpu``."""
