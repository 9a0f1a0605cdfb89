"""What a run measured, for people: a table for the terminal, plots, and one HTML page."""

from jaxhybrid.report.page import write_report
from jaxhybrid.report.table import evaluation_table

__all__ = ["evaluation_table", "write_report"]
