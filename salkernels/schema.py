"""The operators that torch knows, each signature written once.

`match` and `match_backward` are what every loss is made of, with `window_lse` and its backward for
the negatives of `wla_contrast`: they dispatch by the name of a backend, and `salkernels.library`
and `salkernels.library_contrast` give them their rules. `native_match` and its like are the same in
C++, chosen by the device of the features: csrc/register_cpu.cpp and csrc/register_cpu_lse.cpp
implement them for CPUs, csrc/register_cuda.cpp those of the matches for GPUs. `native_mean_match`
and its backward, for GPUs, take maps (S, C, H, W) as they come, and end in the mean of the losses:
see `salkernels._short`.
"""

from __future__ import annotations

import torch

# pairs: numbers of the pairs in (G, N, M), row-major; see `salkernels.reference`.
_MATCH = (
    "(Tensor query, Tensor? key, Tensor? pairs, Tensor? valid, {ints} window, float eps, {how})"
    " -> (Tensor loss, Tensor max_sim, Tensor argmax, Tensor norm)"
)
_MATCH_BACKWARD = (
    "(Tensor grad_sim, Tensor query, Tensor? key, Tensor? pairs, Tensor? valid, Tensor max_sim,"
    " Tensor argmax, Tensor norm, {ints} window, float eps, {how})"
    " -> (Tensor grad_query, {key_gradient})"
)
# Here pairs are those of each query and its negatives.
_WINDOW_LSE = (
    "(Tensor query, Tensor? key, Tensor? pairs, Tensor? valid, {ints} window, float temperature,"
    " float eps, {how}) -> Tensor lse"
)
_WINDOW_LSE_BACKWARD = (
    "(Tensor grad_lse, Tensor query, Tensor? key, Tensor? pairs, Tensor? valid, Tensor lse,"
    " {ints} window, float temperature, float eps, {how})"
    " -> (Tensor grad_query, {key_gradient})"
)
_FORMS = {
    "": {"ints": "SymInt[2]", "how": "str backend", "key_gradient": "Tensor grad_key"},
    "native_": {
        "ints": "int[2]",
        "how": "bool allow_tf32",
        "key_gradient": "Tensor? grad_key",
    },
}
NATIVE = {
    "native_match": _MATCH.format(**_FORMS["native_"]),
    "native_match_backward": _MATCH_BACKWARD.format(**_FORMS["native_"]),
    "native_mean_match": (
        "(Tensor x, Tensor? y, Tensor? pairs, int groups, int[2] window, float eps,"
        " bool allow_tf32) -> (Tensor mean, Tensor max_sim, Tensor argmax, Tensor norm)"
    ),
    "native_mean_match_backward": (
        "(Tensor grad, Tensor x, Tensor? y, Tensor? pairs, int groups, Tensor max_sim,"
        " Tensor argmax, Tensor norm, int[2] window, float eps, bool allow_tf32)"
        " -> (Tensor grad_x, Tensor? grad_y)"
    ),
    "native_window_lse": _WINDOW_LSE.format(**_FORMS["native_"]),
    "native_window_lse_backward": _WINDOW_LSE_BACKWARD.format(**_FORMS["native_"]),
}


def define(library: torch.library.Library, schemas: dict[str, str]) -> None:
    """Adds operators to a library, as ones that `torch.compile` may keep whole."""
    for name, schema in schemas.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))


# A process defines an operator once. importlib.reload, and notebooks that call it, keep what is
# there; a package that was taken out of sys.modules and imported again finds the old operators.
FIRST = not hasattr(torch.ops.salkernels, "match")
if FIRST:
    LIBRARY = torch.library.Library("salkernels", "DEF")
    define(
        LIBRARY,
        {
            "match": _MATCH.format(**_FORMS[""]),
            "match_backward": _MATCH_BACKWARD.format(**_FORMS[""]),
            "window_lse": _WINDOW_LSE.format(**_FORMS[""]),
            "window_lse_backward": _WINDOW_LSE_BACKWARD.format(**_FORMS[""]),
            **NATIVE,
        },
    )
