"""``hetero-ppo plan``: the memory of a run before the run; no GPU is used and no weights are read."""

from __future__ import annotations

import argparse

from hetero_ppo.cli.arguments import add_config_arguments


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan", help="say what a run needs of devices and host memory, phase by phase, and whether it fits"
    )
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks of the run (%(default)s)")
    parser.add_argument("--ranks-per-node", type=int, default=None, metavar="N", help="default: 8, or all there are")
    parser.add_argument(
        "--device-gib",
        type=float,
        default=None,
        metavar="GIB",
        help="memory of one GPU; default: residency.device_gib, or CUDA's. Without any the plan is of a run on CPUs, whose models are "
        "in fp32 where model.dtype is null",
    )
    parser.add_argument(
        "--host-gib",
        type=float,
        default=None,
        metavar="GIB",
        help="default: residency.host_gib, or the machine's limit",
    )
    parser.add_argument("--json", default=None, metavar="FILE", help="write the plan, in bytes, as JSON")
    parser.add_argument("--figure", default=None, metavar="FILE", help="draw the phases: .svg, .png or .pdf")
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the plan, and raise a ValueError when the run does not fit."""
    # Megatron-Core takes seconds to import; `hetero-ppo --help` should not.
    from hetero_ppo.algorithms.advantage_registry import check_advantage
    from hetero_ppo.config.checks import check_config
    from hetero_ppo.config.load import load_config
    from hetero_ppo.engines.layouts import check_models_fit_layouts
    from hetero_ppo.memory.plan import plan_memory
    from hetero_ppo.memory.plan_check import require_fit
    from hetero_ppo.memory.plan_limits import find_limits
    from hetero_ppo.memory.plan_text import render_plan, write_json
    from hetero_ppo.runtime.settle import settle

    for name in ("world_size", "ranks_per_node"):
        value = vars(args)[name]
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")
    loaded = load_config(args.config, args.overrides)
    limits = find_limits(loaded.config.residency, args.device_gib, args.host_gib)
    on_cuda = limits.device is not None
    loaded, decided = settle(loaded, on_cuda=on_cuda)
    check_config(loaded.config, args.world_size)
    check_advantage(loaded.config)
    check_models_fit_layouts(loaded.config, on_cuda=on_cuda)
    plan = plan_memory(loaded.config, args.world_size, ranks_per_node=args.ranks_per_node, device_bytes=limits.device)
    print("\n".join([f"memory plan of {loaded.source}", *decided, "", render_plan(plan, limits)]), flush=True)
    if args.json is not None:
        write_json(plan, limits, args.json)
    if args.figure is not None:
        # matplotlib takes a second to import.
        from hetero_ppo.memory.plan_figure import draw_plan

        draw_plan(plan, args.figure)
    require_fit(loaded.config, plan, limits)
