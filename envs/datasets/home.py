"""The data home: where the files of data sets lie, and whether they are what was fetched."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from etpo.envs.datasets.catalog import DatasetError, find_name


def data_home() -> Path:
    """`ETPO_DATA_HOME`, else `etpo/data` in the user's cache folder. DatasetError where there is no home."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(os.environ.get("ETPO_DATA_HOME") or f"{cache}/etpo/data").expanduser()
    except RuntimeError as error:
        raise DatasetError(
            "expected a home folder for data sets, got a user without one; set ETPO_DATA_HOME to a folder"
        ) from error


def find_file(name: str, home: Path | None = None) -> Path | None:
    """The only CSV file in `<home>/<name>` (`-` and `_` alike), or None where there is none.

    Raises:
        UnknownDataset: no data set has this name.
        DatasetError: there are several files, or the file is not the one that was fetched.
    """
    name, home = find_name(name), home or data_home()
    for folder in dict.fromkeys(home / spelled for spelled in (name, *_spellings(name))):
        files = sorted(folder.glob("*.csv"))
        if len(files) > 1:
            raise DatasetError(f"{folder} holds {len(files)} CSV files; keep only the table with the target")
        if files:
            check_file(files[0])
            return files[0]
    return None


def _spellings(name: str) -> tuple[str, str]:
    return name.replace("-", "_"), name.replace("_", "-")


def record_of(file: Path) -> Path:
    """The small JSON file beside a fetched file that says what it was when it came."""
    return file.with_name(file.name + ".json")


def check_file(file: Path) -> bool:
    """True where the file is the one that was fetched, False where no record says what it was.

    Raises:
        DatasetError: it has changed since, or the record cannot be read.
    """
    record = record_of(file)
    if not record.is_file():
        return False
    again = f"delete {file} to have it fetched again"
    try:
        expected = str(json.loads(record.read_text(encoding="utf-8"))["sha256"])
        found = sha256_of(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{record}: expected the checksum of {file.name}, got {error}; {again}") from error
    if found != expected:
        raise DatasetError(
            f"{file} has changed since it was fetched: expected SHA-256 {expected[:12]}…, got {found[:12]}…; "
            f"{again}, or delete {record.name} to use it as it is"
        )
    return True


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def keep(table: pd.DataFrame | Path, name: str, source: str, home: Path | None = None) -> Path:
    """Put a fetched table (or CSV file) in the data home, whole or not at all; returns its path.

    Raises:
        DatasetError: the data home cannot be written.
    """
    target = (home or data_home()) / name / f"{name}.csv"
    try:
        with scratch_folder(home) as scratch:
            partial = scratch / target.name
            if isinstance(table, Path):
                shutil.copyfile(table, partial)
            else:
                table.to_csv(partial, index=False)
            record = {
                "file": target.name,
                "sha256": sha256_of(partial),
                "source": source,
                "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            target.parent.mkdir(parents=True, exist_ok=True)
            record_of(partial).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            # A stop between the two leaves a file without a record, or with an old one that does not fit.
            target.unlink(missing_ok=True)
            os.replace(record_of(partial), record_of(target))
            os.replace(partial, target)
    except OSError as error:
        raise DatasetError(
            f"data set {name} cannot be kept in {target.parent} ({error.strerror}); set ETPO_DATA_HOME to a "
            "folder that can be written"
        ) from error
    return target


@contextlib.contextmanager
def scratch_folder(home: Path | None = None) -> Iterator[Path]:
    """A folder inside the data home, so that what is in it can be moved into place; removed afterwards."""
    home = home or data_home()
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=home) as folder:
        yield Path(folder)
