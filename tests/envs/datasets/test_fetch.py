"""The real openml and kagglehub clients against a server on this machine, and the data home."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from etpo.envs.datasets import DatasetError, file_of, home, load_dataset
from etpo.envs.datasets.fetch import fetch
from tests.envs.loopback import PHARYNGITIS, TRAIN, Loopback


@pytest.fixture(scope="module")
def loopback():
    with Loopback() as server:
        yield server


@pytest.fixture
def server(loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loopback:
    """The server, with both clients sent to it, their own caches out of the way, and no waiting."""
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "KAGGLEHUB_CACHE", "OPENML_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "user"))
    monkeypatch.setenv("ETPO_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
    monkeypatch.setenv("KAGGLE_API_TOKEN", "a-token")
    import openml
    from kagglesdk import kaggle_env

    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.TEST, loopback.url)
    monkeypatch.setattr(openml.config, "server", f"{loopback.url}/api/v1/xml")
    monkeypatch.setattr(openml._api_calls, "_human_delay", lambda n: 0.0)
    loopback.fault, loopback.seen = "none", []
    return loopback


def everything_in(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_openml_s_table_is_fetched_once_and_kept_with_its_checksum(server, tmp_path):
    data = load_dataset("credit-g")
    assert data.feature_names == ("status", "other_parties", "age")
    assert data.class_names == ("bad", "good")
    assert data.x[:, 1].tolist() == [1, 0, 1]  # "none" is a value, not a gap; the row with a gap is dropped
    assert data.x[:, 2].tolist() == [67, 22, 45.5]
    assert data.source == "OpenML 31"
    file = tmp_path / "home" / "credit-g" / "credit-g.csv"
    kept = ["credit-g", f"credit-g/{file.name}", f"credit-g/{file.name}.json"]
    assert everything_in(tmp_path / "home") == kept
    record = json.loads((file.parent / f"{file.name}.json").read_text())
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["source"] == "OpenML 31"
    n_requests = len(server.seen)
    assert n_requests == 2
    assert (load_dataset("credit_g").x == data.x).all()
    assert len(server.seen) == n_requests


def test_kaggle_s_data_set_is_fetched_as_it_is(server, tmp_path, capfd):
    file = file_of("pharyngitis")
    assert file == tmp_path / "home" / "pharyngitis" / "pharyngitis.csv"
    assert file.read_bytes() == PHARYNGITIS
    assert load_dataset("pharyngitis").x.tolist() == [[3.5], [4.5], [6.0]]
    assert server.seen[0][2]["Authorization"] == "Bearer a-token"
    assert "".join(capfd.readouterr()) == ""


def test_of_a_competition_s_files_the_table_with_the_features_is_taken(server):
    assert file_of("kidney-stone").read_bytes() == TRAIN


def test_a_competition_without_a_token_says_what_it_needs(server, monkeypatch):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with pytest.raises(DatasetError, match="set KAGGLE_API_TOKEN, and accept the competition's rules"):
        file_of("spaceship-titanic")


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("credit-g", "404", "Unknown dataset"),
        ("credit-g", "503", "status 503"),
        ("credit-g", "cut", "the connection was cut"),
        ("credit-g", "checksum", "checksum of what came is wrong"),
        ("pharyngitis", "404", "status 404"),
        ("pharyngitis", "503", "status 503"),
        ("pharyngitis", "cut", "the connection was cut"),
        ("pharyngitis", "checksum", "checksum of what came is wrong"),
        ("pharyngitis", "no such column", "no CSV file with the column 'radt'"),
        ("kidney-stone", "cut", "the connection was cut"),
    ],
)
def test_what_goes_wrong_is_one_line_and_leaves_no_file(server, tmp_path, name, fault, said):
    server.fault = fault
    with pytest.raises(DatasetError) as caught:
        file_of(name)
    line = str(caught.value)
    assert said in line
    assert "\n" not in line
    assert str(tmp_path / "home" / name) in line
    assert line.endswith(f"or use {name}:synthetic, a generated twin")
    assert everything_in(tmp_path / "home") == []
    server.fault = "none"
    assert file_of(name).is_file()


def test_without_a_connection_it_says_so(server, monkeypatch):
    import openml
    from kagglesdk import kaggle_env

    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.TEST, "http://localhost:9")
    monkeypatch.setattr(openml.config, "server", "http://localhost:9/api/v1/xml")
    for name, said in (("pharyngitis", "no connection to Kaggle"), ("credit-g", "no connection to OpenML")):
        with pytest.raises(DatasetError, match=said):
            file_of(name)


def test_the_clients_settings_are_as_before(server):
    from openml import config

    before = (config.connection_n_retries, config._root_cache_directory, dict(os.environ))
    file_of("credit-g")
    server.fault = "404"
    with pytest.raises(DatasetError):
        fetch("credit-g")
    assert before == (config.connection_n_retries, config._root_cache_directory, dict(os.environ))


def test_a_file_that_changed_is_refused_and_can_be_had_again(server):
    file = file_of("pharyngitis")
    file.write_bytes(PHARYNGITIS.replace(b"3.5", b"3.6"))
    with pytest.raises(DatasetError, match=r"changed since it was fetched: expected SHA-256 \w{12}…, got"):
        load_dataset("pharyngitis")
    assert fetch("pharyngitis").read_bytes() == PHARYNGITIS
    assert load_dataset("pharyngitis").x[0, 0] == 3.5
    home.record_of(file).write_text("{}")
    with pytest.raises(DatasetError, match="expected the checksum of pharyngitis"):
        load_dataset("pharyngitis")


def test_a_failed_second_fetch_leaves_the_first_file(server):
    file = file_of("pharyngitis")
    server.fault = "checksum"
    with pytest.raises(DatasetError):
        fetch("pharyngitis")
    assert file.read_bytes() == PHARYNGITIS
    assert home.check_file(file)


def test_a_data_home_that_cannot_be_written_is_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ETPO_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(DatasetError, match=r"File exists|Not a directory"):
        file_of("pharyngitis")


def test_data_check_tells_whole_files_from_changed_ones(server, tmp_path):
    from click.testing import CliRunner

    from etpo.cli.main import main

    assert CliRunner().invoke(main, ["data", "get", "pharyngitis"]).exit_code == 0
    (tmp_path / "home" / "kidney_stone").mkdir()
    (tmp_path / "home" / "kidney_stone" / "mine.csv").write_bytes(TRAIN)
    whole = CliRunner().invoke(main, ["data", "check", "pharyngitis", "kidney-stone", "tic-tac-toe"])
    assert whole.exit_code == 0, whole.output
    assert "pharyngitis: checksum right; 3 rows, 1 features, classes 0 1, 1 2" in whole.stdout
    assert "kidney-stone: no checksum recorded; 2 rows" in whole.stdout
    assert "tic-tac-toe: built in; 958 rows, 9 features, classes negative 332, positive 626" in whole.stdout
    (tmp_path / "home" / "pharyngitis" / "pharyngitis.csv").write_bytes(TRAIN)
    changed = CliRunner().invoke(main, ["data", "check"])
    assert changed.exit_code == 1
    assert "pharyngitis.csv has changed since it was fetched" in changed.stdout
    assert "airlines: not here" in changed.stdout
    listed = CliRunner().invoke(main, ["data", "list"]).stdout
    assert [line.split()[2] for line in listed.splitlines() if line.startswith("pharyngitis")] == ["damaged"]
