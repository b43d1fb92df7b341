"""Inner products of forward and reverse gradients, by component and by layer, and what one step does to the other loss.

Formulas: docs/theory.md, sections 5 and 8.
"""

from mdm_interp.measures.gradients.alignment import (
    COMPONENTS,
    ROUTING,
    STORAGE,
    Alignment,
    component_of,
    gradient_alignment,
    query_gradients,
)
from mdm_interp.measures.gradients.first_order import (
    FirstOrder,
    contrast_steps,
    direction_cosine,
    first_order,
    inner_products,
    mean_gradient,
    random_direction,
)
from mdm_interp.measures.gradients.layers import LayerAlignment, layer_alignment, layer_cosines

__all__ = [
    "COMPONENTS",
    "ROUTING",
    "STORAGE",
    "Alignment",
    "FirstOrder",
    "LayerAlignment",
    "component_of",
    "contrast_steps",
    "direction_cosine",
    "first_order",
    "gradient_alignment",
    "inner_products",
    "layer_alignment",
    "layer_cosines",
    "mean_gradient",
    "query_gradients",
    "random_direction",
]
