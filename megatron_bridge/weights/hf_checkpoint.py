"""The safetensors files of a Hugging Face checkpoint: their contents, reading parts of them, and writing one."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: Suffixes of the files in a folder that are read, or copied into an export.
READ_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """Header of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "F32", "BF16", ...


class LazyTensor:
    """A tensor in a file; indexing reads that part alone."""

    def __init__(self, safe_slice: Any) -> None:
        self._slice = safe_slice

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        return self._slice[index]


class HfCheckpoint:
    """All tensors of a checkpoint folder, in one file or several with an index. Use it as a context manager.

    Raises:
        ValueError: There are no safetensors, the index names a missing file or tensor, a file is damaged, or a link leads out of the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            check_names(self.path)
            self._read_headers()
        except BaseException:
            self._stack.close()
            raise

    def _read_headers(self) -> None:
        index = self.path / INDEX_FILE
        if index.is_file():
            weight_map = _weight_map(index)
            for file in sorted(set(weight_map.values())):
                self._read_header(self.path / file, listed_in=index)
            for name, file in weight_map.items():
                if name not in self.tensors:
                    raise ValueError(f"{index}: lists {name} in {file}, but that file does not hold it")
        elif (self.path / SINGLE_FILE).is_file():
            self._read_header(self.path / SINGLE_FILE, listed_in=None)
        else:
            raise ValueError(
                f"{self.path}: neither {SINGLE_FILE} nor {INDEX_FILE}; save it with transformers' save_pretrained"
            )

    def _read_header(self, file: Path, listed_in: Path | None) -> None:
        if not file.is_file():
            raise ValueError(f"{listed_in}: lists {file.name}, but there is no such file; complete the download")
        try:
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error}); download or save it again") from error
        self._open[file] = handle
        names: list[str] = handle.keys()  # a handle is no mapping
        for name in names:
            part = handle.get_slice(name)
            self.tensors[name] = TensorInfo(file, tuple(part.get_shape()), part.get_dtype())

    @property
    def source(self) -> Path:
        """File that lists the checkpoint's tensors."""
        index = self.path / INDEX_FILE
        return index if index.is_file() else self.path / SINGLE_FILE

    def lazy(self, name: str) -> LazyTensor:
        """Return a tensor that is read by indexing."""
        return LazyTensor(self._open[self.tensors[name].file].get_slice(name))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def check_names(folder: Path) -> None:
    """Call ``check_links``, and refuse an index that names a file outside the folder. Reads no weights.

    Raises:
        ValueError: A file lies outside the folder, or the index is not valid.
    """
    check_links(folder)
    index = folder / INDEX_FILE
    if index.is_file():
        for file in sorted(set(_weight_map(index).values())):
            _check_stays_inside(folder / file, folder)


def check_links(folder: Path) -> None:
    """Refuse links in a checkpoint folder that lead out of it: an export copies some of its files and may be published.

    Links into a Hugging Face cache (``models--<name>/blobs/<hash>``) are allowed: a cache's snapshot folder consists of them, and so do
    folders that old versions of its client made.

    Args:
        folder: Folder of a model or a tokenizer.

    Raises:
        ValueError: A file lies outside the folder; the message names the link.
    """
    for file in sorted(folder.glob("*")):
        if file.suffix in READ_SUFFIXES and file.is_symlink():
            _check_stays_inside(file, folder)


def _check_stays_inside(file: Path, folder: Path) -> None:
    found = file.resolve()
    is_blob = found.parent.name == "blobs" and found.parent.parent.name.startswith("models--")
    if not is_blob and not found.is_relative_to(folder.resolve()):
        raise ValueError(
            f"{file} is a link to {found}, out of the checkpoint folder; copy the file there if it belongs to the model"
        )


def _weight_map(index: Path) -> dict[str, str]:
    """Read tensor name -> file name from an index.

    Raises:
        ValueError: The file is not an index, or names a file outside its folder.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(PurePosixPath(file)) for file in weight_map.values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: no index of safetensors files ({error!r}); download it again") from error
    for file in sorted(files):
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ValueError(
                f"{index}: lists {file!r}, which is not in the checkpoint folder; do not use this checkpoint"
            )
    return weight_map


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one file with the permissions that the umask gives; the library's own files have 0600.

    Raises:
        OSError: The system refused.
    """
    with system_errors():
        save_file(tensors, path, metadata={"format": "pt"})
    set_default_rights(path)


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise the system's error if safetensors reports it only as text."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def set_default_rights(path: Path) -> None:
    """Give a file that was made through a temporary one (0600) the permissions that the umask gives, as its new folder shows them."""
    path.chmod(stat.S_IMODE(path.parent.stat().st_mode) & 0o666)


def tensor_names(path: str | Path) -> set[str]:
    """Return the names of a checkpoint's tensors."""
    with HfCheckpoint(path) as checkpoint:
        return set(checkpoint.tensors)
