"""Children of a process that has imported everything and trained nothing: as good as fresh ones, and cheap."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_SECONDS = 120


def forked(function: Callable[[], object], folder: Path) -> int:
    """Runs a function in a child, in a folder that takes all it writes; its exit code, -9 for SIGKILL.

    An exception ends the child as it ends an interpreter, through the frames of the parent.
    """
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(_SECONDS)
    os.chdir(folder)
    tempfile.tempdir = str(folder / "tmp")
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    function()
    sys.stdout.flush()
    os._exit(0)  # taking the interpreter apart costs more than a run
