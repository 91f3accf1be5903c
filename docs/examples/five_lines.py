"""The shortest use of the set loss."""

# --8<-- [start:example]
import torch

import salkernels

features = torch.randn(32, 128, 24, 24, requires_grad=True)  # slices × channels × height × width
volume = torch.arange(2).repeat_interleave(16)  # which scan each slice is from
index, depth = torch.arange(8).repeat(4), torch.full((32,), 10)  # slice number, slices in the scan
pairs = salkernels.slice_pairs(volume, index, depth, t=0.35)  # nearby slices of one scan
salkernels.wla_set_loss(features, pairs, window_size=2).backward()
# --8<-- [end:example]
