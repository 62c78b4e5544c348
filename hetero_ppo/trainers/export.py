"""Exports a role of a checkpoint as a Hugging Face folder, in a process of its own."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hetero_ppo.checkpoint.manager import check_contents, checkpoint_folder
from hetero_ppo.config.load import AnyConfig, load_config
from hetero_ppo.config.schema import DataConfig, ParallelConfig
from hetero_ppo.data.chat_template import TextEncoder, load_text_encoder
from hetero_ppo.data.export_files import TEMPLATE_FILE, export_files
from hetero_ppo.network import INTERFACE_VARIABLES
from hetero_ppo.step.roles import RoleSpec, run_roles


def run(args: argparse.Namespace) -> None:
    """Load one role of a checkpoint into one process, whatever layout wrote it, and export it.

    Args:
        args: ``run_dir``, ``role`` (None: actor, or reward for a reward-model run), ``step`` (None: newest), ``out``.

    Raises:
        ValueError: There is no such run, role or checkpoint, or ``out`` is there already.
    """
    saved = Path(args.run_dir) / "config.yaml"
    if not saved.is_file():
        raise ValueError(f"--run {args.run_dir}: no config.yaml there; give the run.dir of a training run")
    if Path(args.out).exists():
        raise ValueError(f"--out {args.out} is there already; choose another folder, or remove it")
    config = load_config(str(saved), []).config
    roles = trained_specs(config)
    role = args.role or next(iter(roles))
    if role not in roles:
        raise ValueError(f"--role {role}: this run trains {', '.join(roles)}")
    folder = checkpoint_folder(Path(args.run_dir), args.step)
    check_contents(folder)
    with single_process():
        encoder = _encoder(roles[role], config.data, Path(args.run_dir))
        _export(roles[role], encoder, folder, args.out, config.run.timeout_minutes)
    print(f"exported {role} of {folder} to {args.out}")


def _export(spec: RoleSpec, encoder: TextEncoder, checkpoint: Path, out: str, timeout_minutes: float) -> None:
    # Megatron-Core takes seconds to import: after the checks.
    from hetero_ppo.distributed.groups import initialise
    from hetero_ppo.engines.model_engine import ModelEngine
    from hetero_ppo.reward.golden import GOLDEN_FILE
    from hetero_ppo.trainers.run import end_run

    initialise(timeout_minutes)
    try:
        spec.config.parallel = ParallelConfig()
        engine = ModelEngine(spec.name, spec.config, spec.head)
        engine.load_weights(checkpoint / spec.name)
        golden = checkpoint / GOLDEN_FILE
        more = export_files(encoder, spec.config.model.path, spec.head)
        files = {**more.files, **({GOLDEN_FILE: golden.read_text(encoding="utf-8")} if golden.is_file() else {})}
        engine.export(out, files=files, config_changes=more.config)
    finally:
        end_run()


def _encoder(spec: RoleSpec, data: DataConfig, run_dir: Path) -> TextEncoder:
    """Return the tokenizer of the role, and the template that the run wrote into its folder when it started."""
    kept = run_dir / TEMPLATE_FILE
    if data.apply_chat_template and kept.is_file():
        data = replace(data, chat_template=str(kept))
    return load_text_encoder(spec.config.model, data, spec.name)


def trained_specs(config: AnyConfig) -> dict[str, RoleSpec]:
    """Return name -> specification of the roles that a checkpoint has, and that can be exported."""
    return {name: spec for name, spec in run_roles(config).items() if spec.is_trained}


@contextmanager
def single_process() -> Iterator[None]:
    """Make the environment that of a world of this process alone, which needs no port; restore it after the block."""
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    changed = [*world, *INTERFACE_VARIABLES]
    before = {name: os.environ[name] for name in changed if name in os.environ}
    os.environ.update(world)
    try:
        yield
    finally:
        for name in changed:
            os.environ.pop(name, None)
        os.environ.update(before)
