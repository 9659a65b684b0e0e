"""The reflection measurement, on a tiny model."""

import pytest

from etpo.bench.reflection import interval, measure, to_markdown


def test_counts_add_up_and_the_table_shows_them(tiny_folder):
    found = measure(str(tiny_folder), "wine", episodes=3, max_new_tokens=4)
    assert found["fresh"] + found["failed"] == found["episodes"] == 3
    assert found["reflected"] - found["fresh_again"] == found["only_reflected"] - found["only_fresh"]
    text = to_markdown(found | {"episodes": 500, "fresh": 250, "failed": 250, "reflected": 170}, "c")
    assert "| fresh sample | 250 of 500 | 50.0% | 45.6% – 54.4% |" in text
    assert "| after one reflection, where the first failed | 170 of 250 | 68.0% |" in text
    assert "synthetic" not in text
    assert "on wine (synthetic)" in to_markdown(found | {"synthetic": True}, "c")


def test_the_interval_is_wilson_s():
    # Wilson (1927) for 8 of 10: roots of (p − 0.8)² = 1.96² p(1 − p)/10.
    low, high = interval(8, 10)
    for p in (low, high):
        assert (p - 0.8) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / 10, rel=1e-9)
    assert 0 < low < 0.8 < high < 1
    assert interval(0, 0) == (0.0, 1.0)
