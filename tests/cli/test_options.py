"""One declaration of an option makes its check, its flag, its help and its line in docs/options.md."""

from pathlib import Path

import pytest

from etpo.cli.options import page
from etpo.engine.config import OPTIONS, Config
from etpo.engine.learners import ALGORITHMS, learner_class
from etpo.engine.rates import LEARNING_RATES

ROOT = Path(__file__).parents[2]


def test_the_page_of_options_is_up_to_date() -> None:
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == page(), "run `make docs/options.md`"


def test_help_lists_options_under_headings_with_unit_bounds_and_default(cli) -> None:
    text = " ".join(cli("train", "--help").output.split())
    assert "How the update steps: --roles" in text
    assert (
        "one update may move the policy. [nat a token; > 0; default: 0.05 for etpo, 0.02 for etpo-q," in text
    )
    for name, rates in LEARNING_RATES.items():
        assert f"{rates.policy:g} for {name}" in text


@pytest.mark.parametrize("name", [n for n, one in OPTIONS.items() if one.option.bounds()])
def test_a_bound_is_where_the_declaration_says(name: str) -> None:
    """The nearest allowed value passes, the next one beyond it does not."""
    one = OPTIONS[name]
    step = 1 if one.kind is int else 1e-9
    for bound, outward in ((one.option.low, -step), (one.option.high, step)):
        if bound is not None:
            assert getattr(Config(**{name: one.kind(bound)}), name) == bound
            with pytest.raises(ValueError, match=f"{one.flag}: expected a"):
                Config(**{name: one.kind(bound) + outward})
    if one.option.above is not None:
        Config(**{name: one.option.above + step})
        with pytest.raises(ValueError, match=f"{one.flag}: expected a"):
            Config(**{name: one.kind(one.option.above)})


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_is_there_and_is_a_learner(algo: str) -> None:
    found = learner_class(algo)
    assert set(found.moves) <= {"policy", "critic", "target"}
    assert found.acts == ("policy" if "policy" in found.moves else "reference")


def test_no_summary_of_a_command_is_cut_at_80_columns(cli) -> None:
    lines = cli("--help").output.split("Commands:")[1].strip().splitlines()
    assert len(lines) > 10
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)
