"""Tokenizers and chat templates: from text and messages to token ids."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hetero_ppo.config.checks_models import read_model_config
from hetero_ppo.config.derived import config_reward_models, config_roles
from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.schema import DataConfig, ModelConfig, PpoConfig, RewardRoleConfig
from hetero_ppo.data.continuation import adds_prefix, encode_continuation
from hetero_ppo.data.end_tokens import EndToken, find_end_tokens
from hetero_ppo.data.reading import Message
from hetero_ppo.data.tokenizer_checks import check_embedding_rows, check_end_tokens, check_stop_tokens
from megatron_bridge.weights.hf_checkpoint import check_links

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and the template that a run uses with it."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None  # Jinja source; None: prompts and answers are tokenised as plain text
    prefix_ids: list[int]  # ids before plain text: the begin-of-sequence token if the tokenizer adds one
    eos_token_id: int  # id that is written after an answer that the template does not end
    source: str  # tokenizer folder
    end_tokens: tuple[EndToken, ...] = ()  # all tokens that end a sequence
    started_at: datetime | None = None  # start of the run, which templates print as the present time; None: the present

    @property
    def end_token_ids(self) -> list[int]:
        """Ids of the tokens that end a sequence, the tokenizer's own first."""
        return list(dict.fromkeys([self.eos_token_id, *(token.token_id for token in self.end_tokens)]))

    @cached_property
    def written_end_ids(self) -> frozenset[int]:
        """Those end token ids that a template may write to end an answer. An ordinary token that only a model's config names is not one."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset(
            token_id for token_id in self.end_token_ids if token_id == self.eos_token_id or token_id in added
        )

    def describe_ends(self) -> str:
        """Describe in one line which tokens end a sequence, and which files name them."""
        return f"a sequence ends with {' or '.join(map(str, self.end_tokens))}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that turns texts into ids: vocabulary, end of sequence, prefix, template."""
        parts = [sorted(self.tokenizer.get_vocab().items()), self.eos_token_id, self.prefix_ids, self.template]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def vocabulary_hash(self) -> str:
        """SHA-256 of vocabulary, end tokens and prefix."""
        parts = [sorted(self.tokenizer.get_vocab().items()), self.end_token_ids, self.prefix_ids]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def template_hash(self) -> str:
        """SHA-256 of the template; "none" without one."""
        return "none" if self.template is None else hashlib.sha256(self.template.encode()).hexdigest()

    def describe(self) -> str:
        """Describe the tokenizer: folder, size and fingerprint."""
        return f"the tokenizer in {self.source} ({len(self.tokenizer)} tokens, sha256 {self.fingerprint[:12]})"

    def render(
        self, messages: list[Message], add_generation_prompt: bool, tools: list[dict[str, Any]] | None = None
    ) -> str:
        """Return the template's text for ``messages``. With ``add_generation_prompt`` it goes up to where an answer begins.

        Raises:
            ValueError: The template refuses the messages, or does not read the tools.
        """
        assert self.template is not None
        if tools is not None and "tools" not in self.template:
            raise ValueError(
                "the chat template does not read tools, so the model would not see them; set data.chat_template to one that does"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                strftime_now=self.strftime_now,
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the chat template does not take messages of the roles {roles}: {error}") from error
        return text

    def strftime_now(self, form: str) -> str:
        """Return what a template's ``strftime_now`` prints: a date that is the same for all rows, ranks and starts of a run."""
        return (self.started_at or datetime.now()).strftime(form)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, with nothing added before or after it."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def encode_continuations(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text as a continuation of another text: without the space that some tokenizers put before a text.

        Raises:
            ValueError: The tokenizer merges a text with everything before it.
        """
        if not self._adds_prefix:
            return self.encode(texts)
        return [encode_continuation(self.encode, text) for text in texts]

    @cached_property
    def _adds_prefix(self) -> bool:
        return adds_prefix(self.encode)

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of ``token_ids`` without special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def tokenizer_folder(model: ModelConfig) -> str:
    """Return the folder of a role's tokenizer: ``model.tokenizer``, or else ``model.path``."""
    return model.tokenizer if model.tokenizer is not None else model.path


def load_tokenizer(folder: str, field: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in ``folder``. Code that comes with a checkpoint is never run.

    Args:
        folder: Folder of a model or tokenizer.
        field: Option that names the folder, for error messages.

    Raises:
        ValueError: The folder has no tokenizer, or the tokenizer has no end-of-sequence token.
    """
    if not any(os.path.isfile(os.path.join(folder, name)) for name in TOKENIZER_FILES):
        raise ValueError(f"{field}={folder}: the folder has no tokenizer ({', '.join(TOKENIZER_FILES)})")
    try:
        check_links(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{field}={folder}: the tokenizer cannot be loaded: {' '.join(str(error).split())}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{field}={folder}: the tokenizer has no end-of-sequence token, so an answer could not end; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def load_text_encoder(
    model: ModelConfig, data: DataConfig, role: str, started_at: datetime | None = None
) -> TextEncoder:
    """Load the tokenizer of a role's model, with the template that ``data`` chooses.

    Args:
        model: Model section of the role.
        data: Data section, which chooses the template.
        role: Name of the role, for error messages.
        started_at: Start of the run, which a template may print.

    Raises:
        ValueError: The tokenizer or the required template is missing, or the template is not Jinja.
    """
    folder = tokenizer_folder(model)
    tokenizer = load_tokenizer(folder, f"{role}.model.tokenizer" if model.tokenizer else f"{role}.model.path")
    template = _choose_template(tokenizer, data, folder)
    own_ids = tokenizer("")["input_ids"]
    prefix = [tokenizer.bos_token_id] if tokenizer.bos_token_id in own_ids else []
    ends = find_end_tokens(tokenizer, model.path)
    return TextEncoder(tokenizer, template, prefix, tokenizer.eos_token_id, folder, ends, started_at)


def load_reward_encoder(
    role: RewardRoleConfig, data: DataConfig, name: str, started_at: datetime | None = None
) -> TextEncoder:
    """Load the tokenizer of a reward model that encodes texts again, with its own template, or without one if the run has none.

    Raises:
        ValueError: The tokenizer or the required template is missing, or the template is not Jinja.
    """
    assert role.re_encode is not None
    own = dataclasses.replace(data, chat_template=role.re_encode.chat_template)
    try:
        return load_text_encoder(role.model, own, name, started_at)
    except ValueError as error:
        raise ValueError(str(error).replace("data.chat_template", f"{name}.re_encode.chat_template")) from error


def _choose_template(tokenizer: PreTrainedTokenizerBase, data: DataConfig, folder: str) -> str | None:
    if not data.apply_chat_template:
        if data.chat_template is not None:
            raise ValueError(
                f"data.chat_template={data.chat_template}: data.apply_chat_template is false, so it would not be used; "
                "set one or the other"
            )
        return None
    if data.chat_template is None:
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if template is None:
            raise ValueError(
                f"the tokenizer in {folder} has no chat template; set data.chat_template to a Jinja file, or "
                "data.apply_chat_template=false to tokenise prompts and answers as plain text"
            )
        return template
    if not os.path.isfile(data.chat_template):
        raise ValueError(f"data.chat_template={data.chat_template}: no such file")
    with open(data.chat_template, encoding="utf-8") as file:
        template = file.read()
    if not template.strip():
        raise ValueError(f"data.chat_template={data.chat_template}: the file is empty")
    return template


def check_tokenizers(config: AnyConfig) -> None:
    """Check that every role has the same ids for the tokens that the run's tokenizer makes.

    Roles exchange token ids without change, so a critic or reward model with another vocabulary would read other words. A reward model may
    have texts encoded again instead (``re_encode``).

    Raises:
        ValueError: A token id or end-token id has no embedding row; a model has another vocabulary or end-of-sequence token; a reward model
            has another template; or ``re_encode`` is set without need.
    """
    roles, reward_models = config_roles(config), config_reward_models(config)
    policy_name = next(iter(roles))  # the actor; the reward model in a reward-model run
    if reward_models:
        _check_reward_encoders(reward_models, roles[policy_name].model, config.data)
    policy_folder = tokenizer_folder(roles[policy_name].model)
    policy = load_tokenizer(policy_folder, f"{policy_name}.model.path")
    check_end_tokens(roles[policy_name].model, policy, policy_name)
    if isinstance(config, PpoConfig):
        check_stop_tokens(config.rollout, roles[policy_name].model)
    for name, role in roles.items():
        field = f"{name}.model.path"
        folder = tokenizer_folder(role.model)
        re_encodes = name in reward_models and reward_models[name].re_encode is not None
        reader, source = (load_tokenizer(folder, field), folder) if re_encodes else (policy, policy_folder)
        rows = read_model_config(field, role.model.path)["vocab_size"]
        check_embedding_rows(reader, source, f"{field}={role.model.path}", rows)
        if not re_encodes and not _same_folder(folder, policy_folder):
            _check_same_vocabulary(policy, policy_folder, load_tokenizer(folder, field), folder, name)


def _check_reward_encoders(reward_models: Mapping[str, RewardRoleConfig], actor: ModelConfig, data: DataConfig) -> None:
    """Check that texts are encoded again exactly for those reward models whose token ids would differ."""
    policy = load_text_encoder(actor, data, "actor")
    for name, role in reward_models.items():
        folder = tokenizer_folder(role.model)
        if role.re_encode is not None:
            if load_reward_encoder(role, data, name).fingerprint == policy.fingerprint:
                raise ValueError(
                    f"{name}.re_encode: the tokenizer and template in {folder} are those of {policy.source}, and ids that are "
                    f"carried are exact; set {name}.re_encode=null"
                )
            continue
        if _same_folder(folder, policy.source) or policy.template is None or data.chat_template is not None:
            continue
        template = load_tokenizer(folder, f"{name}.model.path").chat_template
        if template is not None and template != policy.template:
            raise ValueError(
                f"{name}: the tokenizer in {folder} has another chat template than the one in {policy.source}, so prompts would differ "
                f"from those that {name} was trained on; set data.chat_template to the one that all were trained with, or "
                f"{name}.re_encode.max_tokens to have texts encoded again with its own"
            )


def _same_folder(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _check_same_vocabulary(
    policy: PreTrainedTokenizerBase,
    policy_folder: str,
    other: PreTrainedTokenizerBase,
    other_folder: str,
    role: str,
) -> None:
    policy_vocab, other_vocab = policy.get_vocab(), other.get_vocab()
    if policy_vocab != other_vocab:
        differing = {token for token, _ in policy_vocab.items() ^ other_vocab.items()}
        token = min(differing)
        raise ValueError(
            f"{role}: the tokenizer in {other_folder} has another vocabulary than the one in {policy_folder}: "
            f"{len(differing)} tokens differ, for example {json.dumps(token, ensure_ascii=False)} is "
            f"{other_vocab.get(token, 'missing')} there and {policy_vocab.get(token, 'missing')} here. Roles exchange "
            f"token ids; use models of one tokenizer{_way_out(role)}"
        )
    if policy.eos_token_id != other.eos_token_id:
        raise ValueError(
            f"{role}: the end-of-sequence token is {other.eos_token!r} in {other_folder} and {policy.eos_token!r} in "
            f"{policy_folder}; sequences would not end as {role} was trained. Make eos_token the same in both{_way_out(role)}"
        )


def _way_out(role: str) -> str:
    if not role.startswith("reward_model"):
        return ""
    return f", or set {role}.re_encode.max_tokens: responses are then decoded and encoded again with {role}'s tokenizer"
