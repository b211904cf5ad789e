"""Files that are complete or not there: a crash leaves the old content."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from lightning_mixprec.errors import MixPrecError


def path_of(given: object, what: str) -> Path:
    """The path that a user gave, with ``~`` as the home folder.

    Args:
        given: A path; anything else is refused.
        what: What it is the path of, for the error.

    Raises:
        MixPrecError: It is no path, or an empty one.
    """
    if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
        raise MixPrecError(f"the path of {what} is {given!r} ({type(given).__name__}); give one as text or a Path")
    return Path(os.fsdecode(given)).expanduser()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, its folder too: what stood there before stays whole until the new content is complete.

    A pipe or a device is written to, not replaced.
    """
    target = Path(os.path.realpath(Path(path).expanduser()))
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8", newline="\n")
        return
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with draft.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()


@contextlib.contextmanager
def drafted(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside a file's, under its own name, to be written to and read from: moved to its place at the end.

    What else is written beside the draft is moved along, and before it. After an error nothing is left of either, and
    what stood there before is whole.

    Args:
        path: Where the file is to be; its folder is made.
    """
    target = Path(os.path.realpath(Path(path).expanduser()))
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        yield folder / target.name
        others = [each for each in sorted(folder.iterdir()) if each.name != target.name]
        for each in [*others, folder / target.name]:
            each.replace(target.parent / each.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
