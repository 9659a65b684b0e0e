"""`etpo perplexity`, on a run of a tiny model."""

import json
from pathlib import Path


def test_prints_both_models_and_refuses_bad_input_in_one_line(cli, tmp_path: Path, quick: list[str]) -> None:
    out = tmp_path / "run"
    trained = cli("train", *quick, "--algo", "reflection", "--steps", "8", "--out", out)
    assert trained.exit_code == 0
    told = cli("perplexity", out, "--json", tmp_path / "p.json")
    assert told.exit_code == 0
    assert "English prose" in told.stdout
    assert told.stdout.count("+0.0%") == 3  # nothing was learned
    record = json.loads((tmp_path / "p.json").read_text())
    assert [one["text"] for one in record["texts"]] == ["English prose", "Python code", "table description"]
    assert record["texts"][0]["reference"] == record["texts"][0]["policy"]
    (tmp_path / "own.txt").write_text("Some words.")
    assert "own.txt" in cli("perplexity", out, "--text", tmp_path / "own.txt").stdout
    for words in ([out, "--text", tmp_path / "absent.txt"], [tmp_path / "nowhere"]):
        bad = cli("perplexity", *words)
        assert bad.exit_code == 1
        assert bad.stderr.startswith("Error: ")
        assert bad.stderr.count("\n") == 1
