"""Version of the code that writes a checkpoint."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path


def code_version() -> str:
    """Return the version of the package; in a git checkout also the commit, with ``+changes`` if files differ from it."""
    number = version("hetero-ppo")
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return number
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+changes"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of another user
        return number
    return f"{number} {found.stdout.strip()}"
