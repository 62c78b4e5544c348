"""Check that a model has an embedding row for every token id."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from hetero_ppo.config.checks_models import read_model_config
from hetero_ppo.config.schema import ModelConfig, RolloutConfig
from hetero_ppo.data.end_tokens import find_end_tokens


def check_embedding_rows(tokenizer: PreTrainedTokenizerBase, source: str, model: str, rows: int) -> None:
    """Check that every token of a tokenizer has an embedding row.

    Args:
        tokenizer: Tokenizer whose ids the model reads.
        source: Folder of the tokenizer.
        model: Option that names the model, and its value.
        rows: Number of the model's embedding rows, ``vocab_size``.

    Raises:
        ValueError: An id is too large.
    """
    beyond = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= rows}
    if beyond:
        token_id = max(beyond)
        raise ValueError(
            f"{model}: the model has {rows} embedding rows, and the tokenizer in {source} has {len(tokenizer)} tokens, of which "
            f"{len(beyond)} have an id beyond them, for example {beyond[token_id]!r} = {token_id}; use the tokenizer that belongs to the "
            "model, or resize the model's embeddings"
        )


def check_end_tokens(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, role: str) -> None:
    """Check that the policy can sample every token that ends a sequence.

    Args:
        model: Model of the policy.
        tokenizer: Tokenizer of the policy.
        role: Name of the policy.

    Raises:
        ValueError: A token id has no embedding row.
    """
    path = model.path
    rows = read_model_config(f"{role}.model.path", path)["vocab_size"]
    for end in find_end_tokens(tokenizer, path):
        if end.token_id >= rows:
            raise ValueError(
                f"{role}.model.path={path}: the end of a sequence {end} has no embedding row, of which the model has {rows}; correct "
                f"eos_token_id in {', '.join(end.sources)}"
            )


def check_stop_tokens(rollout: RolloutConfig, actor: ModelConfig) -> None:
    """Check that the actor can sample every token that stops a response.

    Raises:
        ValueError: A token id has no embedding row.
    """
    rows = read_model_config("actor.model.path", actor.path)["vocab_size"]
    for name, sampling in (("sampling", rollout.sampling), ("eval_sampling", rollout.eval_sampling)):
        for token_id in sampling.stop_token_ids:
            if token_id >= rows:
                raise ValueError(
                    f"rollout.{name}.stop_token_ids: {token_id} has no embedding row, of which actor.model.path={actor.path} has {rows}"
                )
