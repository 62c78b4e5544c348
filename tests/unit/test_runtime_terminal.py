"""A run whose terminal is closed goes on to its checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from hetero_ppo.runtime.terminal import survive_hangup

survive_hangup()
print("before", flush=True)
sys.stdin.readline()  # until the terminal is gone
for _ in range(3):
    print("after", flush=True)
    print("after", file=sys.stderr)
    sys.stderr.write("x")
open(sys.argv[1], "w").write("done")
"""


def test_output_to_a_closed_terminal_is_no_error(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "done")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        assert os.read(ours, 6) == b"before"
        os.close(ours)
        process.communicate(b"\n", timeout=60)
    assert process.returncode == 0 and (tmp_path / "done").read_text() == "done"
