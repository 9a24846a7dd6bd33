"""`python -m benchmarks.gpu_check`: whether the GPU's kernels and program are right on this machine, and how fast."""
