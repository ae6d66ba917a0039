"""Files and folders: found from anywhere, written whole or not at all, never over what a script did not make."""

import fcntl
import hashlib
import lzma
import os
import tempfile
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ldm.schema import InputError, reason

ROOT = Path(__file__).resolve().parents[1]
UMASK = os.umask(0)  # reading it takes setting it
os.umask(UMASK)
PARTIAL = ".partial-"  # begins the name of what is not whole yet
HELD = set()  # folders that this process holds


def find_path(path):
    """Returns: `path` if it exists, else the same below the repository if that does, so that defaults work anywhere.

    `~` is the home folder. Raises: InputError if the path cannot be followed: too long, no permission.
    """
    path = Path(os.path.expanduser(path))
    for place in (path, ROOT / path):
        try:
            if place.exists():
                return place
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    return path


@contextmanager
def writing(path, *kinds):
    """Whatever prevents a file or folder from being written becomes one InputError that names it.

    kinds: of errors, beside the operating system's and safetensors' own.
    """
    try:
        yield
    except (OSError, SafetensorError, *kinds) as error:
        raise InputError(f"{path}: cannot be written ({reason(error)})") from None


def check_writable(path):
    """Returns: the Path of a folder, which need not exist. Raises: InputError if it cannot be made or written."""
    path = Path(os.path.expanduser(path))
    with writing(path):
        place = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not place.is_dir():
            what = f"{place} is a file" if place != path else "a file"
            raise InputError(f"{path}: cannot be written ({what}, expected a folder; give another)")
        tempfile.TemporaryFile(dir=place).close()
    return path


def output_folder(path):
    """Make a folder to write into, and hold it for this process alone until the process ends.

    Returns: its Path. Raises: InputError if it cannot be written, or another process holds it.
    """
    path = check_writable(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if path.resolve() in HELD:
            return path
        folder = os.open(path, os.O_RDONLY)  # open, and so held, until the process ends
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise InputError(f"{path}: another run is writing into it; wait, or choose another") from None
    except OSError:  # a file system without locks
        pass
    HELD.add(path.resolve())
    return path


def fresh_folder(path, overwrite=False, *, inputs=(), own=(), never=(), only=None):
    """Check, before any work, a folder that is to be filled: it is new or empty, or the user said overwrite=true.

    inputs: what is read meanwhile, which must not lie in it. own: names that may be in it. never: names of what is not
    even overwritten. only: names of all that is to be written, where other things may be in it.
    Returns: its Path; it is not made yet.
    """
    path = check_writable(path)
    for source in map(Path, inputs):
        if source.resolve().is_relative_to(path.resolve()):
            raise InputError(f"{path}: holds {source}, which is read; choose another folder to write into")
    there = sorted(item.name for item in path.iterdir()) if path.is_dir() else []
    if only is None:
        there = [name for name in there if not name.startswith(".") and name not in own]
    else:
        there = [name for name in there if name in only]
    kept = not set(there).isdisjoint(never)
    if there and (kept or not overwrite):
        remedy = "" if kept else ", or give overwrite=true to replace what has the same names"
        raise InputError(f"{path}: has {', '.join(there[:4])} in it already; choose another folder{remedy}")
    return path


def leave_out(files, out_dir):
    """Returns: a list's files but for those below out_dir, which an earlier run left there. out_dir: may be None."""
    own = out_dir and os.path.abspath(os.path.expanduser(out_dir)) + os.sep
    return [file for file in files if not (own and os.path.abspath(file).startswith(own))]


def report_folder(path, report, key, *others):
    """Make a folder for a script's results, which replace those of an earlier run of the same script, and nothing else.

    report: the file in it that tells whose they are, by having `key`. others: files, or patterns, that are written too.
    Returns: its Path. Raises: InputError if some are there that are not this script's, or it cannot be written.
    """
    path = output_folder(path)
    there = [found.name for name in (*others, report) for found in path.glob(name)]
    try:
        own = not there or f'"{key}"' in (path / report).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        own = False
    if not own:
        raise InputError(f"{path}: has a {there[0]} that is not of this script; choose another out_dir")
    return path


def _settle(path, synced=True):
    """Give what was written the modes that the user's umask asks for, libraries' being private; synced: see it onto the
    disk."""
    for item in (path, *path.rglob("*")):
        with suppress(PermissionError):  # a file system without modes
            item.chmod((0o777 if item.is_dir() else 0o666) & ~UMASK)
        if synced and item.is_file():
            with open(item, "rb") as written:
                os.fsync(written)


def write_whole(path, write):
    """Write a file whole or not at all: `write(partial)` makes it beside `path`, then it is moved there."""
    path = Path(path)
    partial = path.with_name(PARTIAL + path.name)
    try:
        with writing(path, RuntimeError):  # torch's
            path.parent.mkdir(parents=True, exist_ok=True)
            write(partial)
            _settle(partial)
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def append_whole(path, text):
    """Append to a file, and see it onto the disk; on an error, the file is as it was before."""
    with writing(path), open(path, "ab", buffering=0) as file:
        end, left = file.tell(), text.encode()
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file)
        except BaseException:
            file.truncate(end)
            raise


@contextmanager
def whole_folder(path, removes=(), synced=True):
    """Fill a folder whole or not at all: `with whole_folder(path) as folder:` writes beside it, then both are swapped.

    Items of the same names are replaced, and those that `removes` names are removed, only once all the new ones are
    written, and synced: are on the disk, which takes long of thousands. Everything else stays.
    """
    path = Path(os.path.expanduser(path))
    made = not path.exists()
    try:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path, prefix=PARTIAL, ignore_cleanup_errors=True) as partial:
                new, old = Path(partial, "new"), Path(partial, "old")
                new.mkdir()
                old.mkdir()
                yield new
                _settle(new, synced)
                _swap(path, new, old, removes)
    finally:
        if made:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def _swap(path, new, old, removes):
    """Move all items of the folder `new` into `path`, those that were there into `old`; on an error, all back."""
    names = sorted(item.name for item in new.iterdir())  # config.json, by which a control is known: last in, first out
    moves = [(path / name, old / name) for name in sorted({*removes, *names})]
    moves += [(new / name, path / name) for name in reversed(names)]
    try:
        for source, target in moves:
            if os.path.lexists(source):
                os.replace(source, target)
    except BaseException:
        for source, target in reversed(moves):
            if os.path.lexists(target) and not os.path.lexists(source):
                os.replace(target, source)
        raise


def unpack(archive, folder, most_files, most_bytes):
    """Unpack a zip that may come from anybody into a folder. Raises: InputError, before anything is written, if it is
    none, if it would write elsewhere, or if its files are more or larger than that."""
    archive = Path(archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            files = [info for info in opened.infolist() if not info.is_dir()]
            for path in (Path(info.filename) for info in files):
                if path.is_absolute() or ".." in path.parts:
                    raise InputError(f"{archive}: has {path} in it, which lies outside; expected names below a folder")
            size = sum(info.file_size for info in files)  # no more is unpacked of a file, whatever it holds
            if len(files) > most_files or size > most_bytes:
                found = f"{len(files)} files of {size / 1e6:.0f} MB in all"
                raise InputError(f"{archive}: {found}, at most {most_files} of {most_bytes / 1e6:.0f} MB are unpacked")
            opened.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{archive}: cannot be unpacked ({reason(error)}); expected a zip without a password"
        ) from None


def digest(paths):
    """Returns: a sha256, as text, of files, and of all files below folders but .md: their names and contents."""
    total = hashlib.sha256()
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".md") if path.is_dir() else [path]
        for file in files:
            total.update(str(file.relative_to(path.parent)).encode(errors="surrogateescape"))
            with open(file, "rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()
