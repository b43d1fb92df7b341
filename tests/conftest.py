"""Shapes in signatures are checked in every test: jaxtyping and beartype look at each call into the package."""

import torch
from jaxtyping import install_import_hook

install_import_hook("mdm_interp", "beartype.beartype")
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
