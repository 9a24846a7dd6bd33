"""The report of a load test: one HTML page that needs nothing else, and its plots as PNG."""

from gralora_server.loadtest.report.merge import merge
from gralora_server.loadtest.report.page import write_report

__all__ = ["merge", "write_report"]
