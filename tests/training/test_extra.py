"""What a core install without the training extra says."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys


def test_missing_packages_are_named_with_the_command_that_installs_them():
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('monai', 'tqdm') else real(name, *a)\n"
        "import salkernels\n"
        "import salkernels.training"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "salkernels.training needs monai, tqdm" in last
    assert "pip install -e '.[training]'" in last


def test_every_needed_package_is_in_the_extra():
    import salkernels.training as training

    requirements = importlib.metadata.requires("salkernels") or []
    extra = {r.split(">")[0].split("[")[0] for r in requirements if 'extra == "training"' in r}
    assert set(training._NEEDED) == extra
