from . import interventions as interventions
from . import viz as viz
from .checkpoints import load_checkpoint as load_checkpoint
from .checkpoints import save_checkpoint as save_checkpoint
from .config import FactConfig as FactConfig
from .config import ModelConfig as ModelConfig
from .config import TrainConfig as TrainConfig
from .data.prompts import load_facts as load_facts
from .data.prompts import make_prompts as make_prompts
from .data.queries import Query as Query
from .data.queries import QueryPair as QueryPair
from .data.queries import collate as collate
from .data.queries import queries_of as queries_of
from .data.worlds import FactWorld as FactWorld
from .errors import UserError as UserError
from .experiments.analysis import Analysis as Analysis
from .experiments.analysis import CheckpointAnalysis as CheckpointAnalysis
from .experiments.results import Result as Result
from .experiments.runner import report as report
from .experiments.runner import reproduce as reproduce
from .experiments.scope import Moment as Moment
from .experiments.scope import all_checkpoints as all_checkpoints
from .experiments.scope import first_and_last as first_and_last
from .experiments.scope import metrics_at as metrics_at
from .experiments.scope import stages as stages
from .experiments.subjects import Lab as Lab
from .experiments.subjects import Probe as Probe
from .experiments.subjects import open_probe as open_probe
from .inference.denoising import denoise as denoise
from .inference.prediction import predict as predict
from .measures import (
    evidence as evidence,
)
from .measures import (
    gradients as gradients,
)
from .measures import (
    parity as parity,
)
from .measures import (
    rope as rope,
)
from .measures import (
    routes as routes,
)
from .models.transformer import HookedTransformer as HookedTransformer
from .stats.estimates import Contrast as Contrast
from .stats.estimates import Estimate as Estimate
from .stats.estimates import mean_estimate as mean_estimate
from .stats.summary import Summary as Summary
from .stats.tables import where as where
from .training.loop import train as train
from .training.runs import Run as Run
from .version import __version__ as __version__
