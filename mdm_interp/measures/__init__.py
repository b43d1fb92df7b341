"""What is measured of a model: routes (queries and keys), evidence (values), parity, gradients, denoising.

A measure takes `(model, queries)` or `(model, query_pairs)` and returns tensors with named axes, and where it has a
null, its null. It changes nothing of the model, and knows no run, no result and no figure.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
