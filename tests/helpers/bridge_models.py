"""Tiny random Hugging Face models of every supported kind, and the Megatron side of a comparison with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

VOCAB = 131  # odd: two tensor-parallel ranks need a padding row
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 6.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

EXPERTS = {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}

#: name -> (model_type, config fields)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_untied": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}}),
    "llama_tied_llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
    "qwen2_untied_yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 20}),
    "qwen3_moe_untied": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe_tied": ("qwen3_moe", {**EXPERTS, "tie_word_embeddings": True}),
    "qwen3_untied_yarn": ("qwen3", {"head_dim": 16, "rope_parameters": dict(YARN, attention_factor=1.3, beta_fast=16)}),
}


def hf_model(case: str, head: str = "lm", **overrides: Any) -> torch.nn.Module:
    """Make a random model in fp32. Biases and norm weights are random too, so that a missing tensor is noticed."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    model_type, fields = CASES[case]
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields, **overrides})
    torch.manual_seed(7)
    if head == "lm":
        model = AutoModelForCausalLM.from_config(config)
    else:
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model.eval()


def save_case(case: str, folder: Path, head: str = "lm", **save_options: Any) -> Path:
    """Save a case's model with transformers. Returns the folder."""
    hf_model(case, head).save_pretrained(folder, **save_options)
    return folder


def token_ids(batch: int = 2, length: int = 96) -> Tensor:
    """Return [batch, length] int64 token ids without the padding token."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint folder."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            names: list[str] = handle.keys()
            tensors |= {name: handle.get_tensor(name) for name in names}
    return tensors


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Return True when names, shapes, dtypes and bits are equal."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def pipeline_forward(chunks: list[Any], tokens: Tensor, groups: Any, hidden_size: int) -> Tensor:
    """Run all stages in turn. Returns the last chunk's output [b, s, columns of this rank] on each."""
    b, s = tokens.shape
    positions = torch.arange(s).expand(b, s)
    pp_rank, pp_size = groups.pp.rank(), groups.pp.size()
    local_s = s // groups.tp.size() if chunks[0].config.sequence_parallel else s  # between stages
    hidden = torch.empty(local_s, b, hidden_size)
    for stage in range(pp_size * len(chunks)):
        owner, last = stage % pp_size, stage == pp_size * len(chunks) - 1
        columns = torch.empty(1, dtype=torch.int64)
        if owner == pp_rank:
            chunk = chunks[stage // pp_size].eval()
            if stage > 0:
                chunk.set_input_tensor(hidden)
            with torch.no_grad():
                hidden = chunk(tokens, positions, None).contiguous()
            columns[0] = hidden.shape[-1]
        if pp_size > 1:
            source = dist.get_global_rank(groups.pp, owner)
            dist.broadcast(columns, src=source, group=groups.pp)
            if owner != pp_rank:
                hidden = torch.empty((b, s, int(columns)) if last else (local_s, b, int(columns)))
            dist.broadcast(hidden, src=source, group=groups.pp)
    return hidden
