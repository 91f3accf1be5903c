"""Pre-training methods, one file each, registered by name."""

from .base import Corpus, Method, Outcome, Views, first, second, side_by_side
from .ccrop import CCrop, CCropConfig
from .contrast import ContrastConfig
from .gcl import GCL, GCLConfig
from .pcl import PCL, PCLConfig
from .pirl import PIRL, PIRLConfig
from .random import Random
from .rotation import Rotation
from .sal import SAL, SALConfig
from .simclr import SimCLR

# In the order of the tables. The field of a method's name in PretrainConfig is its settings.
METHODS: dict[str, type[Method]] = {
    "random": Random,
    "rotation": Rotation,
    "pirl": PIRL,
    "simclr": SimCLR,
    "gcl": GCL,
    "pcl": PCL,
    "ccrop": CCrop,
    "sal": SAL,
}

__all__ = [
    "METHODS",
    "SAL",
    "CCropConfig",
    "ContrastConfig",
    "Corpus",
    "GCLConfig",
    "Method",
    "Outcome",
    "PCLConfig",
    "PIRLConfig",
    "SALConfig",
    "Views",
    "first",
    "second",
    "side_by_side",
]
