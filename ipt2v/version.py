"""What code this is: for provenance, and to notice code that changes between submission and start. stdlib only."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path

COMPUTING_PACKAGES = ("torch", "diffusers", "transformers", "xfuser", "numpy", "h5py", "av")


@cache  # the code that this process started with, whatever becomes of the files
def code_version() -> str:
    """Version of the distribution and a digest of this package's source, installed or not: "0.1.0+1a2b3c4d"."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(file for kind in ("*.py", "*.txt") for file in root.rglob(kind)):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return f"{metadata.version('ipt2v')}+{digest.hexdigest()[:8]}"


@cache
def package_versions() -> dict[str, str]:
    """Versions of the packages that compute."""
    return {name: metadata.version(name) for name in COMPUTING_PACKAGES}
