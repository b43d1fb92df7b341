"""Figures and pages: one Plotly theme, one way to write a figure, the report, and pages to look inside a model with.

page = viz.attention(model, "Anna's mother is [M]")      # shows itself in a notebook
page.save("page.html")

panels = viz.Panels()                                    # a figure, row by row
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
