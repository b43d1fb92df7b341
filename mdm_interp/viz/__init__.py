"""Figures and pages: one Plotly theme, one way to write a figure, the report, and pages to look inside a model with.

page = viz.attention(model, "Anna's mother is [M]")      # shows itself in a notebook
page.save("page.html")
"""

from mdm_interp.viz.pages.attention import attention
from mdm_interp.viz.pages.page import Page
from mdm_interp.viz.pages.routes import routes
from mdm_interp.viz.pages.trajectory import trajectory

__all__ = ["Page", "attention", "routes", "trajectory"]
