"""A folder that appears whole or not at all: written beside its place, synced, then renamed."""

import contextlib
import glob
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import ConversionError

_log = logging.getLogger(__name__)


def check_destination(dst: Path, sources: Sequence[Path]) -> None:
    """ConversionError unless `dst` can be made: it is not there, its parent is, and it lies in no source."""
    if os.path.lexists(dst):
        raise ConversionError(
            f"DST: expected a path where nothing is, got {dst}, which exists; choose another or move it"
        )
    if not dst.parent.is_dir():
        raise ConversionError(f"DST: expected its parent to be a folder, got {dst.parent}, which is not; make it first")
    place = dst.parent.resolve() / dst.name
    for source in sources:
        if place.is_relative_to(source.resolve()):
            raise ConversionError(f"DST: expected a place outside {source}, which is only read, got {dst}")


def check_space(dst: Path, needed: int) -> None:
    """ConversionError when the file system has less than `needed` bytes left."""
    free = shutil.disk_usage(dst.parent).free
    if free < needed:
        raise ConversionError(
            f"DST: expected {needed / 1e9:.2f} GB free at {dst.parent}, got {free / 1e9:.2f} GB; "
            "free some or choose another disk"
        )


@contextlib.contextmanager
def whole_folder(dst: Path) -> Iterator[Path]:
    """A new folder beside `dst` to write into; it becomes `dst` when the block ends, and vanishes when it fails.

    What a killed run has left is named, and not touched: it may be that of a run at work.
    """
    for left in sorted(dst.parent.glob(f".{glob.escape(dst.name)}.*.partial")):
        _log.warning("convert: %s was left by another run; remove it unless that one is still at work", left)
    partial = dst.parent / f".{dst.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir()
        yield partial
        _sync(partial)
        check_destination(dst, [])  # somebody else may have been faster
        partial.rename(dst)
        _sync_entry(dst.parent)
    except OSError as error:
        raise ConversionError(
            f"DST: could not write {dst}: {error.strerror or error}; nothing is left there, make room or choose another"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
