"""The inputs of a run, whose content a later run that goes on from its checkpoints compares (runtime/inputs.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from hetero_ppo.config.derived import config_roles
from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.on_resume import rule_of
from hetero_ppo.config.schema import PpoConfig
from hetero_ppo.config.schema.option import OnResume
from hetero_ppo.data.chat_template import TextEncoder
from hetero_ppo.data.dataset import Dataset
from hetero_ppo.data.prompts import PromptExample, labels_digest
from hetero_ppo.reward.re_encoding import ReEncoder
from hetero_ppo.runtime.inputs import Input, differing, function_digest
from hetero_ppo.runtime.resume import Resume
from hetero_ppo.step.roles import RoleSpec
from megatron_bridge.weights.weights_digest import config_digest, model_digest


def text_inputs(
    config: AnyConfig,
    resume: Resume | None,
    encoder: TextEncoder,
    train: Dataset[Any],
    re_encoders: Mapping[str, ReEncoder],
) -> list[Input]:
    """Return tokenizers, templates, training data, labels and the reward function.

    Args:
        config: Checked configuration.
        resume: Resume of the run, with its allowed changes. If template or tokenizer may change, so may the data that they make.
        encoder: Tokenizer and template of the run.
        train: Training data.
        re_encoders: Re-encoders of the reward models that read texts again, by role.
    """
    policy = next(iter(config_roles(config)))
    inputs = _encoder_inputs("data.chat_template", policy, encoder)
    for name, re_encoder in re_encoders.items():
        inputs += _encoder_inputs(f"{name}.re_encode.chat_template", name, re_encoder.encoder)
    causes = [field for one in differing(resume, inputs[:2]) for field in one.fields]
    if resume is not None:
        data = [change.field for change in resume.changes if change.field.startswith("data.")]
        causes += [field for field in data if rule_of(type(config), field) is OnResume.content]
    inputs.append(Input("data.train", train.fingerprint, ("data.train", *causes)))
    if isinstance(config, PpoConfig):
        prompts: Sequence[PromptExample] = train.examples
        fields = ("data.train", "data.label_key", "data.metadata_key")
        inputs.append(Input("data.train (labels and metadata)", labels_digest(prompts), fields))
        if config.reward.function is not None:
            inputs.append(Input("reward.function", function_digest(config.reward.function), ("reward.function",)))
    return inputs


def model_inputs(roles: Mapping[str, RoleSpec], world: dist.ProcessGroup) -> list[Input]:
    """Return the weights of frozen roles, and what config.json says of trained ones. Collective over the world.

    Each folder is read once, by all ranks together.

    Args:
        roles: Roles of the run, by name.
        world: Group of all ranks.
    """
    inputs, digests = [], dict[str, str]()
    for name, spec in roles.items():
        path, field = spec.config.model.path, f"{name}.model.path"
        if spec.is_trained:
            inputs.append(Input(f"{field} (config.json)", config_digest(path), (field,)))
            continue
        if path not in digests:
            digests[path] = model_digest(path, world.rank(), world.size(), partial(dist.all_reduce, group=world))
        inputs.append(Input(f"{field} (weights)", digests[path], (field,)))
    return inputs


def _encoder_inputs(template_field: str, role: str, encoder: TextEncoder) -> list[Input]:
    folder_fields = (f"{role}.model.tokenizer", f"{role}.model.path")
    return [
        Input(template_field, encoder.template_hash, (template_field, "data.apply_chat_template", *folder_fields)),
        Input(f"{role}.model.tokenizer", encoder.vocabulary_hash, folder_fields),
    ]
