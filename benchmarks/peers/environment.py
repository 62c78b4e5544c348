"""A virtual environment of its own for a peer, so that nothing of it reaches the environment of this project."""

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
    """Where the peer is installed unless told otherwise: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "hetero-ppo" / f"peer-trl-{TRL_VERSION}"


def trl_requirements() -> dict[str, str]:
    """Package -> version. torch (its build too, such as 2.13.0+cpu) and transformers are those that this project runs on."""
    return {"torch": version("torch"), "transformers": version("transformers"), "trl": TRL_VERSION}


def ensure_trl(folder: Path) -> Path:
    """Make the environment unless it is there with the right versions; return its Python.

    Raises ValueError when ``folder`` is the running environment, or is a folder that is no virtual environment; RuntimeError
    with pip's last lines when the installation fails.
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
    """pip install, first from the configured indexes, then with PyTorch's index of the build (cpu, cu130, ...) as well."""
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
    """Package -> version in the environment of ``python``; packages that are missing are left out."""
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
