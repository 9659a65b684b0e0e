"""Fetches tables from Kaggle with its own client, kagglehub, which checks the file's MD5."""

import contextlib
import io
import logging
from pathlib import Path

import pandas as pd


def fetch_kaggle(handle: str, target: str, scratch: Path) -> Path:
    """Download a Kaggle data set or competition; returns its CSV file with the target, in `scratch`.

    Args:
        handle: `owner/name`, or a competition's name. Competitions need the user's own token.
        target: a column of the table that is wanted; of several such tables the widest is taken
            (competitions come with a sample of a submission).
        scratch: an empty folder for all that comes.

    Raises:
        ConnectionError: one line that says what went wrong.
    """
    import kagglehub

    logger = logging.getLogger("kagglehub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    download = kagglehub.dataset_download if "/" in handle else kagglehub.competition_download
    try:
        # The client reports progress on both; an error is to be the only line.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            folder = Path(download(handle, output_dir=str(scratch)))
    except Exception as error:  # the client lets through what requests, zipfile and it raise
        raise ConnectionError(_reason(error, handle)) from error
    finally:
        logger.setLevel(level)
    widths = {}
    for file in sorted(folder.rglob("*.csv")):
        with contextlib.suppress(OSError, ValueError):
            columns = pd.read_csv(file, nrows=0).columns
            if target in columns:
                widths[file] = len(columns)
    if not widths:
        raise ConnectionError(f"what came holds no CSV file with the column {target!r}")
    return max(widths, key=lambda file: widths[file])


def _reason(error: Exception, handle: str) -> str:
    import requests
    from kagglehub.exceptions import DataCorruptionError, UnauthenticatedError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, UnauthenticatedError) or status in (401, 403):
        rules = "" if "/" in handle else ", and accept the competition's rules on its page"
        return f"it needs your token: set KAGGLE_API_TOKEN{rules}"
    if isinstance(error, DataCorruptionError):
        return "the checksum of what came is wrong"
    if status is not None:
        return f"the server answered with status {status}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was cut"
    if isinstance(error, requests.exceptions.RequestException):
        return "no connection to Kaggle"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
