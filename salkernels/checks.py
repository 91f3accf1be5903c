"""Argument checks of the public functions. Each error says in one sentence what was expected, what
was passed and what to do.

Values of tensors are read only where that needs no device synchronisation and does not break a
`torch.compile` graph: on CPU tensors in eager mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Evaluated once, since dynamo of torch 2.10 and 2.11 cannot trace the call.
AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")
    if torch.amp.is_autocast_available(device)
)
FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WindowSize = int | Sequence[int]
# Which pixels of two maps take part: one mask for both, or one for each; None means every pixel.
Valid = Tensor | tuple[Tensor | None, Tensor | None] | None
# Rows of one table, or of pairs of indices; and one number for each sample, or for all.
Rows = Tensor | Sequence[Sequence[float]] | npt.NDArray[Any]
Column = Tensor | Sequence[float] | npt.NDArray[Any] | float


def values_visible(tensor: Tensor) -> bool:
    """Whether the tensor's values may be read here without a synchronisation or a graph break.

    A subclass may have none: fake tensors, for one, stand for shapes alone.
    """
    return (
        (type(tensor) is Tensor or _has_values(type(tensor)))
        and tensor.is_cpu
        and not torch.compiler.is_compiling()
    )


def _has_values(kind: type[Tensor]) -> bool:
    """Whether a subclass leaves operators as they are: parameters do, and MONAI's MetaTensor."""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def check_tensor(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    return x


# What features of other shapes may be, and how they become maps: see docs/training/own-loop.md.
_OTHER_SHAPES = {
    3: "; give one map as {name}[None], and tokens (samples, tokens, channels) of a transformer as "
    "{name}.mT.unflatten(2, (rows, columns)), without the class token",
    5: "; give volumes (samples, channels, depth, height, width) as the maps of their slices, "
    "{name}.movedim(2, 1).flatten(0, 1), or compare them along another axis",
}

# Extents beyond this overflow the arithmetic of sizes long before they fit a memory: only maps that
# are expanded, and have no memory of their own, can be so large.
LARGEST_EXTENT = 2**31 - 1


def check_features(name: str, x: object) -> Tensor:
    """A floating-point map (samples, channels, height, width), no extent but the first empty."""
    x = check_dense(name, check_tensor(name, x))
    if x.dim() != 4:
        raise ValueError(
            f"{name} must have 4 dimensions (samples, channels, height, width), "
            f"got shape {tuple(x.shape)}{_OTHER_SHAPES.get(x.dim(), '').format(name=name)}"
        )
    if x.dtype not in FEATURE_DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; "
            f"convert it, for example with {name}.float()"
        )
    if 0 in x.shape[1:]:
        raise ValueError(
            f"{name} needs at least one channel and one pixel, got shape {tuple(x.shape)}"
        )
    if not torch.compiler.is_compiling() and (
        max(x.shape) > LARGEST_EXTENT or x.shape[2] * x.shape[3] > LARGEST_EXTENT
    ):
        raise ValueError(
            f"{name} must have fewer than 2^31 samples, channels and pixels of a map, "
            f"got shape {tuple(x.shape)}"
        )
    return x


def check_dense(name: str, x: Tensor) -> Tensor:
    if x.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got layout {x.layout}; use {name}.to_dense()"
        )
    return x


def check_same_kind(name_x: str, x: Tensor, name_y: str, y: Tensor) -> None:
    """Same device, and the same dtype unless autocast is on (it then promotes the narrower)."""
    if x.device != y.device:
        raise ValueError(
            f"{name_x} and {name_y} must be on one device, got {x.device} and {y.device}; "
            f"move one with .to(device)"
        )
    if x.dtype != y.dtype and not autocast_on(x.device.type):
        raise TypeError(
            f"{name_x} and {name_y} must have one dtype, got {x.dtype} and {y.dtype}; "
            f"convert one with .to(dtype)"
        )


def autocast_on(device: str) -> bool:
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def check_same_shape(name_x: str, x: Tensor, name_y: str, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(
            f"{name_x} and {name_y} must have the same shape, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )


def check_window(window_size: WindowSize, height: int, width: int) -> tuple[int, int]:
    """`window_size` as (rows, columns), each at least 1 and at most the size of the map."""
    if type(window_size) is int and 1 <= window_size <= height and window_size <= width:
        return window_size, window_size  # nearly always, and twenty times faster
    rows, columns = check_window_size(window_size)
    if rows > height or columns > width:
        raise ValueError(
            f"window_size {(rows, columns)} is larger than the {height} x {width} feature map; "
            f"use a window of at most that size, or la_loss for one window over the whole map"
        )
    return rows, columns


def check_window_size(window_size: WindowSize) -> tuple[int, int]:
    """`window_size` as (rows, columns), each at least 1."""
    pair: tuple[Any, ...] = (window_size, window_size)
    if isinstance(window_size, Sequence):
        pair = tuple(window_size)
    # Integral takes NumPy's integers; SymInt is the size of a map under torch.export.
    whole = (isinstance(w, (Integral, torch.SymInt)) and not isinstance(w, bool) for w in pair)
    if len(pair) != 2 or not all(whole):
        raise TypeError(
            f"window_size must be an integer or two integers (rows, columns), got {window_size!r}"
        )
    rows, columns = (w if isinstance(w, torch.SymInt) else int(w) for w in pair)
    if rows < 1 or columns < 1:
        raise ValueError(f"window_size must be at least 1 pixel, got {window_size!r}")
    return cast("tuple[int, int]", (rows, columns))


def check_valid(name: str, valid: object, maps: Tensor) -> Tensor | None:
    """(samples, H, W) bool for maps (samples, C, H, W), contiguous on their device; or None."""
    if valid is None:
        return None
    valid = check_dense(name, check_tensor(name, valid))
    expected = (maps.shape[0], *maps.shape[2:])
    if valid.shape != expected:
        raise ValueError(
            f"{name} must have shape (samples, height, width) = {tuple(expected)} for maps of "
            f"shape {tuple(maps.shape)}, got {tuple(valid.shape)}; resample it to the maps' size"
        )
    if valid.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {valid.dtype}; use {name}.bool() or {name} > 0")
    if valid.device != maps.device:
        raise ValueError(
            f"{name} must be on the device of the maps, got {valid.device} and {maps.device}; "
            f"move it with .to(device)"
        )
    # One that was made in inference mode cannot be kept for the backward; a copy of it can.
    if not torch.compiler.is_compiling() and valid.is_inference():
        return valid.clone(memory_format=torch.contiguous_format)
    return valid.contiguous()


def check_valid_pair(valid: object, x: Tensor) -> Tensor | None:
    """(B, 2, H, W) bool for both maps of B pairs, from one mask for both, or one for each."""
    if not isinstance(valid, (tuple, list)):
        both = check_valid("valid", valid, x)
        return None if both is None else both.unsqueeze(1).repeat(1, 2, 1, 1)
    if len(valid) != 2:
        raise TypeError(
            f"valid must be one tensor for both maps, or two, one for each, got {len(valid)}"
        )
    if valid[0] is None and valid[1] is None:
        return None
    everything = x.new_ones((x.shape[0], *x.shape[2:]), dtype=torch.bool)
    each = (check_valid(f"valid[{i}]", mask, x) for i, mask in enumerate(valid))
    return torch.stack([everything if mask is None else mask for mask in each], dim=1)


def check_valid_each(valid: object, features: Tensor, keys: Tensor) -> tuple[Tensor, Tensor] | None:
    """(S, H, W) and (keys, H, W) bool for queries and keys of two sets, from one mask or two."""
    if valid is None:
        return None
    if not isinstance(valid, (tuple, list)):
        if len(keys) != len(features):
            raise ValueError(
                f"valid must be a pair of masks, one of the features and one of the keys, where "
                f"there are {len(features)} and {len(keys)} of them; None in it means every pixel"
            )
        both = check_valid("valid", valid, features)
        return None if both is None else (both, both)
    if len(valid) != 2:
        raise TypeError(
            f"valid must be one tensor, or two, of features and of keys, got {len(valid)}"
        )
    if valid[0] is None and valid[1] is None:
        return None
    queries, others = (
        maps.new_ones((maps.shape[0], *maps.shape[2:]), dtype=torch.bool) if own is None else own
        for own, maps in zip(
            (check_valid("valid[0]", valid[0], features), check_valid("valid[1]", valid[1], keys)),
            (features, keys),
            strict=True,
        )
    )
    return queries, others


def check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "none", "sum"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def check_finite_number(
    name: str, value: object, *, above: float, inclusive: bool = False
) -> float:
    """A finite real number greater than (or, if inclusive, not less than) `above`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        value = _number(name, value)
    # Comparisons only: torch.compile follows them on symbolic numbers, and NaN fails them.
    if not (above <= value < math.inf if inclusive else above < value < math.inf):
        raise ValueError(
            f"{name} must be a finite number {'>=' if inclusive else '>'} {above:g}, got {value}"
        )
    return value


def check_number(
    name: str, value: object, *, above: float, inclusive: bool = False
) -> float | Tensor:
    """As `check_finite_number`, or a tensor of one such number, which may be learnt: a scalar.

    Its value is read only where that is free; where it is not, a wrong one shows in the loss.
    """
    if not isinstance(value, Tensor):
        return check_finite_number(name, value, above=above, inclusive=inclusive)
    if value.numel() != 1 or not value.dtype.is_floating_point:
        raise TypeError(
            f"{name} must be a number or a tensor of one floating-point number, got shape "
            f"{tuple(value.shape)} of {value.dtype}"
        )
    if values_visible(value):
        check_finite_number(name, value.item(), above=above, inclusive=inclusive)
    return value.reshape(())


def _number(name: str, value: object) -> float:
    """What is no Python number but as good as one: NumPy's, and tensors of one on the CPU."""
    if isinstance(value, Tensor) and value.dim() == 0 and value.dtype != torch.bool:
        if not value.is_cpu or value.requires_grad:
            raise TypeError(
                f"{name} must be a number, got a tensor that "
                f"{'requires a gradient' if value.requires_grad else f'is on {value.device}'}; "
                f"use {name}.item()"
            )
        return float(value)
    if isinstance(value, Real) and not isinstance(value, bool):  # type: ignore[unreachable]
        return float(value)
    raise TypeError(f"{name} must be a number, got {type(value).__name__}")


# Norms are roots of sums of squares: below this, squares vanish in fp32 and norms mean nothing.
LEAST_EPS = torch.finfo(torch.float32).smallest_normal ** 0.5


def check_eps(eps: object) -> float:
    """A lower bound of norms, in the range where fp32 can tell one."""
    value = check_finite_number("eps", eps, above=0.0)
    largest = torch.finfo(torch.float32).max
    if not LEAST_EPS <= value <= largest:
        raise ValueError(
            f"eps must be a norm that fp32 can tell, from {LEAST_EPS:.3g} to {largest:.3g}, "
            f"got {value:.3g}"
        )
    return value


def check_threshold(t: object) -> float:
    value = check_finite_number("t", t, above=0.0, inclusive=True)
    if value > 1:
        raise ValueError(f"t is a fraction of the volume and must be in [0, 1], got {t}")
    return value


def check_pairs(pairs: object, samples: int, keys: int | None = None) -> Tensor:
    """A table (samples, keys) of bool or of weights >= 0; or integers (K, 2), which are indices.

    keys: None where the samples themselves are the keys.
    """
    pairs = pairs if isinstance(pairs, Tensor) else _listed_pairs(pairs)
    if not (pairs.dtype == torch.bool or pairs.dtype.is_floating_point):
        return _check_indices(pairs, samples, samples if keys is None else keys)
    _check_table("pairs", pairs, samples, keys)
    if pairs.dtype == torch.bool:
        return pairs
    if values_visible(pairs) and not bool(((pairs >= 0) & pairs.isfinite()).all()):
        raise ValueError(
            f"weights in pairs must be finite and >= 0, got values from "
            f"{pairs.min().item():g} to {pairs.max().item():g}"
        )
    return pairs


def _check_table(
    name: str, table: Tensor, samples: int, keys: int | None = None, of: str = "samples"
) -> None:
    if table.shape == (samples, samples if keys is None else keys):
        return
    if keys is None:
        expected = f"(S, S) = ({samples}, {samples}) for {samples} {of}"
    else:
        expected = f"(S, keys) = ({samples}, {keys}) for {samples} {of} and {keys} keys"
    raise ValueError(f"{name} must have shape {expected}, got {tuple(table.shape)}")


def _listed_pairs(pairs: object) -> Tensor:
    """Lists and arrays; an empty list holds no pair."""
    pairs = as_tensor("pairs", pairs)
    return pairs.new_empty((0, 2), dtype=torch.int64) if pairs.numel() == 0 else pairs


def _check_indices(pairs: Tensor, samples: int, keys: int) -> Tensor:
    """(K, 2) int64: query and key of each pair."""
    if pairs.dtype.is_complex:
        raise TypeError(f"pairs must be a table of bool or indices (K, 2), got {pairs.dtype}")
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(
            f"pairs of {pairs.dtype} are indices (K, 2) of query and key, got shape "
            f"{tuple(pairs.shape)}; use pairs.bool() for a table or pairs.float() for weights"
        )
    pairs = pairs.long()  # torch cannot compare unsigned ones
    if values_visible(pairs) and len(pairs):
        least, most = pairs.amin(dim=0).tolist(), pairs.amax(dim=0).tolist()
        if min(least) < 0 or most[0] >= samples or most[1] >= keys:
            raise ValueError(
                f"indices in pairs must be in [0, {samples}) for queries and [0, {keys}) for keys, "
                f"got {least[0]} to {most[0]} and {least[1]} to {most[1]}"
            )
    return pairs


def as_tensor(name: str, x: object, device: torch.device | None = None) -> Tensor:
    """A tensor as it is; of lists, arrays and numbers a tensor."""
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, (list, tuple, np.ndarray)):
        raise TypeError(
            f"{name} must be a torch.Tensor, a list or an array, got {type(x).__name__}"
        )
    try:
        return torch.as_tensor(x, device=device)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must hold numbers, in rows of one length; it cannot become a tensor: {error}"
        ) from None


def check_mask(name: str, mask: object, samples: int, of: str = "samples") -> Tensor:
    """A square bool matrix over the samples."""
    if not isinstance(mask, Tensor):
        mask = as_tensor(name, mask)
        # In a list 0 and 1 are common; of a tensor integers may mean something else.
        mask = mask if mask.dtype.is_floating_point else mask.bool()
    _check_table(name, mask, samples, of=of)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {mask.dtype}; use {name}.bool()")
    return mask


def check_embeddings(embeddings: object) -> Tensor:
    embeddings = check_tensor("embeddings", embeddings)
    if embeddings.dim() != 2 or embeddings.shape[1] == 0:
        raise ValueError(
            f"embeddings must have shape (samples, dimensions >= 1), got {tuple(embeddings.shape)}"
        )
    if embeddings.dtype not in FEATURE_DTYPES:
        raise TypeError(
            f"embeddings must be float16, bfloat16, float32 or float64, got {embeddings.dtype}; "
            f"convert them, for example with embeddings.float()"
        )
    return embeddings


def check_per_sample(**columns: object) -> tuple[Tensor, ...]:
    """One-dimensional tensors of one length on one device; lists and numbers become such."""
    if all(isinstance(column, Tensor) for column in columns.values()):
        tensors = cast("dict[str, Tensor]", columns)
    else:
        tensors = _columns(columns)
    shapes = {name: tuple(column.shape) for name, column in tensors.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) > 1:
        raise ValueError(f"expected one-dimensional tensors of one length, got shapes {shapes}")
    devices = {name: str(column.device) for name, column in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"expected all tensors on one device, got {devices}")
    return tuple(tensors.values())


def _columns(columns: dict[str, object]) -> dict[str, Tensor]:
    """Lists beside tensors go to the tensors' device; a number stands for every sample."""
    given = (column for column in columns.values() if isinstance(column, Tensor))
    device = next((column.device for column in given), None)
    numbers = {
        name: column
        for name, column in columns.items()
        if isinstance(column, (Integral, float)) and not isinstance(column, bool)
    }
    tensors = {
        name: as_tensor(name, column, device)
        for name, column in columns.items()
        if name not in numbers
    }
    if not tensors:
        raise ValueError(f"one of {', '.join(columns)} must have an entry for each sample")
    like = next(iter(tensors.values()))
    for name, number in numbers.items():
        plain = number if isinstance(number, float) else int(number)
        tensors[name] = torch.full(like.shape, plain, device=like.device)
    return {name: tensors[name] for name in columns}


def check_integers(name: str, x: Tensor) -> None:
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        hint = f"use {name}.long()"
        if name == "index":  # a relative position would become 0
            hint = "give each slice's number in its scan, from 0, not its relative position"
        raise TypeError(f"{name} must be an integer tensor, got {x.dtype}; {hint}")
