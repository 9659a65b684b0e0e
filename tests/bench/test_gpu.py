"""`etpo bench gpu` on a CPU: every step on tiny shapes, written after every case."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from etpo.bench import gpu, tune
from etpo.bench.kernels import measure
from etpo.bench.kernels.cases import FUNCTIONS
from etpo.cli.main import main
from etpo.kernels.triton.measured import ROUTES

pytest.importorskip("triton")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No processes started; two functions, and one round of a route."""
    monkeypatch.setattr("etpo.bench.kernels.output.import_seconds", lambda: 0.05)
    some = {name: FUNCTIONS[name] for name in ("linear_kl", "logprob_from_logits")}
    monkeypatch.setattr(gpu, "FUNCTIONS", some)
    monkeypatch.setattr(
        gpu, "timed_cases", lambda sizes, *_: [gpu.Case(some["linear_kl"], sizes.timed, 4, True, *_)]
    )


def test_all_steps_on_a_cpu(tmp_path: Path):
    out = tmp_path / "gpu.json"
    result = CliRunner().invoke(
        main, ["bench", "gpu", "--minutes", "5", "--json", str(out), "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["is_right"]
    assert found["skipped"] == []
    assert {entry["function"] for entry in found["correctness"]} == {"linear_kl", "logprob_from_logits"}
    assert {entry["dtype"] for entry in found["correctness"]} == {"bfloat16", "float32"}
    assert all(entry["error_gradient"] > 0 for entry in found["correctness"])
    assert set(found["routes"]) == {
        f"{kind}, {heads}" for kind in tune.KINDS for heads in ("frozen", "trained")
    }
    assert set(found["routes"].values()) <= set(ROUTES)
    names = {row["contestant"] for row in found["rows"] if row["why_not"] is None}
    assert {"eager", "etpo chunked", "bare products"} <= names
    assert found["engine"]["drawn_tokens"] > 0
    assert found["engine"]["update_s"] > 0


def test_it_is_written_after_every_case_and_what_the_time_does_not_allow_is_named():
    saved: list[dict] = []
    found = gpu.run(1e-9, CPU, lambda line: None, lambda text: saved.append(json.loads(text)))
    numbers = [len(one["correctness"]) for one in saved]
    assert numbers[: numbers[-1]] == list(range(1, numbers[-1] + 1))
    assert found.skipped == ["times of linear_kl, trained head", "engine"]
    assert found.routes == {}


def test_what_is_not_exact_is_called_wrong(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(measure, "errors_of", lambda *_, **__: (1e-6, 4e-3))
    entries = list(gpu.correctness(gpu.ON_A_CPU, CPU))
    assert not any(entry["right"] for entry in entries)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(measure, "errors_of", broken)
    out = tmp_path / "gpu.json"
    words = ["bench", "gpu", "--minutes", "1e-9", "--json", str(out), "--device", "cpu"]
    assert CliRunner().invoke(main, words).exit_code == 1
    assert json.loads(out.read_text())["correctness"][0]["failure"] == "RuntimeError: no such kernel"
