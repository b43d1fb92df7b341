"""Numbers from numbers: estimates with intervals, resampling over facts, correlations, and tables of rows.

Nothing here knows a model.
"""
