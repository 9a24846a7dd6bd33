"""Kernels for the CPU, compiled by Numba at their first use and kept on disk."""

from gralora_kernels.cpu.cache import use_directory_of_these_sources

use_directory_of_these_sources()
