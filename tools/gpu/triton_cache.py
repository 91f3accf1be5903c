"""Triton's cache on another machine: made to hold there, and compared where it does not.

    python -m tools.gpu.triton_cache settle FOLDER   # after it was unpacked or moved
    python -m tools.gpu.triton_cache facts           # what its keys depend on, as JSON

Triton finds a kernel by a hash of its source, of the options, and of Triton itself; but what it
finds there is a list of absolute paths, and where one of them does not exist it compiles again,
silently.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GROUP = "__grp__"  # prefix of the files that list a kernel's paths
NAMES = ("TRITON", "PTXAS", "CUDA", "NVPTX", "DISABLE_PTXAS", "LLVM_", "USE_IR_LOC")
PACKED = Path(__file__).resolve().parents[2] / ".gpu" / "triton.json"
# Facts on which the cache's keys depend; the others only say where things are.
KEY_FACTS = ("triton", "triton_key", "libtriton_bytes", "ptxas_version", "python", "key_variables")


def settle(folder: Path) -> int:
    """Rewrites the paths of a cache to where it lies now; the number of kernels."""
    groups = list(folder.glob(f"*/{GROUP}*.json"))
    for path in groups:
        listed = json.loads(path.read_text())
        moved = {name: str(path.parent.resolve() / name) for name in listed["child_paths"]}
        if moved != listed["child_paths"]:
            draft = path.with_name(f"settling-{os.getpid()}-{path.name}")
            draft.write_text(json.dumps(listed | {"child_paths": moved}))
            draft.replace(path)  # a kernel that is being looked for is found, before or after
    return len(groups)


def folder_in_use() -> Path:
    """Where Triton keeps its kernels in this process."""
    home = Path(os.environ.get("TRITON_HOME", Path.home()))
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def entries(folder: Path) -> int:
    return sum(1 for _ in folder.glob(f"*/{GROUP}*.json"))


def facts() -> dict[str, Any]:
    """What the keys of Triton's cache depend on, and where its parts are."""
    found: dict[str, Any] = {
        "python": "{}.{}".format(*sys.version_info),
        "folder": str(folder_in_use()),
        "entries": entries(folder_in_use()),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(NAMES)},
    }
    try:
        found |= _of_triton()
    except Exception as error:  # another Triton than we know: that is the fact
        found["triton_error"] = f"{type(error).__name__}: {error}"
    return found


def _of_triton() -> dict[str, Any]:
    import triton
    from triton._C import libtriton
    from triton.backends.nvidia import compiler
    from triton.runtime import cache

    library = Path(libtriton.__file__)
    invalidating = getattr(libtriton, "get_cache_invalidating_env_vars", dict)
    return {
        "triton": triton.__version__,
        "triton_key": hashlib.sha256(cache.triton_key().encode()).hexdigest()[:16],
        "libtriton": str(library),
        "libtriton_bytes": library.stat().st_size,
        "ptxas": str(compiler.get_ptxas(90).path),
        "ptxas_version": str(compiler.get_ptxas_version(90)).strip().splitlines()[-1],
        "key_variables": dict(invalidating()),
    }


def differences(packed: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Why kernels of a pack are not found here: `name: that of the pack, then that of here`."""
    return [
        f"{name}: {packed.get(name)} packed, {here.get(name)} here"
        for name in KEY_FACTS
        if packed.get(name) != here.get(name)
    ]


def compared(here: Mapping[str, Any], path: Path = PACKED) -> str | None:
    """One line on the pack's kernels; None where there is no pack."""
    if not path.exists():
        return None
    found = differences(json.loads(path.read_text("utf-8")), here)
    if not found:
        return f"the pack's kernels hold here; {here['entries']} in {here['folder']}"
    return f"the pack's kernels do not hold here: {'; '.join(found)}"


def main(words: list[str] | None = None) -> int:
    given = sys.argv[1:] if words is None else words
    if len(given) == 2 and given[0] == "settle":
        print(f"{settle(Path(given[1]))} Triton kernels in {given[1]}")
        return 0
    if given == ["facts"]:
        print(json.dumps(facts(), indent=1))
        return 0
    print(f"expected `settle FOLDER` or `facts`, got {' '.join(given)!r}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
