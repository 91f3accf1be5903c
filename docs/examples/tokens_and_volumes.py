"""Features that are no maps yet: tokens of a vision transformer, and maps of a 3D network."""

import torch

import salkernels

torch.manual_seed(0)
pairs = [(0, 1), (1, 0), (2, 3), (3, 2)]

# --8<-- [start:tokens]
tokens = torch.randn(4, 1 + 14 * 14, 64, requires_grad=True)  # (S, 1 + N, C), class token first
patches = tokens[:, 1:]  # without it, and without register tokens if there are any
maps = patches.mT.unflatten(2, (14, 14))  # (S, C, rows, columns), a view
loss = salkernels.wla_set_loss(maps, pairs, window_size=2)
# --8<-- [end:tokens]

# --8<-- [start:volumes]
volumes = torch.randn(2, 32, 10, 12, 12, requires_grad=True)  # (B, C, D, H, W) of a 3D network
B, C, D, H, W = volumes.shape
slices = volumes.movedim(2, 1).flatten(0, 1)  # (B * D, C, H, W): slice d of scan b is b * D + d
near = salkernels.slice_pairs(
    volume=torch.arange(B).repeat_interleave(D),
    index=torch.arange(D).repeat(B),
    num_slices=D,
    t=0.35,
)
through_plane = salkernels.wla_set_loss(slices, near, window_size=2)

# The same pixels along another axis: windows of (depth, width) in coronal slices.
coronal = volumes.movedim(3, 1).flatten(0, 1)  # (B * H, C, D, W)
near = salkernels.slice_pairs(
    volume=torch.arange(B).repeat_interleave(H),
    index=torch.arange(H).repeat(B),
    num_slices=H,
    t=0.2,
)
in_coronal = salkernels.wla_set_loss(coronal, near, window_size=(2, 2))
# --8<-- [end:volumes]

(loss + through_plane + in_coronal).backward()
