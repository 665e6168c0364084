"""What a run measured, for people: a table in the terminal or in Markdown, figures, one HTML page. No torch."""

from simomerge.report.html import write_report
from simomerge.report.tables import markdown_table, text_table

__all__ = ["markdown_table", "text_table", "write_report"]
