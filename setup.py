"""What pyproject.toml cannot say: the compiled libraries. See buildtools/salkernels_build.py."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "buildtools"))
import salkernels_build

setup(**salkernels_build.setup_arguments())
