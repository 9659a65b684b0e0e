"""report.html: one page that stands alone, true to the records, whatever the run came to."""

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import fields
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etpo.engine.config import Config
from etpo.engine.report.charts import MOST_POINTS, Series, line_chart, number, running_mean, thin_out, ticks
from etpo.engine.report.episodes import best_programs, chains
from etpo.engine.report.errors import shares_over_time
from etpo.engine.report.highlight import python
from etpo.engine.report.page import write_report
from etpo.engine.report.summary import Program, duration, learned, warnings
from etpo.engine.run_folder import RunFolder

NASTY = "    # </code><script>alert('x')</script> & more\n    return model\n"
VOID = {"meta", "br", "link", "img", "input", "hr"}
COMMAND = "python best_program.py DATA.csv --target 'the class'"


class Balance(HTMLParser):
    """Fails where a tag is not closed, or closed in another's place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        links = [value or "" for name, value in attrs if name in ("src", "href")]
        assert all(link.startswith("#") or link == "data:," for link in links)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def program(
    step: int, auc: float | None, text: str = NASTY, error: str = "KeyError: '<b>'"
) -> dict[str, Any]:
    return {
        "step": step, "text": text, "reward": -1.0 if auc is None else auc,
        "outcome": "error" if auc is None else "ok", "auc_mean": auc,
        "auc_std": None if auc is None else 0.01, "error": error if auc is None else None,
    }  # fmt: skip


def read(record: dict[str, Any]) -> Program:
    return Program(**{field.name: record[field.name] for field in fields(Program) if field.name in record})


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step, "wall_s": 0.5 * step, "reward_mean": 0.1, "runnable_share": 0.5, "distinct_share": 0.9,
        "kl_ref": 0.25, "kl_update": 0.04, "entropy": 1.0, "loss_q": 0.3, "loss_pi": 0.2, "q_mean": 0.4,
        "v_mean": 0.3, "auc_best": None,
    } | changes  # fmt: skip


def folder_of(path: Path, programs: list[dict], every: int = 16, **config: Any) -> RunFolder:
    folder = RunFolder.create(path / "run", Config(**config))
    steps = sorted({*range(every, len(programs) + 1, every), len(programs)})
    folder.programs_file.write_text("".join(json.dumps(p) + "\n" for p in programs))
    folder.metrics_file.write_text("".join(json.dumps(metrics(step)) + "\n" for step in steps))
    return folder


def page_of(folder: RunFolder) -> tuple[str, Balance]:
    """The page and its parse; checks what holds for every report."""
    text = write_report(folder).read_text(encoding="utf-8")
    parsed = Balance()
    parsed.feed(text)
    assert parsed.open == []
    assert not re.search(r"https?:|url\(|@import", text.replace("http://www.w3.org/2000/svg", ""))
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)
        assert "nan" not in svg
    return text, parsed


def test_a_run_that_learns(tmp_path: Path) -> None:
    programs = [program(i + 1, 0.6 + i / 1000 if i % 4 < 1 + i // 100 else None) for i in range(300)]
    text, parsed = page_of(folder_of(tmp_path, programs, seed=7))
    shown = "".join(parsed.text)
    assert "Of the first 100 programs, 25% ran; of the last 100, 75%." in shown
    best = max(p["auc_mean"] or 0.0 for p in programs)
    assert f"AUC {best:.4f} ± 0.0100" in shown
    rows = re.findall(
        r"<tr><th scope=\"row\">(first|last) 100 programs</th><td>(\d+%)</td><td>(.*?)</td>", text
    )
    last = [p["reward"] for p in programs[-100:]]
    assert rows[0][1] == "25%"
    assert rows[1][2] == f"{sum(last) / 100:.3f}".replace("-", "−")
    assert "</code><script>" not in text
    assert "</code><script>alert('x')</script> & more" in shown
    # ten curves of metrics (no best AUC in them), the outcomes and the kinds of errors
    assert parsed.tags.count("svg") == 12
    assert "KeyError: '<b>'" in shown
    assert "seed = 7" in shown


def test_no_program_ran(tmp_path: Path) -> None:
    text, parsed = page_of(folder_of(tmp_path, [program(i + 1, None) for i in range(40)]))
    assert "No program ran to its end." in "".join(parsed.text)
    assert "k-ok" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("n", [1, 3, 16])
def test_one_iteration_only(tmp_path: Path, n: int) -> None:
    text, _ = page_of(folder_of(tmp_path, [program(i + 1, 0.5) for i in range(n)]))
    assert f"first {max(1, n // 2)} programs" in text


def test_an_environment_without_data_shows_no_auc(tmp_path: Path) -> None:
    programs = [
        {"step": i + 1, "text": "n.", "reward": -0.05, "outcome": None, "auc_mean": None, "auc_std": None,
         "error": None} for i in range(32)
    ]  # fmt: skip
    _, parsed = page_of(folder_of(tmp_path, programs, env="etpo/GridWorld-v0"))
    shown = "".join(parsed.text)
    assert "AUC" not in shown
    assert "Runnable" not in shown
    assert "from −0.050 to −0.050" in shown


def test_reflection_shows_no_update(tmp_path: Path) -> None:
    _, parsed = page_of(folder_of(tmp_path, [program(1, 0.5)], algo="reflection"))
    assert "loss" not in "".join(parsed.text)


def test_a_synthetic_twin_is_called_so(tmp_path: Path) -> None:
    _, parsed = page_of(folder_of(tmp_path, [program(1, 0.5)], dataset="wine:synthetic"))
    assert "".join(parsed.text).count("wine (synthetic twin)") >= 3


def test_errors_are_counted_by_name_and_what_is_rare_is_other(tmp_path: Path) -> None:
    errors = [f"line {i % 3}: NameError: name 'x{i}'" for i in range(12)] + ["ValueError: bad"] * 5
    errors += [f"Odd{i}Error: once" for i in range(8)]
    programs = [program(i + 1, None, error=error) for i, error in enumerate(errors)]
    text, _ = page_of(folder_of(tmp_path, programs))
    rows = re.findall(
        r'<tr><th scope="row">(\w+)</th><td>(\d+)</td><td>(\d+)</td><td class="l msg"><code>(.*?)</code>',
        text,
    )
    assert rows[:2] == [
        ("NameError", "12", "0", "line 2: NameError: name &#39;x11&#39;"),
        ("ValueError", "0", "5", "ValueError: bad"),
    ]
    assert len(rows) == 10
    shares = shares_over_time([read(p) for p in programs], ["NameError"], 2)
    assert shares == [("12", {"NameError": 1.0}), ("25", {"other": 1.0})]


def test_the_best_programs_stand_beside_the_first_of_their_family(tmp_path: Path) -> None:
    trees = ["    return Tree(depth=1)", "    return Tree(depth=2)", "    return Tree(depth=3)"]
    programs = [program(i + 1, auc, text) for i, (text, auc) in enumerate(
        zip([*trees, "    return SVC()"], (None, 0.6, 0.9, 0.7), strict=True))]  # fmt: skip
    shown = best_programs([read(p) for p in programs])
    assert [(one.program.step, one.family) for one in shown] == [(3, "Tree"), (4, "SVC")]
    assert shown[0].origin is not None
    assert shown[0].origin.step == 1
    assert [(line.sign, "depth" in line.html) for line in shown[0].changes] == [
        (" ", False), ("-", True), ("+", True),
    ]  # fmt: skip
    assert shown[1].origin is None


def test_an_episode_of_several_tries_is_a_chain(tmp_path: Path) -> None:
    programs = [program(i + 1, 0.5 if i == 2 else None, f"    return {i}") for i in range(4)]
    for i, one in enumerate(programs):
        one |= {"env": 0, "episode": i // 3, "t": i % 3}
    (chain,) = chains([read(p) for p in programs])
    assert [one.kind for one in chain] == ["KeyError", "KeyError", None]
    assert "<ol>" in page_of(folder_of(tmp_path, programs))[0]


def test_a_stopped_run_says_so_and_how_it_goes_on(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [program(i + 1, None) for i in range(40)], steps=100)
    shown = "".join(page_of(folder)[1].text)
    assert "This run stopped after 40 of 100 programs" in shown
    assert f"etpo train --resume {folder.path}" in shown
    whole = folder_of(tmp_path / "whole", [program(1, None)], steps=1)
    assert "stopped" not in "".join(page_of(whole)[1].text)


def test_the_command_of_the_best_program_names_the_target_and_the_machine_is_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [program(1, 0.5)])
    folder.best_file.write_text(f'"""The best program\n\n    {COMMAND}\n"""\n')
    folder.origin_file.write_text(
        json.dumps([{"command": "etpo train --seed 3", "torch": "9.9", "commit": None}])
    )
    shown = "".join(page_of(folder)[1].text)
    assert COMMAND in shown
    assert "etpo train --seed 3" in shown
    assert "9.9" in shown


def test_syntax_is_marked_and_nothing_is_lost() -> None:
    source = "def f(x):\n    return x < 1  # '<b>'\n\n\n    y = \"a\"\n"
    html = python(source)
    assert '<span class="s-k">return</span>' in html
    assert unescape(re.sub(r"<[^>]*>", "", html)) == source.rstrip()


def test_a_run_without_records_is_refused_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "empty", Config())
    with pytest.raises(ValueError, match="at least one iteration"):
        write_report(folder)
    folder = folder_of(tmp_path, [program(1, 0.5), program(2, None)])
    with folder.programs_file.open("a") as file:
        file.write('{"step": 3, "te')
    assert learned(folder).n_programs == 2


@pytest.mark.parametrize("high", [1e-300, 3e-15, 2e-13, 1e300])
def test_ticks_of_tiny_and_huge_values_differ(high: float) -> None:
    """The critic's loss where every reward is zero is some 1e-14."""
    marks = ticks(0.0, high)
    assert len(set(marks)) == len(marks) >= 2
    assert line_chart([Series("loss", [(8, 0.0), (16, high)])], unit="reward²").count("<circle") == 2


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_even_and_around_the_values(low: float, span: float) -> None:
    high = low + span
    if not high - low > abs(low) * 1e-9:
        return
    marks = ticks(low, high)
    steps = [b - a for a, b in itertools.pairwise(marks)]
    slack = 1.1e-3 * steps[0]
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert 2 <= len(marks) <= 8
    assert max(steps) - min(steps) <= max(1e-6 * steps[0], 1e-11)
    assert f"{steps[0]:.0e}"[0] in "125"


def test_a_zero_with_rounding_gets_no_tick_below() -> None:
    assert ticks(-3e-9, 0.02)[0] == 0.0


def test_tick_texts_differ_and_say_no_more_than_needed() -> None:
    assert [number(x, 0.05) for x in (0.0, 0.05, -0.1)] == ["0.00", "0.05", "−0.10"]
    assert number(12_000.0, 2000.0) == "12,000"
    for marks in (ticks(0, 3e-5), ticks(0.991, 0.9923), ticks(0, 7e6), ticks(0.003626, 0.003632)):
        assert len({number(x, marks[1] - marks[0]) for x in marks}) == len(marks)


def test_lines_stop_where_nothing_is_known() -> None:
    chart = line_chart([Series("q", [(1, 0.0), (2, 1.0), (3, None), (4, 2.0), (5, 3.0)])], unit="reward")
    assert [len(points.split()) for points in re.findall('points="(.*?)"', chart)] == [2, 2]
    assert chart.count("<circle") == 4


def test_many_points_become_means_and_the_running_mean_does_not_lag() -> None:
    thin = thin_out([(float(i), float(i)) for i in range(10 * MOST_POINTS)])
    assert len(thin) == MOST_POINTS
    assert thin[0] == (9.0, 4.5)
    line = [(float(i), float(i)) for i in range(9)]
    assert running_mean(line) == line
    assert running_mean([(float(i), float(i % 2)) for i in range(9)])[4] == (4.0, 4 / 7)


@pytest.mark.parametrize(("last", "said"), [
    ({"kl_ref": 2.12}, "2.1 nat a token"),
    ({"q_mean": 13.99}, "their mean is 14, where no return of an episode can exceed 2.5."),
    ({}, None),
])  # fmt: skip
def test_a_run_that_went_wrong_is_told(tmp_path: Path, last: dict[str, float], said: str | None) -> None:
    """2.12 and 13.99 are those of a run of the guide's own environment with a former default."""
    folder = folder_of(tmp_path, [program(i + 1, 0.5, text=f"{i}") for i in range(40)], steps=40)
    lines = folder.metrics_file.read_text().splitlines()
    folder.metrics_file.write_text("\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | last)]) + "\n")
    found = warnings(learned(folder))
    assert [said in one for one in found] == [True] if said else found == []
    if said:
        assert said in "".join(page_of(folder)[1].text)


def test_a_policy_that_repeats_itself_is_told(tmp_path: Path) -> None:
    programs = [program(i + 1, 0.5, text=f"{i}" if i < 150 else "same") for i in range(250)]
    assert [
        "repeats itself" in one for one in warnings(learned(folder_of(tmp_path, programs, steps=250)))
    ] == [True]


def test_durations() -> None:
    assert [duration(s) for s in (7.4, 125, 3720)] == ["7 s", "2 min 05 s", "1 h 02 min"]
