"""What a call costs the host, on a machine without a GPU: kernels that do nothing."""
