"""Mechanistic interpretability of masked diffusion language models.

    from mdm_interp import FactConfig, HookedTransformer, ModelConfig, TrainConfig, train
    from mdm_interp import coupling, routing, storage

Modules, each using only those before it: config, positions, queries, facts, model, prediction, diffusion, runs,
training; routing, storage, coupling measure `(model, query_pairs)`; analysis, viz and cli make figures of them.
"""

from mdm_interp import coupling, routing, storage
from mdm_interp.config import FactConfig, ModelConfig, TrainConfig
from mdm_interp.diffusion import denoise
from mdm_interp.facts import FactWorld
from mdm_interp.files import UserError
from mdm_interp.model import HookedTransformer
from mdm_interp.prediction import predict
from mdm_interp.queries import Query, QueryPair
from mdm_interp.runs import Run
from mdm_interp.training import train

__all__ = [
    "FactConfig",
    "FactWorld",
    "HookedTransformer",
    "ModelConfig",
    "Query",
    "QueryPair",
    "Run",
    "TrainConfig",
    "UserError",
    "coupling",
    "denoise",
    "predict",
    "routing",
    "storage",
    "train",
]
