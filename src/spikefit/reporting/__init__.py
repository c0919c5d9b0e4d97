"""Reporting: tables, the self-contained HTML report, and the verbs `compare` and `study`."""

from spikefit.reporting.comparison import compare
from spikefit.reporting.report import write_report
from spikefit.reporting.studies import study
from spikefit.reporting.table import table, table_text

__all__ = ["compare", "study", "table", "table_text", "write_report"]
