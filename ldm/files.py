"""Files and folders: found from anywhere, written whole or not at all."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm.settings import InputError

ROOT = Path(__file__).resolve().parents[1]


def find_path(path):
    """Returns: `path` as it is if that exists, else below the repository, so that defaults work from any folder."""
    path = Path(path)
    return path if path.exists() or path.is_absolute() else ROOT / path


def output_folder(path):
    """Make a folder to write into. Returns: its Path. Raises: InputError if it cannot be written."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(f"out_dir {path}: cannot be written ({error.strerror})") from None
    return path


def write_whole(path, write):
    """Write a file whole or not at all: `write(partial)` makes it beside `path`, then it is moved there."""
    partial = path.with_name(f".partial-{path.name}")
    write(partial)
    with suppress(FileNotFoundError):  # of several processes, one writes and one moves
        os.replace(partial, path)


@contextmanager
def whole_folder(path):
    """Fill a folder whole or not at all: `with whole_folder(path) as folder:` writes beside it, then moves."""
    path = output_folder(path)
    with tempfile.TemporaryDirectory(dir=path, prefix=".partial-") as partial:
        yield Path(partial)
        for item in Path(partial).iterdir():
            if item.is_dir():
                shutil.rmtree(path / item.name, ignore_errors=True)
            os.replace(item, path / item.name)


def digest(paths):
    """Returns: a sha256, as text, of files, and of all files below folders: their names and what is in them."""
    total = hashlib.sha256()
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            total.update(str(file.relative_to(path.parent)).encode())
            with open(file, "rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


@contextmanager
def lock_folder(path):
    """Hold a folder for this process alone, until the block ends or the process does.

    Raises: InputError if another process holds it.
    """
    with open(Path(path) / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"out_dir {path}: another run is writing into it; wait, or choose another") from None
        yield
