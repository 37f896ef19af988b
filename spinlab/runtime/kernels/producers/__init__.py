"""Definition (`reference`), launcher and Triton kernels; Triton loads where one is launched."""
