"""One module per figure. Each holds an `ANALYSIS` and runs alone: `python -m analyses.NAME`."""
