"""The protocol of a comparison, on a fake trainer that writes a run's folder at once."""

import json
import sys
from pathlib import Path

import pytest

from etpo.bench import compare as protocol
from etpo.bench.compare import Plan, compare
from etpo.bench.compare_output import to_json, to_markdown, to_svg
from etpo.bench.compare_results import read_result
from etpo.bench.compare_runs import Case, ComparisonError, Runs, Usage, usage_of, write_readme
from etpo.bench.compare_tuning import FAILED, GRIDS, Trial, best, drawn, grid_of
from etpo.bench.compare_variants import ABLATIONS, ablation, setting_of, variant, variants, words_of
from etpo.engine.learners import ALGORITHMS

# Reward rises with the step size, falls with β, and shifts with the seed; KL rises as it does.
TRAINER = """
import json, sys, time
from pathlib import Path
words = sys.argv[2:]
if words[0] == "--resume":
    out = Path(words[1])
    given = json.loads((out / "given.json").read_text())
else:
    given = dict(zip(words[::2], words[1::2]))
    out = Path(given["--out"])
    out.mkdir(parents=True)
    (out / "given.json").write_text(json.dumps(given))
    names = {"--dataset": str, "--algo": str, "--seed": int, "--steps": int, "--lr": float, "--beta": float,
             "--max-kl-update": float, "--critic-lr": float, "--clip-norm": float}
    toml = [f"{k[2:].replace('-', '_')} = {json.dumps(names[k](v))}" for k, v in given.items() if k in names]
    (out / "config.toml").write_text("\\n".join([*toml, f'out = "{out}"']) + "\\n")
if given.get("--lr") == "13.0":
    print("the weights are not finite")
    sys.exit(1)
(out / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
steps, seed = int(given["--steps"]), int(given["--seed"])
beta = float(given.get("--beta", 0.1))
end = float(given.get("--lr", 0.1)) - 0.3 * beta
with open(out / "programs.jsonl", "w") as programs, open(out / "metrics.jsonl", "w") as metrics:
    for i in range(0, steps, 4):
        reward = end * (i + 4) / steps + 0.01 * (seed % 5) * (1 + beta)
        for j in range(4):
            p = {"step": i + j + 1, "reward": reward, "outcome": "ok", "auc_mean": reward, "auc_std": 0.0,
                 "error": None, "text": "return 1"}
            programs.write(json.dumps(p) + "\\n")
        m = {"step": i + 4, "reward_mean": reward, "kl_ref": 2 * end * i / steps, "wall_s": float(i + 4)}
        metrics.write(json.dumps(m) + "\\n")
"""


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    file = tmp_path / "trainer.py"
    file.write_text(TRAINER)
    return Runs(tmp_path / "work", jobs=2, command=(sys.executable, "-S", str(file)))


@pytest.fixture
def plan() -> Plan:
    return Plan(variants(["etpo", "etpo:beta=0.5"]), "wine", 16, n_seeds=3, n_tune=6)


def test_words_name_algorithms_with_options():
    word = variant("etpo:beta=0.3:reflection=false")
    assert word.settings == (("beta", 0.3), ("reflection", False))
    assert words_of(word.settings) == ["--beta", "0.3", "--no-reflection"]
    assert word.slug == "etpo-beta=0.3-reflection=False"
    assert setting_of("--max-kl-update=0.05") == ("max_kl_update", 0.05)
    for bad, told in [
        ("eptpo", "expected an algorithm .* got 'eptpo'; did you mean|expected an algorithm"),
        ("etpo:bta=1", "expected an option .* got 'bta'"),
        ("etpo:beta=much", "--beta: expected float, got 'much'"),
        ("etpo:beta", "expected OPTION=VALUE, got 'beta'"),
        ("etpo:seed=1", "expected an option"),
    ]:
        with pytest.raises(ValueError, match=told):
            variant(bad)
    with pytest.raises(ValueError, match="got none"):
        variants([])
    assert [v.name for v in variants(["etpo", "etpo"])] == ["etpo"]


def test_every_ablation_can_be_run():
    for name in ABLATIONS:
        words = ablation(name)
        assert len(words) > 1
        for word in words:
            if word.partition(":")[0] in ALGORITHMS:
                variant(word)
    with pytest.raises(ValueError, match="expected an ablation"):
        ablation("gama")


def test_every_grid_has_as_many_settings_and_tuning_seeds_are_never_reported():
    assert {len(grid) for grid in GRIDS.values()} == {6}
    for grid in GRIDS.values():
        assert len(set(grid)) == 6
    first = drawn(variant("etpo"), 8)
    assert first == drawn(variant("etpo"), 8)
    assert [seed for _, seed in first] == [100] * 6 + [101] * 2
    assert {settings for settings, _ in first[:6]} == set(grid_of("etpo"))
    with pytest.raises(ValueError, match="step sizes"):
        grid_of("reflection")


def test_the_best_setting_is_that_of_the_seeds_that_all_have_met():
    a, b = (("lr", 0.1),), (("lr", 0.5),)
    trials = [Trial(a, 100, 0.5, 0.0), Trial(b, 100, 0.4, 0.0), Trial(b, 101, 0.9, 0.0)]
    assert best(trials) == a
    assert best([*trials, Trial(a, 101, 0.1, 0.0)]) == b
    assert best([Trial(a, 100, FAILED, None, "died"), Trial(b, 100, -0.9, 0.0)]) == b
    with pytest.raises(ValueError, match="died"):
        best([Trial(a, 100, FAILED, None, "died")])


def test_tunes_alike_pairs_seeds_and_only_reads_what_is_finished(runs: Runs, plan: Plan):
    told: list[str] = []
    found = compare(plan, runs, told.append)
    assert len(told) == 2 * 6 + 2 * 3
    assert {name: len(own) for name, own in found.trials.items()} == {"etpo": 6, "etpo:beta=0.5": 6}
    first, other = found.rows
    assert dict(first.variant.settings)["lr"] == 0.4
    assert dict(other.variant.settings) == {"beta": 0.5, "lr": 0.4, "max_kl_update": 0.02}
    assert [r.case.seed for r in first.results] == [r.case.seed for r in other.results] == [0, 1, 2]
    assert other.rival is not None
    # last 8 of 16 programs: the shares 12/16 and 16/16 of the end, which is 0.3·0.4 higher
    assert other.rival.difference.mean == pytest.approx(0.12 * 14 / 16 - 0.01 * 0.4)
    assert other.rival.difference.excludes_zero()
    assert other.rival.at_equal_cpu is not None
    # all algorithms are on one line of reward against KL: at equal KL neither is better
    for equal in other.equal_kl:
        assert equal.difference.mean == pytest.approx(0.12 * 4 / 16, abs=0.02)
    again: list[str] = []
    assert to_json(compare(plan, runs, again.append), "c") == to_json(found, "c")
    assert again == []


def test_output_says_the_command_every_seed_and_what_tuning_tried(runs: Runs, plan: Plan):
    found = compare(plan, runs, lambda _: None)
    text = to_markdown(found, "Title", "etpo bench …")
    assert text.startswith("# Title\n\nMade by `etpo bench …`.")
    assert text.count("| taken |") == 2
    assert "had 6 tuning runs on seeds from 100" in text
    record = json.loads(to_json(found, "c"))
    assert [row["algorithm"] for row in record["rows"]] == ["etpo", "etpo:beta=0.5"]
    assert [seed["seed"] for seed in record["rows"][0]["seeds"]] == [0, 1, 2]
    assert record["rows"][1]["rival"]["difference"]["low"] > 0
    svg = to_svg(found)
    assert svg.startswith("<svg ")
    assert svg.count("<polyline") == 4
    assert svg.count("<polygon") == 2


def test_a_tuning_run_that_fails_counts_as_failed_and_a_reported_one_ends_the_comparison(
    runs: Runs, plan: Plan, monkeypatch: pytest.MonkeyPatch
):
    bad = (("lr", 13.0), ("max_kl_update", 0.02))
    monkeypatch.setitem(GRIDS, "etpo", (bad, *GRIDS["etpo"][:5]))
    trials = protocol.tune(plan, runs, lambda _: None)["etpo"]
    assert (trials[0].reward, trials[0].failure) == (FAILED, "the weights are not finite")
    assert best(trials) != bad
    told: list[str] = []
    with pytest.raises(ComparisonError, match=r"3 of 6 runs failed.*not finite"):
        compare(Plan(variants(["etpo", "etpo:lr=13"]), "wine", 16, 3, 0), runs, told.append)
    assert len(told) == 6  # the others are made all the same


def test_stops_early_only_from_the_least_number_of_seeds_on(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    assert protocol.LEAST_SEEDS == 16
    monkeypatch.setattr(protocol, "LEAST_SEEDS", 3)
    monkeypatch.setattr(protocol, "SEEDS_A_LOOK", 2)
    clear = Plan(variants(["etpo", "etpo:beta=0.5"]), "wine", 4, 9, 0, decide=True)
    found = compare(clear, runs, lambda _: None)
    assert [len(row.results) for row in found.rows] == [3, 3]
    assert found.level_of_stopping == pytest.approx(1 - 0.05 / 4)
    alike = Plan(variants(["etpo", "etpo:clip_norm=2"]), "wine", 4, 5, 0, decide=True)
    undecided = compare(alike, runs, lambda _: None)
    assert [len(row.results) for row in undecided.rows] == [5, 5]


def test_a_cut_run_goes_on_or_is_put_aside_and_another_configuration_is_refused(runs: Runs):
    one = Case(variant("etpo:beta=0.3"), "wine", 0, 16)
    path = runs.path(one)
    path.mkdir(parents=True)
    (path / "programs.jsonl").write_text("{}\n")
    assert runs.make([one], lambda _: None, str) == {}
    assert (path.with_name(path.name + ".cut-1") / "programs.jsonl").read_text() == "{}\n"
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
    assert runs.n_programs(one) == 8
    assert runs.make([one], lambda _: None, str) == {}
    assert runs.n_programs(one) == 16
    assert not path.with_name(path.name + ".cut-2").exists()
    usage = runs.usage(one)
    assert usage.cpu_s is not None
    assert usage.cpu_s > 0
    assert read_result(runs, one).last_within(1e9) == read_result(runs, one).last
    config = (path / "config.toml").read_text().replace("beta = 0.3", "beta = 0.4")
    (path / "config.toml").write_text(config)
    with pytest.raises(ComparisonError, match=r"expected a run with --beta 0.3, got one with 0.4"):
        runs.make([one], lambda _: None, str)


def test_unseen_processes_are_made_up_for_by_the_watched_programs():
    began, ended = {"event": "began", "programs": 0}, {"event": "ended", "programs": 8}
    cost = {"cpu_s": 10.0, "wall_s": 20.0}
    assert usage_of([], 16) == Usage(None, None)
    assert usage_of([began], 16) == Usage(None, None)
    assert usage_of([began, ended | cost], 8) == Usage(10.0, 20.0, False)
    more = {"event": "began", "programs": 8}
    assert usage_of([began, more, ended | cost | {"programs": 16}], 16) == Usage(20.0, 40.0, True)


def test_the_work_folder_says_what_it_holds(tmp_path: Path):
    for command in ("etpo a", "etpo b", "etpo a"):
        write_readme(tmp_path / "w", command)
    text = (tmp_path / "w" / "README.md").read_text()
    assert text.count("- `etpo a`") == 1
    assert text.endswith("- `etpo a`\n- `etpo b`\n")
    assert "usage.jsonl" in text
