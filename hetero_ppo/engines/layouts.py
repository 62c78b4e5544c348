"""Maps a role's model and layout to the model bridge. Models that cannot be built are errors before anything loads."""

from __future__ import annotations

import torch

from hetero_ppo.config.derived import config_roles
from hetero_ppo.config.devices import dtype_of, with_dtype
from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.schema import Dtype, RewardRoleConfig, RoleConfig, TrainedRoleConfig
from hetero_ppo.step.roles import section_of
from megatron_bridge import platform
from megatron_bridge.model.config_mapping import BridgeConfig, bridge_config, read_hf_config
from megatron_bridge.weights.import_hf import check_checkpoint

#: Dtype of the schema -> dtype of torch.
DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}


def role_bridge(config: RoleConfig, recompute: str | None = None, *, on_cuda: bool | None = None) -> BridgeConfig:
    """Return the checkpoint's config mapped to the role's layout. Reads config.json alone.

    Args:
        config: Model and layout.
        recompute: Recomputation of activations, as in ``TrainedRoleConfig``.
        on_cuda: Whether the run computes on GPUs; None asks this machine.

    Raises:
        ValueError: The model or the layout is not supported, or the two do not fit together.
    """
    on_cuda = platform.HAS_CUDA if on_cuda is None else on_cuda
    config, layout = with_dtype(config, on_cuda=on_cuda), config.parallel
    bridge = bridge_config(
        read_hf_config(config.model.path),
        dtype=DTYPES[dtype_of(config.model)],
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        context=layout.context,
        expert=layout.expert,
        sequence=layout.sequence,
        recompute=recompute,
        aligned=config.aligned,
        on_cuda=on_cuda,
    )
    # Micro-batches differ in length, and the last one in rows. The interleaved schedule deadlocks on gloo when stages
    # exchange shapes first: there micro-batches are padded to one shape instead.
    bridge.transformer.variable_seq_lengths = layout.pipeline > 1 and layout.virtual_pipeline is None
    bridge.transformer.calculate_per_token_loss = True
    return bridge


def check_models_fit_layouts(config: AnyConfig, *, on_cuda: bool | None = None) -> None:
    """Check that every role's model can be built in its layout. The arguments are those of ``role_bridge``.

    Raises:
        ValueError: A model cannot be built; the message names its role, its folder and the reason.
    """
    for name, role in config_roles(config).items():
        try:
            role_bridge(role, role.recompute if isinstance(role, TrainedRoleConfig) else None, on_cuda=on_cuda)
        except ValueError as error:
            raise ValueError(f"{name} ({name}.model.path={role.model.path} in {name}.parallel): {error}") from error


def check_checkpoints(config: AnyConfig, *, on_cuda: bool | None = None) -> dict[str, list[str]]:
    """Check that every role's checkpoint is complete and holds the model that its config.json describes. Reads headers, no weights.

    Returns:
        Role -> tensors that the checkpoint lacks and that are initialised.

    Raises:
        ValueError: A checkpoint cannot be loaded, or a reward model has no score head; the message names role and reason.
    """
    initialised = {}
    for name, role in config_roles(config).items():
        place = f"{name}.model.path={role.model.path}"
        try:
            initialised[name] = check_checkpoint(
                role.model.path, role_bridge(role, on_cuda=on_cuda), section_of(name).head
            )
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if isinstance(role, RewardRoleConfig) and initialised[name]:
            raise ValueError(
                f"{place}: the checkpoint has no score head ({', '.join(initialised[name])}); give the export of a reward-model run"
            )
    return initialised
