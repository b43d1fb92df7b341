"""Mechanistic interpretability of masked diffusion language models.

    from mdm_interp import FactConfig, HookedTransformer, ModelConfig, TrainConfig, train
    from mdm_interp import coupling, interventions, parity, routing, storage, viz

Modules, each using only those before it: config, positions, queries, facts, model, bridge, diffusion, prediction, runs,
training, checkpoints, prompts, demo; capture, routing, parity, storage, coupling, layer_coupling, answer_evidence,
trajectory and interventions measure `(model, query_pairs)`, a TransformerBridge's as well; analysis and probing make
results of them, claims judges these; viz and cli make figures and pages of it.
"""

from mdm_interp import coupling, interventions, parity, routing, storage, viz
from mdm_interp.checkpoints import load_checkpoint, save_checkpoint
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
    "interventions",
    "load_checkpoint",
    "parity",
    "predict",
    "routing",
    "save_checkpoint",
    "storage",
    "train",
    "viz",
]
