"""A machine with GPUs and without a C compiler is refused before a kernel needs one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bridge.platform.compiler import check_compiler


def test_a_compiler_is_found_by_name_or_by_cc(tmp_path: Path) -> None:
    for name in ("gcc", "mine"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    check_compiler({"PATH": str(tmp_path)})
    check_compiler({"PATH": str(tmp_path), "CC": "mine"})
    with pytest.raises(ValueError, match="no C compiler .CC=other.: .*Install gcc"):
        check_compiler({"PATH": str(tmp_path), "CC": "other"})
    (tmp_path / "gcc").unlink()
    with pytest.raises(ValueError, match="no C compiler .gcc, clang, cc."):
        check_compiler({"PATH": str(tmp_path)})
