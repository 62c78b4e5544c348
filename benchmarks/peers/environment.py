"""A virtual environment for a peer, so that nothing of it reaches the environment of this project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

TRL_VERSION = "1.12.0"
PYTORCH_INDEX = "https://download.pytorch.org/whl"


def default_folder() -> Path:
    """Return the default folder of the peer's environment, in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "hetero-ppo" / f"peer-trl-{TRL_VERSION}"


def trl_requirements() -> dict[str, str]:
    """Return the version of every package. torch (with its build, such as 2.13.0+cpu) and transformers are those of this project."""
    return {"torch": version("torch"), "transformers": version("transformers"), "trl": TRL_VERSION}


def ensure_trl(folder: Path) -> Path:
    """Make the environment unless it exists with the right versions. Return its Python.

    Raises:
        ValueError: ``folder`` is the running environment, or a folder that is no virtual environment.
        RuntimeError: The installation failed; the message has pip's last lines.
    """
    folder = folder.expanduser().absolute()
    if folder.resolve() == Path(sys.prefix).resolve():
        raise ValueError(f"--peer-venv {folder} is the environment of this project: name another folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise ValueError(f"--peer-venv {folder} is no virtual environment and not empty: name another folder")
    python = folder / "bin" / "python"
    requirements = trl_requirements()
    if python.exists() and installed_versions(python, list(requirements)) == requirements:
        return python
    print(f"installing {', '.join(f'{name} {v}' for name, v in requirements.items())} into {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install(python, [f"{name}=={v}" for name, v in requirements.items()])
    found = installed_versions(python, list(requirements))
    if found != requirements:
        raise RuntimeError(
            f"the peer's environment {folder} holds {found}, expected {requirements}: remove it and try again"
        )
    return python


def install(python: Path, requirements: list[str]) -> None:
    """Install packages with pip: first from the configured indexes, then also from PyTorch's index of the build (cpu, cu130, ...)."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    first = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if first.returncode == 0:
        return
    build = version("torch").partition("+")[2]
    if not build:
        raise RuntimeError(f"pip could not install the peer ({' '.join(command)}):\n{tail(first.stdout)}")
    index = f"{PYTORCH_INDEX}/{build}"
    second = subprocess.run(
        [*command, "--extra-index-url", index],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if second.returncode != 0:
        raise RuntimeError(
            f"pip could not install the peer, neither from the configured indexes:\n{tail(first.stdout)}\n"
            f"nor with {index}:\n{tail(second.stdout)}"
        )


def installed_versions(python: Path, packages: list[str]) -> dict[str, str]:
    """Return the versions of those packages that the environment of ``python`` has."""
    code = (
        "import json, sys\n"
        "from importlib.metadata import distributions\n"
        "found = {d.metadata['Name'].lower(): d.version for d in distributions()}\n"
        "print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))\n"
    )
    result = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.splitlines()[-lines:])
