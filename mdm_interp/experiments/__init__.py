"""From a config to a figure: analyses, what they measure, their results, the claims ledger, the report, the runner.

One analysis is a module of its own, in the top-level `analyses` or in another package. What it measures of a model
belongs in `measures` if a second study would want it.
"""
