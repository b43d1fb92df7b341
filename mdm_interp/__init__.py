"""Mechanistic interpretability of masked diffusion language models.

    from mdm_interp import FactConfig, HookedTransformer, ModelConfig, TrainConfig, train
    from mdm_interp import evidence, gradients, interventions, parity, rope, routes, viz

Whatever is named here is imported when it is first used. Rooms, each using only those above it:

    errors, files, config, version              mistakes, whole files, configurations, what is installed
    devices, parallel, shards, tensors          what runs on what, and side by side
    meaning, provenance                         what code means, and what made a model or a result
    models                                      the transformer, its layers, hooks and position schemes
    data                                        queries, worlds of facts, facts in natural language
    checkpoints                                 released formats and our own, read and written
    inference                                   denoising and prediction
    training                                    losses, the loop, stored runs, demo checkpoints
    stats                                       estimates, intervals, correlations, tables
    measures                                    routes, evidence and gradients of `(model, queries)`
    interventions                               edits of routes and storage, and their effects
    viz                                         parts of figures, and interactive pages
    experiments                                 analyses, results, the claims ledger, the report, the runner, sweeps
    cli, __main__                               the command line
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
