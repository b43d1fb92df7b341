"""The hooked transformer, its layers and position schemes, and the bridge to models of TransformerLens.

A model takes tokens and gives logits, with every activation hookable. What tokens mean, how they are masked or trained,
and what is measured of a model does not belong here.
"""
