"""A Hugging Face folder may name its own files, and those of the Hugging Face cache that it is a snapshot of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hetero_ppo.config.checks_models import check_model_folder
from hetero_ppo.config.schema import ModelConfig
from hetero_ppo.data.chat_template import load_tokenizer
from megatron_bridge.weights.hf_checkpoint import INDEX_FILE, SINGLE_FILE, check_links, tensor_names

NAMES = {"a", "b"}


def write_sharded(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in NAMES:
        save_file({name: torch.ones(2)}, folder / f"{name}.safetensors")
    write_index(folder, {name: f"{name}.safetensors" for name in NAMES})


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def cached(root: Path, source: Path) -> Path:
    """Copy ``source`` to a snapshot of a Hugging Face cache."""
    snapshot, blobs = root / "models--org--name" / "snapshots" / "0a1b2c", root / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        (blobs / f"{number:064x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    return snapshot


def test_a_snapshot_of_the_hugging_face_cache_is_read(tmp_path: Path) -> None:
    write_sharded(tmp_path / "source")
    snapshot = cached(tmp_path / "hub", tmp_path / "source")
    assert tensor_names(snapshot) == NAMES
    (tmp_path / "link").symlink_to(snapshot)
    assert tensor_names(tmp_path / "link") == NAMES
    local = tmp_path / "local"  # as `huggingface-cli download --local-dir` wrote once
    local.mkdir()
    for file in snapshot.iterdir():
        (local / file.name).symlink_to(file.resolve())
    assert tensor_names(local) == NAMES


def test_links_inside_the_folder_are_read(tmp_path: Path) -> None:
    write_sharded(tmp_path / "model")
    (tmp_path / "model" / "parts").mkdir()
    (tmp_path / "model" / "a.safetensors").rename(tmp_path / "model" / "parts" / "1")
    (tmp_path / "model" / "a.safetensors").symlink_to("parts/1")
    assert tensor_names(tmp_path / "model") == NAMES
    write_index(tmp_path / "model", {"a": "parts/1", "b": "b.safetensors"})
    assert tensor_names(tmp_path / "model") == NAMES


@pytest.mark.parametrize("is_absolute", [True, False])
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path, is_absolute: bool) -> None:
    write_sharded(tmp_path / "model")
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    file = str(tmp_path / "secret.safetensors") if is_absolute else "x/../../secret.safetensors"
    write_index(tmp_path / "model", {"a": file, "b": "b.safetensors"})
    refusal = r"index.json: lists '.*secret.safetensors', which is not in the checkpoint folder"
    with pytest.raises(ValueError, match=refusal):
        tensor_names(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"actor.model.path=.*{refusal}"):  # before a run
        check_model_folder("actor", ModelConfig(path=str(tmp_path / "model")))


@pytest.mark.parametrize("name", [SINGLE_FILE, "tokenizer.json", "parts"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_sharded(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "elsewhere" / "a.safetensors")
    (tmp_path / "model" / name).symlink_to(tmp_path / "elsewhere" / ("" if name == "parts" else "a.safetensors"))
    write_index(
        tmp_path / "model", {"a": "parts/a.safetensors" if name == "parts" else "a.safetensors", "b": "b.safetensors"}
    )
    with pytest.raises(ValueError, match=r"model/.* is a link to .*elsewhere.*, out of the checkpoint folder"):
        tensor_names(tmp_path / "model")
    if name == "tokenizer.json":
        with pytest.raises(ValueError, match=r"actor.model.path=.*cannot be loaded: .*tokenizer.json is a link to"):
            load_tokenizer(str(tmp_path / "model"), "actor.model.path")
    elif name == SINGLE_FILE:
        with pytest.raises(ValueError, match="is a link"):
            check_links(tmp_path / "model")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'])
def test_what_is_no_index_is_refused(tmp_path: Path, text: str) -> None:
    write_sharded(tmp_path / "model")
    (tmp_path / "model" / INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"index.json: no index of safetensors files"):
        tensor_names(tmp_path / "model")
