"""Fetches tables from OpenML with its own client, which checks the file's MD5."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

TRIES = 3


def fetch_openml(number: int, scratch: Path) -> pd.DataFrame:
    """The table of an OpenML id with all its columns, the target among them.

    Args:
        number: OpenML's id of the data set.
        scratch: folder for the client's own files, which are of no use afterwards.

    Raises:
        ConnectionError: one line that says what went wrong.
    """
    import openml

    try:
        with _client_settings(scratch):
            data = openml.datasets.get_dataset(
                number, download_data=True, download_qualities=False, download_features_meta_data=False
            )
            table, *_ = data.get_data()
    except Exception as error:  # the client lets through what requests, xmltodict, liac-arff and it raise
        raise ConnectionError(_reason(error)) from error
    return table


@contextlib.contextmanager
def _client_settings(scratch: Path) -> Iterator[None]:
    """Few tries, a cache of our own, and the ARFF file: of the Parquet file OpenML has no checksum."""
    import openml

    before = {name: getattr(openml.config, name) for name in ("retry_policy", "connection_n_retries")}
    cache, parquet = openml.config._root_cache_directory, os.environ.get("OPENML_SKIP_PARQUET")
    openml.config.set_retry_policy("human", TRIES)
    openml.config.set_root_cache_directory(scratch)
    os.environ["OPENML_SKIP_PARQUET"] = "true"
    try:
        yield
    finally:
        openml.config.set_retry_policy(before["retry_policy"], before["connection_n_retries"])
        openml.config.set_root_cache_directory(cache)
        if parquet is None:
            del os.environ["OPENML_SKIP_PARQUET"]
        else:
            os.environ["OPENML_SKIP_PARQUET"] = parquet


def _reason(error: Exception) -> str:
    import openml
    import requests

    if isinstance(error, openml.exceptions.OpenMLHashException):
        return "the checksum of what came is wrong"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was cut"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "no connection to OpenML"
    status = re.search(r"Status code: (\d+)", str(error))
    if status:
        return f"the server answered with status {status[1]}"
    message = " ".join(str(getattr(error, "message", error)).split())
    return f"{type(error).__name__}: {message[:160]}"
