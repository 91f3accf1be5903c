"""Penalties of one's own on the maxima, and pixels that take no part."""

import torch
import torch.nn.functional as F

import salkernels

torch.manual_seed(0)
features = torch.randn(4, 16, 24, 24, requires_grad=True)  # (S, C, H, W)
pairs = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]).bool()

# --8<-- [start:hinge]
max_sim, argmax = salkernels.align_set(features, pairs, 2)  # (P, H, W) each
loss = F.relu(0.9 - max_sim).square().mean()  # nothing to gain above 0.9
loss.backward()
# --8<-- [end:hinge]
squared_hinge, features.grad = loss, None

max_sim, argmax = salkernels.align_set(features, pairs, 2)
# --8<-- [start:others]
log = -((1 + max_sim) / 2).clamp_min(1e-6).log().mean()  # bad matches weigh more
share = torch.sigmoid((max_sim - 0.5) / 0.1).mean()  # of matches better than 0.5, softly
mae = (1 - max_sim).abs().mean()  # wla_set_loss(features, pairs, 2)
# --8<-- [end:others]

# --8<-- [start:weights]
weight = torch.rand(4, 24, 24)  # one for each pixel of each sample: a heart mask, a confidence
query, key = pairs.nonzero(as_tuple=True)  # rows of max_sim are in this order
weighted = (weight[query] * (1 - max_sim)).sum() / weight[query].sum()
# --8<-- [end:weights]

# --8<-- [start:valid]
valid = torch.rand(4, 24, 24) > 0.3  # (S, H, W): False where a view was padded, or shows air
max_sim, argmax = salkernels.align_set(features, pairs, 2, valid=valid)
takes_part = argmax >= 0  # valid, with a valid pixel in the key's window
mean = ((1 - max_sim) * takes_part).sum() / takes_part.sum()
# --8<-- [end:valid]

# --8<-- [start:places]
rows, columns = salkernels.match_pixels(argmax, 2)  # in the key's map, -1 where there is no match
partner = features[key].detach().movedim(1, 3)  # (P, H, W, C)
matched = partner[torch.arange(len(key))[:, None, None], rows.clamp_min(0), columns.clamp_min(0)]
# --8<-- [end:places]

# --8<-- [start:plot]
images = torch.rand(4, 96, 96)
figure = salkernels.plot_matches(
    images[query[0]], images[key[0]], salkernels.Matches(max_sim, argmax), window_size=2, pair=0
)
# --8<-- [end:plot]

# --8<-- [start:sets]
some = [(0, 1), (0, 3), (2, 1)]  # query and key of each pair, in any order; a tensor (K, 2) too
one_by_one = salkernels.wla_set_loss(features, some, 2, reduction="none")  # (K,), in that order
halfway = salkernels.wla_set_loss(features, some, 2, detach_keys=True)

bank = torch.randn(50, 16, 24, 24)  # a memory bank, or the maps of a teacher
near = torch.rand(4, 50) < 0.1  # (S, M) bool, or weights, or indices into both
against_bank = salkernels.wla_set_loss(features, near, 2, keys=bank)
# --8<-- [end:sets]

# --8<-- [start:learnt]
temperature = torch.nn.Parameter(torch.tensor(0.1))
log_variance = torch.nn.Parameter(torch.zeros(()))
embeddings = features.mean(dim=(2, 3))
terms = salkernels.sal_loss(
    features,
    embeddings,
    volume=[0, 0, 1, 1],  # lists and numbers are taken where a tensor of integers is meant
    index=[3, 4, 2, 3],
    num_slices=10,
    window_size=2,
    lambda_=torch.exp(-log_variance),  # uncertainty weighting: λ has a price
    temperature=temperature,
)
weighed = terms.loss + log_variance
# --8<-- [end:learnt]

(log + share + weighted + mean + halfway + against_bank + weighed).backward()
