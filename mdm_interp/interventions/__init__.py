"""Edits of a model's routes and of its storage while it runs, and what they do to reverse prediction.

Each edit exists twice: as a context manager of hooks (`even_routes`), and as a call that returns its effect beside that
of a control (`project_even_routes`). What only looks belongs in `measures`.
"""

from mdm_interp.interventions.edits import (
    ablated_routes,
    ablated_storage,
    even_routes,
    shared_routes,
    transplanted_routes,
)
from mdm_interp.interventions.effects import (
    Effect,
    ablate_routes,
    ablate_storage,
    edit_heads,
    effect,
    other_positions,
    project_even_routes,
    share_routes,
    transplant_routes,
)
from mdm_interp.interventions.patching import effect_of_patches, patch_heads, patch_positions, position_roles

__all__ = [
    "Effect",
    "ablate_routes",
    "ablate_storage",
    "ablated_routes",
    "ablated_storage",
    "edit_heads",
    "effect",
    "effect_of_patches",
    "even_routes",
    "other_positions",
    "patch_heads",
    "patch_positions",
    "position_roles",
    "project_even_routes",
    "share_routes",
    "shared_routes",
    "transplant_routes",
    "transplanted_routes",
]
