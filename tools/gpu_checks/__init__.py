"""Parts of tools/gpu_check.py: they need numpy, nvcc and PyTorch or CuPy, and nothing of paddle_vl_sp."""
