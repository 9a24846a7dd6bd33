"""Speed, measured so that it can be trusted: `python -m benchmarks`, or `make bench`. See `benchmarks/REPORT.md`."""
