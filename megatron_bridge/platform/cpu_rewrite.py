"""Import hook that compiles ``megatron.core`` modules for a machine without CUDA.

It rewrites four things in the syntax tree, in these modules only:

* ``torch.cuda`` becomes the stand-in ``cpu_device``;
* the string ``"cuda"``, and type strings such as ``"torch.cuda.FloatTensor"``, become their CPU names;
* ``tensor.cuda()`` and ``module.cuda()`` become ``.cpu()``;
* ``pin_memory=True`` becomes ``False`` and ``tensor.pin_memory()`` becomes the tensor, since there is no device to copy to.

The compiled code is not cached next to the package, so an installation shared with GPU processes stays untouched.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import sys
from types import CodeType, ModuleType
from typing import Any
from collections.abc import Sequence

import torch

from megatron_bridge.platform import cpu_device

_PACKAGE = "megatron.core"
_STAND_IN = "_hetero_cpu_device"
_STRINGS = {
    "cuda": "cpu",
    "cuda:0": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
    "torch.cuda.DoubleTensor": "torch.DoubleTensor",
}


class _Rewriter(ast.NodeTransformer):
    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name(id=_STAND_IN, ctx=ast.Load()), node)
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and node.value in _STRINGS:
            return ast.copy_location(ast.Constant(_STRINGS[node.value]), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        for keyword in node.keywords:
            if keyword.arg == "pin_memory" and isinstance(keyword.value, ast.Constant):
                keyword.value = ast.copy_location(ast.Constant(False), keyword.value)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "pin_memory" and not node.args:
            return node.func.value
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            node.func.attr = "cpu"
            node.args, node.keywords = [], []
        return node


def rewrite(source: str | bytes, path: str) -> CodeType:
    """Compile one module with the four rewrites."""
    tree = ast.fix_missing_locations(_Rewriter().visit(ast.parse(source, path)))
    return compile(tree, path, "exec", dont_inherit=True)


def _adapt_random(module: ModuleType) -> None:
    """Replace the state functions of the random tracker by the CPU generator's; the original ones go through CUDA's lazy initialisation."""

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    vars(module).update(_get_cuda_rng_state=get_state, _set_cuda_rng_state=set_state)


def _adapt_jit(module: ModuleType) -> None:
    """Disable the JIT fuser: torch.compile would need a C++ compiler and seconds per function, for kernels that are not hot here."""
    module.disable_jit_fuser()


_AFTER_EXEC = {"megatron.core.tensor_parallel.random": _adapt_random, "megatron.core.jit": _adapt_jit}


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return rewrite(self.get_data(path), path)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, _STAND_IN, cpu_device)
        super().exec_module(module)
        adapt = _AFTER_EXEC.get(module.__name__)
        if adapt is not None:
            adapt(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _PACKAGE and not fullname.startswith(_PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Put the hook in front of Python's own finders, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
