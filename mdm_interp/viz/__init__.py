"""Figures and pages: one Plotly theme, one way to write a figure, the report, and pages to look inside a model with.

page = viz.attention(model, "Anna's mother is [M]")      # shows itself in a notebook
page.save("page.html")
"""

from mdm_interp.viz.attention_page import attention
from mdm_interp.viz.page import Page
from mdm_interp.viz.routes_page import routes
from mdm_interp.viz.trajectory_page import trajectory

__all__ = ["Page", "attention", "routes", "trajectory"]
