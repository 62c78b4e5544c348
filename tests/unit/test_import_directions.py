"""The rules of CONTRIBUTING.md that a reader of the source can check: imports go one way, files and functions stay small."""

from __future__ import annotations

import ast
import functools
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
PACKAGES = ("hetero_ppo", "megatron_bridge")
#: A package imports from its own tier or below. Packages of one tier may use each other as long as there is no cycle.
TIERS = {
    "errors": 0,
    "disk": 0,
    "network": 0,
    "private_dir": 0,
    "table": 0,
    "peer_proof": 1,
    "config": 0,
    "types": 1,
    "step": 2,
    "algorithms": 3,
    "distributed": 3,
    "memory": 3,
    "observability": 3,
    "engines": 4,
    "inference": 4,
    "rollout": 4,
    "reward": 4,
    "health": 4,
    "checkpoint": 4,
    "data": 4,
    "experience": 5,
    "runtime": 5,
    "trainers": 6,
    "cli": 7,
}
MEGATRON_CORE_PACKAGES = {"megatron_bridge", "engines", "inference", "distributed", "reward"}
#: The same of the bridge.
BRIDGE_TIERS = {
    "__init__": 0,
    "platform": 0,
    "families": 1,
    "model": 2,
    "aligned": 3,
    "weights": 3,
    "model_provider": 4,
}
#: Run in vLLM's own processes: nothing else may need vLLM to be installed.
VLLM_MODULES = (
    "hetero_ppo.rollout.weights.worker_extension",
    "hetero_ppo.rollout.weights.loaded_weights",
    "hetero_ppo.rollout.servers.inherited_socket",
)
#: Of torch.distributed: what all members of a group call together.
COLLECTIVES = {
    "all_reduce",
    "all_gather",
    "all_to_all",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "scatter",
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 90

MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TYPED = MODULES + sorted(
    path for folder in ("benchmarks", "examples", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")
)
Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = TypeVar("Node", bound=ast.AST)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def nodes_in(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def package_of(path: Path) -> str:
    """Return ``engines`` for hetero_ppo/engines/x.py, ``types`` for hetero_ppo/types.py, or ``megatron_bridge``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "megatron_bridge" if parts[0] == "megatron_bridge" else parts[1]


def imports_of(path: Path) -> Iterator[str]:
    """Yield the dotted names of everything that the module imports anywhere; ``from a import b`` gives ``a.b``."""
    for node in nodes_in(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{name_of(path)}:{node.lineno}: import *"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inner_imports(path: Path) -> set[str]:
    """Return the packages of hetero_ppo that the module imports."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("hetero_ppo.")} - {package_of(path)}


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_imports_go_one_way() -> None:
    above = []
    for path in MODULES:
        package = package_of(path)
        if package == "megatron_bridge":
            above += [f"{name_of(path)}: {name}" for name in imports_of(path) if is_below(name, "hetero_ppo")]
        elif package != "__init__":
            assert package in TIERS, f"give {package} a place in TIERS"
            above += [f"{name_of(path)}: {other}" for other in inner_imports(path) if TIERS[other] > TIERS[package]]
    assert not above, "imports from above"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_module(name: str, modules: Container[str]) -> str:
    """Return the module that an imported name is, or is in."""
    return name if name in modules else name.rpartition(".")[0]


def test_modules_have_no_cycle() -> None:
    """Imports for type checkers and imports inside of functions included."""
    names = {module_of(path): path for path in MODULES}
    graph = {
        name: {imported_module(found, names) for found in imports_of(path)} & names.keys()
        for name, path in names.items()
    }
    done: set[str] = set()
    while graph.keys() - done:
        free = {name for name in graph.keys() - done if graph[name] <= done | {name}}
        assert free, f"import cycle among {sorted(graph.keys() - done)}"
        done |= free


def test_imports_of_the_bridge_go_one_way() -> None:
    above = []
    for path in [path for path in MODULES if package_of(path) == "megatron_bridge"]:
        tier = BRIDGE_TIERS[path.relative_to(ROOT).with_suffix("").parts[1]]
        inner = {name for name in imports_of(path) if name.startswith("megatron_bridge.")}
        above += [f"{name_of(path)}: {name}" for name in inner if BRIDGE_TIERS[name.split(".")[1]] > tier]
    assert not above, "imports from above"


def test_packages_of_one_tier_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        if package_of(path) in TIERS:
            graph.setdefault(package_of(path), set()).update(inner_imports(path))
    done: set[str] = set()
    while graph.keys() - done:
        free = {package for package in graph.keys() - done if graph[package] <= done}
        assert free, f"import cycle among {sorted(graph.keys() - done)}"
        done |= free


def test_megatron_core_and_vllm_stay_in_their_packages() -> None:
    strays = []
    for path in MODULES:
        names = list(imports_of(path))
        if package_of(path) not in MEGATRON_CORE_PACKAGES:
            strays += [f"{name_of(path)}: {name}" for name in names if is_below(name, "megatron")]
        if name_of(path).removesuffix(".py").replace("/", ".") not in VLLM_MODULES:
            of_vllm = ("vllm", *VLLM_MODULES)
            strays += [f"{name_of(path)}: {name}" for name in names if any(is_below(name, one) for one in of_vllm)]
    assert not strays


def test_algorithms_are_torch_and_types_alone() -> None:
    foreign = ("numpy", "transformers", "megatron", "megatron_bridge", "torch.distributed")
    for path in [path for path in MODULES if package_of(path) == "algorithms"]:
        assert not [name for name in imports_of(path) if any(is_below(name, one) for one in foreign)], name_of(path)


def nodes_of(paths: Iterable[Path], kind: type[Node]) -> Iterator[tuple[str, Node]]:
    """Yield ("file:line", node) of every node of a kind in the files."""
    for path in paths:
        for node in nodes_in(path):
            if isinstance(node, kind):
                yield f"{name_of(path)}:{getattr(node, 'lineno', 0)}", node


def test_no_global_process_group_accessors() -> None:
    """Every role has its own layout, so Megatron-Core's one global layout is the wrong one for most of them."""
    paths = [path for path in MODULES if package_of(path) != "distributed"]
    assert not [
        f"{where}: parallel_state.{node.attr}"
        for where, node in nodes_of(paths, ast.Attribute)
        if node.attr.startswith("get_")
        and isinstance(node.value, ast.Name)
        and node.value.id in ("parallel_state", "mpu")
    ]


def test_every_collective_names_its_group() -> None:
    unnamed = []
    for where, call in nodes_of(MODULES, ast.Call):
        function = call.func
        if not (
            isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "dist"
        ):
            continue
        named = any(keyword.arg == "group" for keyword in call.keywords) or (function.attr == "barrier" and call.args)
        if function.attr in COLLECTIVES and not named:
            unnamed.append(f"{where}: dist.{function.attr}")
    assert not unnamed, "collectives without a group"


def test_sizes() -> None:
    long = []
    for path in TYPED:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        long += [f"{name_of(path)}: {lines} lines"] if lines > MAX_FILE_LINES else []
    for where, function in nodes_of(TYPED, Function):
        length = (function.end_lineno or 0) - function.lineno + 1
        long += [f"{where}: {function.name} has {length} lines"] if length > MAX_FUNCTION_LINES else []
    assert not long


def test_every_argument_is_typed() -> None:
    assert not [
        f"{where}: {function.name}({argument.arg})"
        for where, function in nodes_of(TYPED, Function)
        for argument in arguments_of(function)
        if argument.annotation is None and argument.arg not in ("self", "cls")
    ]


def arguments_of(function: Function) -> list[ast.arg]:
    arguments = function.args
    variadic = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *variadic]


def test_nothing_is_called_utils() -> None:
    assert not [path for path in MODULES if any("utils" in part for part in path.relative_to(ROOT).parts)]
