"""Kernels of ``net/gpu`` compiled for the CPU with g++ and called through ctypes."""
