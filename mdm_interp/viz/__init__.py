"""Figures and pages: one Plotly theme, one way to write a figure, one index page."""
