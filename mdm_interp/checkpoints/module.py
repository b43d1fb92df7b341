"""A torch module of one's own, read as a HookedTransformer that computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mdm_interp.checkpoints.format import Format
from mdm_interp.config import ModelConfig
from mdm_interp.errors import UserError, few
from mdm_interp.models.transformer import HookedTransformer

TOLERANCE = 1e-3
"""How far logits may be apart, as a share of the largest: what single precision leaves after many layers."""
ASKED = 16
"""How many tokens the sequences have at most on which both are compared."""


def from_module(module: nn.Module, cfg: ModelConfig, names: Mapping[str, str]) -> HookedTransformer:
    """Return a HookedTransformer with the weights of a module that has queries, keys, values and output as linear maps,
    for all measures, interventions and pages.

    The module is called on random tokens, and its logits are compared with the model's. It stays as it is, and its
    weights are copied: train it further, and read it again.

    Args:
        module: Maps tokens [batch pos] to logits [batch pos d_vocab], or to something that has them as `logits`.
        cfg: What it computes: shapes, position scheme, norms, attention.
        names: Of each parameter of the HookedTransformer, `*` for the layer, what `module.state_dict()` calls it.
            Weights of linear maps are as `torch.nn.Linear` keeps them, `[output input]`.

    Raises:
        UserError: a parameter has no name, a name is not there or has another shape, the module has parameters that
            nothing names, or its logits are not those of the model.
    """
    model, given = HookedTransformer(cfg, init_weights=False), module.state_dict()
    format: Format = type("Named", (Format,), {"tensors": names})()
    weights, named, problems = dict[str, Tensor](), set[str](), list[str]()
    for parameter, weight in model.state_dict(keep_vars=True).items():
        try:
            name = format.tensor_name(parameter)
        except KeyError:
            problems.append(f"{parameter} has no name")
            continue
        named.add(name)
        if name not in given:
            problems.append(f"{name} ({parameter}) is not there")
        elif given[name].shape != (shape := format.to_stored(parameter, weight, cfg).shape):
            problems.append(f"{name} is {list(given[name].shape)}, not {list(shape)}")
        else:
            weights[parameter] = format.from_stored(parameter, given[name], cfg).to(cfg.dtype, copy=True)
    problems += [f"{name} is named by nothing" for name, _ in module.named_parameters() if name not in named]
    if problems:
        raise UserError(f"names: do not fit module and cfg: {few(problems, '; ')}; correct names or cfg")
    model.load_state_dict(weights, assign=True)
    _compare(module, model.to(cfg.device))
    return model


@torch.no_grad()
def _compare(module: nn.Module, model: HookedTransformer) -> None:
    """Compare both on random tokens."""
    cfg = model.cfg
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(cfg.d_vocab, (2, min(ASKED, cfg.n_ctx)), generator=generator)
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    training = module.training
    module.eval()
    try:
        got: Any = module(tokens.to(device))
    finally:
        module.train(training)
    got = getattr(got, "logits", got)
    ours = model(tokens.to(cfg.device)).double().cpu()
    if not isinstance(got, Tensor) or got.shape != ours.shape:
        seen = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise UserError(f"module: returns {seen} for tokens {list(tokens.shape)}, not logits {list(ours.shape)}")
    apart, largest = (got.double().cpu() - ours).abs().max().item(), ours.abs().max().item()
    if not apart <= TOLERANCE * largest:
        raise UserError(
            f"module: its logits differ by up to {apart:.3g} from those of the model it is read as, whose largest is "
            f"{largest:.3g}; check names, and in cfg attention, position, rotary_base, normalization_type, eps, act_fn"
        )
