"""Files that are whole or not there: atomic writing, JSON and JSON Lines, hashes.

A stage may be killed at any moment. Whatever it wrote in one piece goes through `atomic_write`, so that a reader meets the old
file or the new one; what it writes row by row (`append_jsonl`) can be cut only in its last line, which `read_jsonl_prefix`
drops before the stage goes on.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import xxhash

_HASH_CHUNK = 1 << 22
_TEMPORARY = ".tmp"
# Half of a surrogate pair, which a cut completion can hold, has no UTF-8; as `\ud83d` it is what JSON itself writes for it.
_SURROGATES = "backslashreplace"


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that takes its name only when the block ends without an error.

    The data goes to a temporary file in the same folder, is flushed to the disk, and is then renamed over `path`. If the block
    raises, the temporary file is removed and whatever stood at `path` is untouched. Missing parent folders are made.

    Args:
        path: The file to write.
        mode: `"w"` for UTF-8 text with `\\n` line ends, `"wb"` for bytes.

    Yields:
        The open temporary file.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write takes mode 'w' or 'wb', found {mode!r}.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {"encoding": "utf-8", "errors": _SURROGATES, "newline": "\n"} if mode == "w" else {}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
    try:
        with _naming(path), os.fdopen(descriptor, mode, **text) as handle:  # type: ignore[call-overload]
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except BaseException:  # also Ctrl-C: nothing half written stays behind, and the error goes on to whoever asked
        Path(temporary).unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def remove_torn(folder: str | os.PathLike[str], name: str = "*") -> None:
    """Remove the temporary files, below a folder, of `atomic_write`s of files called `name` that were killed."""
    for left_over in Path(folder).rglob(f".{name}.*{_TEMPORARY}"):
        left_over.unlink()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as indented JSON, atomically. NaN and infinities are refused: they are not JSON."""
    with atomic_write(path) as handle:
        json.dump(value, handle, indent=2, ensure_ascii=False, allow_nan=False)
        handle.write("\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON, with the file and the line.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from None


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON Lines, atomically.

    Returns:
        The number of rows.
    """
    count = 0
    with atomic_write(path) as handle:
        for row in rows:
            handle.write(_to_line(row))
            count += 1
    return count


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Read rows of JSON Lines one by one; blank lines are passed over.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not a JSON object, with the file and the line.
    """
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield _parse_line(line, path, number)


def append_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Append rows to a JSON Lines file and flush them to the disk.

    Not atomic: a kill may leave the last line torn. Call `read_jsonl_prefix` before the first append of a resumed stage.

    Returns:
        The number of rows.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with _naming(path), open(path, "a", encoding="utf-8", errors=_SURROGATES, newline="\n") as handle:
        for row in rows:
            handle.write(_to_line(row))
            count += 1
        handle.flush()
        os.fsync(handle.fileno())
    return count


def read_jsonl_prefix(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the whole lines of a file that a killed stage may have left torn, and cut the torn rest off.

    Only the last line can be torn, so anything wrong before it is an error.

    Returns:
        The rows; none if there is no such file.

    Raises:
        ValueError: If a line that is not the last is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    whole_bytes = 0
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.endswith(b"\n"):
                break
            if line.strip():
                rows.append(_parse_line(line, path, number))
            whole_bytes += len(line)
    if whole_bytes < path.stat().st_size:
        with open(path, "r+b") as handle:
            handle.truncate(whole_bytes)
            handle.flush()
            os.fsync(handle.fileno())
    return rows


def flush_to_disk(path: str | os.PathLike[str]) -> None:
    """Make a file that a library has written last through a power cut; tells of an error that its writing did not."""
    with open(path, "r+b") as handle:
        os.fsync(handle.fileno())


def hash_path(path: str | os.PathLike[str], *, exclude: Collection[str] = ()) -> str:
    """The xxh3-128 hash of a file's bytes, or of a folder's file names and bytes, as 32 hex digits.

    Hidden files and `__pycache__` inside a folder do not count. Two folders with the same files have the same hash, wherever
    they lie and whenever they were written.

    Args:
        path: A file or a folder.
        exclude: Names directly inside the folder that do not count either.

    Raises:
        FileNotFoundError: If there is no such file or folder.
    """
    path = Path(path)
    digest = xxhash.xxh3_128()
    if not path.is_dir():
        _update_from_file(digest, path)
        return digest.hexdigest()
    for file in sorted(path.rglob("*"), key=lambda p: p.relative_to(path).as_posix()):
        parts = file.relative_to(path).parts
        if (
            file.is_file()
            and not any(part.startswith(".") or part == "__pycache__" for part in parts)
            and parts[0] not in exclude
        ):
            # The hash of each file, not its bytes, goes in: so a byte cannot move from one file to the next unseen.
            content = xxhash.xxh3_128()
            _update_from_file(content, file)
            digest.update(f"{'/'.join(parts)}\0{content.hexdigest()}\n".encode())
    return digest.hexdigest()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an error of the system say which file it is about: of a full disk it does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _to_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _parse_line(line: bytes, path: str | os.PathLike[str], number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(f"{path}, line {number}: not JSON ({error}).") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}.")
    return row


def _update_from_file(digest: xxhash.xxh3_128, path: Path) -> None:
    with open(path, "rb") as handle:
        while chunk := handle.read(_HASH_CHUNK):
            digest.update(chunk)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota on this disk is used up",
    errno.EFBIG: "files may not grow so large here (`ulimit -f` shows the limit)",
}
_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors
_TORCH = re.compile(
    r"iostream error|PytorchStreamWriter|inline_container.*unexpected pos"
)  # torch.save tells no reason


class DiskFullError(ValueError):
    """Something could not be written for want of room; the message says what, where, how much is free, and what to do."""


def explain_full_disk(
    error: BaseException, folder: str | os.PathLike[str], kept: Callable[[], str] = lambda: "What was made is kept."
) -> DiskFullError | None:
    """The error to raise in place of one that comes of a full disk, a quota or a limit for files; `None` for any other.

    Args:
        error: What was raised. What it was raised from counts too.
        folder: Where the work that failed writes.
        kept: Says in a sentence what is kept; asked only if it is a full disk.
    """
    if isinstance(error, DiskFullError) or not isinstance(error, Exception):
        return None
    for cause in _chain(error):
        reason = _reason(cause)
        if reason is not None:
            file = getattr(cause, "filename", None)
            free = "; ".join(_free(Path(place)) for place in ([Path(file).parent] if file else _places(folder)))
            return DiskFullError(
                f"{file or f'A file for {folder}'} could not be written: {reason} ({free}). {kept()} "
                f"Make room, or move {folder} to another disk and give its new place as output_dir."
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        return _REASONS.get(error.errno or 0)
    if rust := _RUST.search(str(error)):
        return _REASONS.get(int(rust[1]))
    return "writing it broke off, as on a full disk" if _TORCH.search(str(error)) else None


def _places(folder: str | os.PathLike[str]) -> list[Path]:
    """Where a library may have written that does not say where, one place per disk."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    places = [place for place in (Path(folder), cache, Path(tempfile.gettempdir())) if place.exists()]
    return list({place.stat().st_dev: place for place in reversed(places)}.values())[::-1]


def _free(place: Path) -> str:
    return f"{shutil.disk_usage(place).free / 1e6:,.1f} MB free at {place}"


Key = TypeVar("Key", bound=Hashable)
Row = dict[str, Any]


class RankFiles(Generic[Key]):
    """The rows of one stage under construction.

    Args:
        path: The final file, such as `runs/x/generate/traces.jsonl`.
        key: What makes a row the same row, such as its problem and sample.
        rank: Number of this process.
    """

    def __init__(self, path: str | os.PathLike[str], key: Callable[[Mapping[str, Any]], Key], rank: int = 0) -> None:
        self.path = Path(path)
        self.key = key
        self.own_path = self._rank_path(str(rank))

    def repair(self) -> None:
        """Drop lines that a kill has torn. To be called by one rank, before any rank reads."""
        for path in self._rank_paths():
            read_jsonl_prefix(path)

    def read(self) -> dict[Key, Row]:
        """All rows made so far, by any rank, in this run or an earlier one."""
        paths = [path for path in (self.path, *self._rank_paths()) if path.exists()]
        return {self.key(row): row for path in paths for row in read_jsonl(path)}

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to this rank's file and flush them to the disk."""
        append_jsonl(self.own_path, rows)

    def merge(self, order: Iterable[Key]) -> list[Row]:
        """Write the final file and remove the rank files. To be called by one rank, after all have ended.

        Args:
            order: Keys in the order of the final file; rows that it does not name are left out, and keys without a row too.

        Returns:
            The rows of the final file.
        """
        rows = self.read()
        ordered = [rows[key] for key in order if key in rows]
        write_jsonl(self.path, ordered)
        for path in self._rank_paths():
            path.unlink()
        return ordered

    def _rank_path(self, rank: str) -> Path:
        return self.path.with_suffix(f".rank{rank}{self.path.suffix}")

    def _rank_paths(self) -> list[Path]:
        return sorted(self.path.parent.glob(self._rank_path("*").name))
