"""Inner products of forward and reverse gradients, by component and by layer; what one step does to the other loss, and
what a whole run does.

Formulas: docs/theory.md, sections 5, 8 and 13.
"""

from mdm_interp.measures.gradients.alignment import Alignment, gradient_alignment
from mdm_interp.measures.gradients.backward import SourceAttention
from mdm_interp.measures.gradients.components import COMPONENTS, GROUPS, ROUTING, STORAGE, Part, component_of
from mdm_interp.measures.gradients.first_order import (
    FirstOrder,
    contrast_steps,
    direction_cosine,
    first_order,
    inner_products,
    mean_gradient,
    random_direction,
)
from mdm_interp.measures.gradients.gram import Gram, gram
from mdm_interp.measures.gradients.influence import Influence, influence, traced_influence
from mdm_interp.measures.gradients.layers import layer_cosines
from mdm_interp.measures.gradients.path import LearningPath

__all__ = [
    "COMPONENTS",
    "GROUPS",
    "ROUTING",
    "STORAGE",
    "Alignment",
    "FirstOrder",
    "Gram",
    "Influence",
    "LearningPath",
    "Part",
    "SourceAttention",
    "component_of",
    "contrast_steps",
    "direction_cosine",
    "first_order",
    "gradient_alignment",
    "gram",
    "influence",
    "inner_products",
    "layer_cosines",
    "mean_gradient",
    "random_direction",
    "traced_influence",
]
