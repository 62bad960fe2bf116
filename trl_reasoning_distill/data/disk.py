"""A disk that is full: whoever noticed it, Python, Rust, Arrow or torch, and each in words of its own, it becomes one error."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

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
