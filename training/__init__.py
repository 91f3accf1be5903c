"""Pre-training and fine-tuning with SAL: from NIfTI scans to encoders, models and Dice scores."""

from importlib.util import find_spec as _find_spec

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
        f"install: pip install 'salkernels[training]'"
    )
