"""So that `import salkernels.wla_loss` gives the function, as `from salkernels import wla_loss`."""

import sys

from .functional import wla_loss

# What stands here when the import ends is what it gives. Tools that look a module up need the spec.
wla_loss.__spec__ = __spec__  # type: ignore[attr-defined]
wla_loss.wla_loss = wla_loss  # type: ignore[attr-defined]
sys.modules[__name__] = wla_loss  # type: ignore[assignment]
