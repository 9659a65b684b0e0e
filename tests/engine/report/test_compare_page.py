"""Several runs on one page, the command that writes it, and the page that follows a run."""

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from etpo.cli.main import main
from etpo.engine.report.compare import comparison, comparison_page, grouped, interval_of, load_runs
from etpo.engine.report.live import server_of
from etpo.engine.run_folder import RunFolder
from tests.engine.report.test_browser import run_of


def runs(path: Path) -> list[RunFolder]:
    return [
        run_of(path / f"{algo}-{beta}-{seed}", 60, seed, algo=algo, beta=beta)
        for algo, beta in (("etpo", 0.1), ("etpo", 0.2), ("rloo", 0.1)) for seed in range(3)
    ]  # fmt: skip


def test_interval_of_is_students_t():
    found = interval_of([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high == pytest.approx(2.0 + 4.302653 / 3**0.5)
    assert found.low == pytest.approx(2.0 - 4.302653 / 3**0.5)
    assert interval_of([5.0]).low is None


def test_runs_are_grouped_by_what_tells_them_apart(tmp_path):
    groups = grouped(load_runs(runs(tmp_path)))
    assert [(g.name, len(g.runs)) for g in groups] == [
        ("etpo, beta 0.1", 3), ("etpo, beta 0.2", 3), ("rloo, beta 0.1", 3),
    ]  # fmt: skip
    page = comparison_page(runs(tmp_path / "again"))
    assert page.count('<polygon class="band') == 12  # four curves, three groups
    assert "<code>beta</code>" in page
    assert "<code>seed</code>" not in page
    assert "<code>temperature</code>" not in page


def test_the_numbers_of_a_group_are_those_of_its_runs(tmp_path):
    found = comparison(runs(tmp_path)[:3])
    (group,) = found["groups"]
    mean = group["reward, last 30"]["mean"]
    assert mean == pytest.approx(sum(run["reward, last 30"] for run in found["runs"]) / 3)
    assert group["blame"][-1]["n"] == 27
    assert group["blame"][-1]["on_line"] == pytest.approx(4 / 9)
    blame = found["runs"][0]["blame"]
    assert blame[-1] == {
        "first": 1, "last": 60, "n": 9, "on_line": 4 / 9, "on_line_update": 2 / 9, "by_chance": 3 / 9,
    }  # fmt: skip


def test_report_writes_the_page_of_a_run_that_was_cut_and_of_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [str(folder.path) for folder in runs(tmp_path)[:4]]
    cli = CliRunner()
    assert cli.invoke(main, ["report", folders[0]]).exit_code == 0
    assert "etpo on tic-tac-toe" in Path(folders[0], "report.html").read_text()
    done = cli.invoke(main, ["report", *folders])
    assert done.output == "Report: compare.html\n"
    assert json.loads(cli.invoke(main, ["report", *folders, "--json"]).output)["groups"]
    assert cli.invoke(main, ["report", str(tmp_path / "nowhere")]).exit_code == 1


def test_watch_serves_the_newest_page_to_this_machine_alone(tmp_path):
    folder = run_of(tmp_path / "run", 40, steps_in_all=100)
    server = server_of(folder, 0)
    assert server.server_address[0] == "127.0.0.1"
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def get(path: str, **headers: str) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", headers=headers)
        return urllib.request.urlopen(request, timeout=20).read().decode()

    try:
        version, page = get("/version"), get("/")
        assert f'data-live="{version}"' in page
        assert "This run goes on: 40 of 100 programs so far." in page
        folder.programs_file.open("a").write(folder.programs_file.read_text().splitlines()[-1] + "\n")
        assert get("/version") != version
        assert "41 of 100" in get("/")
        for path, host in (("/", "evil.example"), ("/../config.toml", "localhost")):
            with pytest.raises(urllib.error.HTTPError):
                get(path, Host=host)
    finally:
        server.shutdown()
        server.server_close()
