"""Pre-training methods, one file each, registered by name."""

from .base import Method, Outcome, Views
from .sal import SAL, SALConfig

METHODS: dict[str, type[Method]] = {"sal": SAL}

__all__ = ["METHODS", "SAL", "Method", "Outcome", "SALConfig", "Views"]
