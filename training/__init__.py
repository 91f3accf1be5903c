"""Pre-training and fine-tuning with SAL: from NIfTI scans to encoders, models and Dice scores."""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

_NEEDED = (
    "nibabel",
    "monai",
    "jsonargparse",
    "safetensors",
    "tensorboard",
    "matplotlib",
    "tqdm",
    "scipy",
)
_missing = [name for name in _NEEDED if _find_spec(name) is None]
if _missing:
    raise ImportError(
        f"salkernels.training needs {', '.join(_missing)}, which the core package does not "
        f"install: pip install -e '.[training]' in the clone"
    )

# Loaded when they are used: the command line needs few of them at a time.
_API = {
    "FinetuneConfig": "config",
    "PretrainConfig": "config",
    "ProbeConfig": "config",
    "finetune": "finetune",
    "load_encoder": "models",
    "load_unet": "models",
    "predict": "predict",
    "prepare": "preparing",
    "pretrain": "pretrain",
    "to_bundle": "bundle",
    "to_monai": "export",
    "to_smp": "export",
    "to_torch": "export",
}

if _TYPE_CHECKING:
    # Type checkers do not know of modules that can be called.
    from .bundle import to_bundle
    from .config import FinetuneConfig, PretrainConfig, ProbeConfig
    from .export import to_monai, to_smp, to_torch
    from .finetune import finetune
    from .models import load_encoder, load_unet
    from .predict import predict
    from .preparing import prepare
    from .pretrain import pretrain

__all__ = [
    "FinetuneConfig",
    "PretrainConfig",
    "ProbeConfig",
    "finetune",
    "load_encoder",
    "load_unet",
    "predict",
    "prepare",
    "pretrain",
    "to_bundle",
    "to_monai",
    "to_smp",
    "to_torch",
]


def __getattr__(name: str) -> _Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _import_module(f".{_API[name]}", __name__)
    return module if name == _API[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
