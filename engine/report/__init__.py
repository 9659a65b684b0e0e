"""What a run looks like: numbers over its records, charts, and one self-contained page."""

from etpo.engine.report.page import write_report

__all__ = ["write_report"]
