"""Shapes in signatures are checked in every test: jaxtyping and beartype look at each call into the package."""

from jaxtyping import install_import_hook

install_import_hook("mdm_interp", "beartype.beartype")
