"""Reports of a run for people: a table in the terminal or in Markdown, figures, and one HTML page. Needs no torch."""

from simomerge.report.page import write_report
from simomerge.report.table import markdown_table, text_table

__all__ = ["markdown_table", "text_table", "write_report"]
