"""What the losses, training, benchmarks and tools share; the standard library only, not public."""
