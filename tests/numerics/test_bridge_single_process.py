"""Against transformers in one process: logits of every family and rope type, export, heads, and broken checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.helpers.bridge_models import (
    CASES,
    VOCAB,
    hf_model,
    pipeline_forward,
    read_tensors,
    same_tensors,
    save_case,
    token_ids,
)
from safetensors.torch import save_file

from hetero_ppo.config.schema import ParallelConfig
from hetero_ppo.distributed.groups import role_groups
from megatron_bridge.model.config_mapping import BridgeConfig, bridge_config, read_hf_config
from megatron_bridge.model.layers import ShortSequenceSelfAttention
from megatron_bridge.model_provider import build_model
from megatron_bridge.weights.export_hf import save_hf
from megatron_bridge.weights.import_hf import LoadReport, load_hf


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Groups of one process."""
    torch.set_num_threads(1)
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield role_groups("actor", ParallelConfig())
    dist.destroy_process_group()


def _load(
    path: Path,
    groups: Any,
    head: str = "lm",
    vocab_multiple: int = 1,
    init_seed: int = 1234,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Any], BridgeConfig, LoadReport]:
    bridge = bridge_config(read_hf_config(path), dtype=dtype, vocab_multiple=vocab_multiple)
    chunks = build_model(bridge, groups, head=head, init_seed=init_seed)
    return chunks, bridge, load_hf(chunks, bridge, path, groups, head=head)


def _outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("case", CASES)
def test_logits_and_round_trip(case: str, groups: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save_case(case, tmp_path / "source")
    chunks, bridge, report = _load(source, groups, vocab_multiple=64)
    assert bridge.padded_vocab_size == 192
    assert report == LoadReport(loaded=len(read_tensors(source)), initialised=[])
    logits = pipeline_forward(chunks, token_ids(), groups, bridge.transformer.hidden_size)
    expected = _outputs(hf_model(case))
    assert expected.abs().max() > 1  # logits worth comparing
    assert (logits[..., :VOCAB] - expected).abs().max() <= 2e-5
    assert (logits[..., VOCAB:] == 0).all()
    save_hf(chunks, bridge, groups, tmp_path / "out", source_dir=source)
    assert same_tensors(read_tensors(source), read_tensors(tmp_path / "out"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(_outputs(again), expected)


@pytest.mark.parametrize("case", ["llama_linear", "qwen2_untied_yarn", "qwen3_tied"])
def test_bf16_attention_of_short_sequences(
    case: str, groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are as near to those of float32 arithmetic on the same bf16 weights as with the other attention (10 % for the draw)."""
    source = save_case(case, tmp_path / "source")
    chunks, bridge, _ = _load(source, groups, dtype=torch.bfloat16)
    truth = _outputs(hf_model(case).bfloat16().float())
    errors = []
    for limit in (ShortSequenceSelfAttention.MAX_SEQUENCE, 0):
        monkeypatch.setattr(ShortSequenceSelfAttention, "MAX_SEQUENCE", limit)
        logits = pipeline_forward(chunks, token_ids(), groups, bridge.transformer.hidden_size)
        errors.append(float((logits[..., :VOCAB].float() - truth).norm() / truth.norm()))
    assert errors[0] != errors[1]
    assert errors[0] < min(1.1 * errors[1], 0.05)


def test_rope_settings_change_the_logits(groups: Any, tmp_path: Path) -> None:
    """The comparison above would not see a rope type that is ignored if the type made no difference."""
    for case in ("llama_tied_llama3", "llama_linear", "qwen2_untied_yarn", "qwen3_untied_yarn"):
        plain = {"rope_type": "default", "rope_theta": CASES[case][1]["rope_parameters"]["rope_theta"]}
        difference = _outputs(hf_model(case)) - _outputs(hf_model(case, rope_parameters=plain))
        assert difference.abs().max() > 1e-2, case


@pytest.mark.parametrize("case", ["llama_untied", "qwen2_tied", "qwen3_tied"])
def test_scalar_head_from_a_language_model(case: str, groups: Any, tmp_path: Path) -> None:
    """The head stays as initialised, is reported, and comes out as a sequence classifier."""
    from transformers import AutoModelForSequenceClassification

    source = save_case(case, tmp_path / "source")
    chunks, bridge, report = _load(source, groups, head="score")
    assert report.initialised == ["score.weight"]
    assert report.loaded == len(read_tensors(source).keys() - {"lm_head.weight"})
    fresh = build_model(bridge, groups, head="score", init_seed=1234)
    assert torch.equal(chunks[0].output_layer.weight, fresh[0].output_layer.weight)
    zero = build_model(bridge, groups, head="score", init_seed=1234, head_init="zero")
    assert chunks[0].output_layer.weight.all() and not zero[0].output_layer.weight.any()
    save_hf(chunks, bridge, groups, tmp_path / "out", source_dir=source, head="score")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        bridge.family.sequence_classifier
    ]
    scores = pipeline_forward(chunks, token_ids(), groups, bridge.transformer.hidden_size)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.num_labels == 1
    assert (scores[:, -1] - _outputs(model.eval())).abs().max() <= 2e-5
    _, _, again = _load(tmp_path / "out", groups, head="value")
    assert again.initialised == []


def test_export_files_dtype_and_replacement(groups: Any, tmp_path: Path) -> None:
    source = save_case("llama_untied", tmp_path / "source")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (source / name).write_text(name)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("other")
    (tmp_path / "tokenizer" / "additional_chat_templates").mkdir()
    (tmp_path / "tokenizer" / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    chunks, bridge, _ = _load(source, groups)
    out = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()  # left by a run that was killed
    save_hf(chunks, bridge, groups, out, source_dir=source)
    assert (out / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert {file.name for file in source.iterdir()} == {file.name for file in out.iterdir()}
    save_hf(
        chunks,
        bridge,
        groups,
        out,
        source_dir=source,
        tokenizer_dir=tmp_path / "tokenizer",
        dtype=torch.bfloat16,
        max_shard_bytes=20_000,
        files={"generation_config.json": "{}"},
        config_changes={"pad_token_id": 3},
    )
    assert (out / "tokenizer.json").read_text() == "other"
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    assert (out / "generation_config.json").read_text() == "{}"
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == 3
    assert not (out / "chat_template.jinja").exists() and not (out / "model.safetensors").exists()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    expected = {name: tensor.bfloat16() for name, tensor in read_tensors(source).items()}
    assert same_tensors(expected, read_tensors(out))
    sizes = [file.stat().st_size for file in out.glob("model-*-of-*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 20_000 + 4_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "tokenizer"]


def test_tied_checkpoint_that_holds_the_head_too(groups: Any, tmp_path: Path) -> None:
    source = save_case("qwen3_tied", tmp_path / "source")
    tensors = read_tensors(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    chunks, bridge, _ = _load(source, groups)
    save_hf(chunks, bridge, groups, tmp_path / "out", source_dir=source)
    assert same_tensors(tensors, read_tensors(tmp_path / "out"))
    tensors["lm_head.weight"][VOCAB - 1, 0] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: lm_head\.weight differs .* tie_word_embeddings"):
        _load(source, groups)


def test_rotary_buffers_of_old_files_are_ignored(groups: Any, tmp_path: Path) -> None:
    source = save_case("llama_untied", tmp_path / "source")
    tensors = read_tensors(source)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(4)}
    save_file({**tensors, **buffers}, source / "model.safetensors", metadata={"format": "pt"})
    assert _load(source, groups)[2].loaded == len(tensors)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.2.mlp.up_proj.weight"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(48)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(47)


def _quantise(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


def _score(tensors: dict[str, torch.Tensor]) -> None:
    tensors["score.weight"] = torch.zeros(1, 48)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"model\.safetensors: model\.layers\.2\.mlp\.up_proj\.weight is missing"),
        (_add, r"model\.safetensors: model\.layers\.1\.self_attn\.q_proj\.bias is unknown; a LlamaForCausalLM"),
        (_reshape, r"model\.safetensors: model\.norm\.weight has shape \[47\], the config asks for \[48\]"),
        (_quantise, r"model\.safetensors: lm_head\.weight has dtype I8"),
        (_score, r"score\.weight is unknown"),
    ],
)
def test_broken_tensors(damage: Any, message: str, groups: Any, tmp_path: Path) -> None:
    source = save_case("llama_untied", tmp_path / "source")
    tensors = read_tensors(source)
    damage(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        _load(source, groups)


def test_classifier_without_its_head_is_an_error(groups: Any, tmp_path: Path) -> None:
    source = save_case("qwen3_tied", tmp_path / "source", head="score")
    tensors = read_tensors(source)
    del tensors["score.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"score\.weight is missing"):
        _load(source, groups, head="score")


def test_broken_files(groups: Any, tmp_path: Path) -> None:
    source = save_case("llama_untied", tmp_path / "source", max_shard_size="60KB")
    shards = sorted(source.glob("model-*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{shards[1].name}: not a readable safetensors file"):
        _load(source, groups)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"index.json: lists {shards[1].name}, but there is no such file"):
        _load(source, groups)
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        _load(source, groups)


def test_layout_of_bridge_and_model_must_agree(groups: Any, tmp_path: Path) -> None:
    source = save_case("llama_untied", tmp_path / "source")
    chunks, _, _ = _load(source, groups)
    other = bridge_config(read_hf_config(source), dtype=torch.float32, tensor=2)
    with pytest.raises(ValueError, match="tensor parallelism is 2 in the bridge config but 1"):
        load_hf(chunks, other, source, groups)


def test_failed_export_leaves_the_old_one(groups: Any, tmp_path: Path) -> None:
    source = save_case("llama_untied", tmp_path / "source")
    chunks, bridge, _ = _load(source, groups)
    save_hf(chunks, bridge, groups, tmp_path / "out", source_dir=source)
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        save_hf(chunks, bridge, groups, tmp_path / "out", source_dir=tmp_path / "elsewhere")
    assert same_tensors(read_tensors(source), read_tensors(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
