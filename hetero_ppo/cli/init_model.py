"""``hetero-ppo init-model``: a randomly initialised Hugging Face checkpoint, for training from scratch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_ppo.cli.arguments import add_out_argument, clear_out
from hetero_ppo.disk import writing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

#: ``model_type`` of transformers.
FAMILIES = ("llama", "qwen2", "qwen3")

#: The number of rows of the embedding is a multiple of it: whole tiles for the matmul, and divisible by the usual TP sizes.
VOCAB_MULTIPLE = 64


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("init-model", help="write a randomly initialised checkpoint to train from scratch")
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--hidden-size", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--heads", type=int, required=True, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=None, help="key and value heads (default: --heads)")
    parser.add_argument("--head-dim", type=int, default=None, help="default: hidden size / heads")
    parser.add_argument("--ffn", type=int, required=True, help="width of the gated MLP")
    parser.add_argument("--max-positions", type=int, default=2048, help="longest sequence in tokens (%(default)s)")
    parser.add_argument("--rope-theta", type=float, default=10_000.0, help="RoPE base (%(default)s)")
    parser.add_argument("--init-std", type=float, default=0.02, help="standard deviation of the weights (%(default)s)")
    parser.add_argument("--tie", action="store_true", help="one matrix for input and output embeddings")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder; copied into the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    add_out_argument(parser, "model")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write config.json, model.safetensors (fp32) and the tokenizer's files to ``args.out``.

    Raises:
        ValueError: Sizes do not fit each other, or there is a model already.
    """
    check_sizes(args)
    # Files of a larger model would stay next to the new one, and its index would be read.
    clear_out(args.out, ["config.json", "*.safetensors", "*.safetensors.index.json"], overwrite=args.overwrite)
    # transformers takes seconds to import; `hetero-ppo --help` should not.
    import torch
    from transformers import AutoModelForCausalLM

    from hetero_ppo.data.chat_template import load_tokenizer
    from megatron_bridge.weights.hf_checkpoint import set_default_rights, system_errors

    tokenizer = load_tokenizer(str(args.tokenizer), "--tokenizer")
    config = model_config(args, tokenizer)
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with writing(Path(args.out), "model", 4 * model.num_parameters(), "choose another --out"), system_errors():
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    for path in Path(args.out).glob("*.safetensors"):
        set_default_rights(path)
    print(
        f"{args.out}: {args.family}, {model.num_parameters():,} parameters, {config.vocab_size} embedding rows for "
        f"{len(tokenizer)} tokens, seed {args.seed}"
    )


def check_sizes(args: argparse.Namespace) -> None:
    """Check that the sizes of the model fit each other.

    Raises:
        ValueError: They do not; the message names the option.
    """
    kv_heads = args.kv_heads or args.heads
    if args.heads % kv_heads:
        raise ValueError(f"--kv-heads: {kv_heads} does not divide --heads {args.heads}; give a divisor")
    if args.head_dim is None and args.hidden_size % args.heads:
        raise ValueError(
            f"--heads: {args.heads} does not divide --hidden-size {args.hidden_size}; give a divisor, or --head-dim"
        )
    head_dim = args.head_dim or args.hidden_size // args.heads
    if args.family == "qwen2" and head_dim * args.heads != args.hidden_size:
        raise ValueError(
            f"--head-dim: {head_dim} times --heads {args.heads} is not --hidden-size {args.hidden_size}; Qwen2 has no "
            "other head size, leave --head-dim out"
        )
    if head_dim % 2:
        raise ValueError(
            f"--head-dim: {head_dim} is odd; rotary embeddings turn pairs of channels, give an even number"
        )


def model_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Return the model's configuration, with the tokenizer's special tokens and its size rounded up to ``VOCAB_MULTIPLE``."""
    import transformers

    # Qwen2's configuration has no head size of its own: check_sizes has made sure that the quotient is meant.
    head_dim = {} if args.family == "qwen2" else {"head_dim": args.head_dim or args.hidden_size // args.heads}
    return transformers.AutoConfig.for_model(
        args.family,
        vocab_size=-(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        max_position_embeddings=args.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        initializer_range=args.init_std,
        tie_word_embeddings=args.tie,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **head_dim,
    )
