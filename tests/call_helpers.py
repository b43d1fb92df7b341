"""Every call that takes a model, on models of every kind: what it returns must not depend on where and how it runs."""

from __future__ import annotations

import ast
import base64
import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import torch
from checkpoint_helpers import write_llada2
from device_helpers import PRETENDED
from helpers import EXPERTS, YARN, random_model, seeded
from model_helpers import native_peer
from scheme_helpers import XPos
from torch import Tensor

from mdm_interp import inference, interventions, measures, viz
from mdm_interp.checkpoints import load_checkpoint, save_checkpoint
from mdm_interp.config import FactConfig, ModelConfig, Objective, TrainConfig
from mdm_interp.data.queries import Query, QueryPair, collate
from mdm_interp.data.worlds import FactWorld
from mdm_interp.inference.denoising import FillOrder, denoise
from mdm_interp.inference.likelihood import bound
from mdm_interp.inference.prediction import (
    Filled,
    compare_answers,
    infill,
    infill_any_length,
    orders,
    predict,
    split_by_role,
    token_log_probabilities,
)
from mdm_interp.measures import (
    answers,
    evidence,
    fact_routes,
    gradients,
    heads,
    parity,
    routes,
    signatures,
    trajectory,
)
from mdm_interp.measures.answer_evidence import answer_evidence
from mdm_interp.measures.head_scores import head_scores
from mdm_interp.measures.lens import lens, other_answers
from mdm_interp.measures.representations import compute_representations
from mdm_interp.measures.rope import compute_content, distance_correlation, isotropy, plane_scores
from mdm_interp.measures.sinks import sinks, watch_sinks
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.training.loop import train
from mdm_interp.training.losses import training_loss
from mdm_interp.training.trainees import Ensemble, Trainee
from mdm_interp.viz.pages.page import Page

WORLD = FactWorld(FactConfig(n_entities=9, n_filler=4, seq_len=8), seed=0)
SHAPE: dict[str, Any] = {"d_vocab": WORLD.config.d_vocab, "mask_token_id": WORLD.config.mask_token_id}
MODELS: dict[str, dict[str, Any]] = {
    "rope": {"n_layers": 1},
    "deep": {"n_key_value_heads": 2, "qkv_bias": True, "d_mlp": 24, "gated_mlp": True, "rotary_dim": 2},
    "normed": {"use_qk_norm": True, "d_head": 6, "n_key_value_heads": 2, "rotary_scaling": YARN, "d_mlp": 24},
    "experts": {"experts": EXPERTS, "d_mlp": 24, "gated_mlp": True, "act_fn": "silu"},
    "learned": {"position": "learned", "normalization_type": "LN", "d_mlp": 24, "tie_word_embeddings": True},
    "buckets": {"position": "t5_bias"},
    "causal": {"position": "alibi", "attention": "causal"},
    "blocks": {"attention": "block_causal", "block_size": 8},
}


def made(name: str, dtype: torch.dtype, **changes: Any) -> HookedTransformer:
    """A model with every bias that it can have, on the CPU."""
    model = random_model(**{"initializer_range": 0.2, **SHAPE, **MODELS[name], **changes})
    with torch.no_grad():
        for parameter in model.add_biases().parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    return model.to(dtype)


def named_pairs() -> list[QueryPair]:
    """Mirrored pairs with names of two tokens, in sequences of different lengths."""
    mask, pairs = WORLD.config.mask_token_id, []
    for fact in range(4):
        drawn = torch.randperm(mask, generator=seeded(fact)).tolist()
        name, source, rest = tuple(drawn[:2]), drawn[2:4], drawn[4 : 8 + fact % 2]

        def ask(answer_at: int, source_at: int, name: Any = name, source: Any = source, rest: Any = rest) -> Query:
            tokens = [rest[0], 0, 0, rest[1], 0, 0, *rest[2:]]
            tokens[answer_at : answer_at + 2], tokens[source_at : source_at + 2] = [mask, mask], source
            return Query(tuple(tokens), name, (answer_at, answer_at + 2), (source_at, source_at + 2))

        at = (4, 1) if fact < 2 else (1, 4)
        pairs.append(QueryPair(ask(*at), ask(*at[::-1]), fact, "right" if fact < 2 else "left"))
    return pairs


@dataclass(frozen=True)
class Asked:
    """What a model is asked."""

    pairs: list[QueryPair]
    """Of the world, in one context each."""
    named: list[QueryPair]
    """With names of several tokens and padding; of a causal model those of the world."""

    @classmethod
    def of(cls, model: HookedTransformer) -> Asked:
        pairs = WORLD.query_pairs("causal" if model.cfg.is_causal else "any_order", n_contexts=1)
        return cls(pairs, pairs if model.cfg.is_causal else named_pairs())

    @property
    def queries(self) -> list[Query]:
        return [query for pair in [*self.pairs, *self.named] for query in (pair.forward, pair.reverse)]

    @property
    def sentences(self) -> list[tuple[int, ...]]:
        return [pair.forward.statement for pair in [*self.pairs[:3], *self.named]]


Call = Callable[[HookedTransformer, Asked], Any]
BIDIRECTIONAL = ("rope", "deep", "normed", "experts", "learned", "buckets")
ROTATING = ("rope", "deep", "normed")
CALLS: dict[str, tuple[Call, tuple[str, ...]]] = {}
"""By name, a call and the models that it is for."""


def call(*models: str, name: str = "") -> Callable[[Call], Call]:
    """List a call; default: for all models."""

    def listed(function: Call) -> Call:
        CALLS[name or function.__name__] = function, models or tuple(MODELS)
        return function

    return listed


# ---- the model itself


def in_text(model: HookedTransformer) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with masks, the true ones, and which are no padding."""
    d_vocab, mask = model.cfg.d_vocab, WORLD.config.mask_token_id
    targets = torch.randint(1, d_vocab - 1, (3, 7), generator=seeded(3))
    tokens = targets.clone()
    tokens[:, 2:4] = mask
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[0, 5:], real[1, 0] = False, False
    return tokens, targets, real


@call()
def run_with_cache(model: HookedTransformer, asked: Asked) -> Any:
    tokens, _, real = in_text(model)
    logits, cache = model.run_with_cache(tokens, attention_mask=real)
    return logits, dict(cache)


@call()
def every_switched_hook(model: HookedTransformer, asked: Asked) -> Any:
    tokens, _, _ = in_text(model)
    return dict(model.run_with_cache(tokens, names_filter=lambda name: True)[1])


@call()
def loss(model: HookedTransformer, asked: Asked) -> Any:
    tokens, targets, real = in_text(model)
    given = {} if model.cfg.is_causal else {"targets": targets}
    return [model(tokens, "loss", per_token, attention_mask=real, **given) for per_token in (False, True)]


@call()
def part_of_the_layers(model: HookedTransformer, asked: Asked) -> Any:
    tokens, _, real = in_text(model)
    resid = model(tokens, attention_mask=real, stop_at_layer=1)
    return resid, model(resid, attention_mask=real, start_at_layer=1)


@call()
def fused_attention(model: HookedTransformer, asked: Asked) -> Any:
    long = replace_context(model, 70)
    return long(torch.randint(model.cfg.d_vocab, (2, 70), generator=seeded(4)))


def replace_context(model: HookedTransformer, n_ctx: int) -> HookedTransformer:
    """A model of the same kind for longer texts."""
    kind = ModelConfig(**{**model.cfg.model_dump(exclude={"W_pos"}), "n_ctx": n_ctx})
    return HookedTransformer(kind, generator=seeded(0)).to(model.cfg.device)


@call()
def processed_weights(model: HookedTransformer, asked: Asked) -> Any:
    tokens, _, _ = in_text(model)
    before = model(tokens).log_softmax(-1)
    after = model.process_weights_()(tokens).log_softmax(-1)
    return before, after, [model.all_composition_scores(mode) for mode in ("Q", "K", "V")], model.accumulated_bias(1)


@call("causal")
def generate(model: HookedTransformer, asked: Asked) -> Any:
    tokens, _, _ = in_text(model)
    return model.generate(tokens, 3, do_sample=False, eos_token_id=1, verbose=False)


# ---- inference


def as_written(filled: list[Filled]) -> Any:
    logs = [torch.tensor(one.log_probabilities, dtype=torch.float32) for one in filled]  # in which they are computed
    return [one.tokens for one in filled], logs


@call()
def predictions(model: HookedTransformer, asked: Asked) -> Any:
    return [predict(model, asked.queries, order) for order in orders(model.cfg)]


@call()
def infillings(model: HookedTransformer, asked: Asked) -> Any:
    found = []
    for order in orders(model.cfg):
        found.append(as_written(infill(model, asked.queries, order)))
        ends = [{1, 2}] * len(asked.queries) if model.cfg.is_causal else []
        found.append(as_written(infill_any_length(model, asked.queries, order, longest=2, ends=ends)))
    return found


@call()
def split_answers(model: HookedTransformer, asked: Asked) -> Any:
    queries = [pair.forward for pair in asked.pairs]
    candidates = WORLD.candidates(queries)
    return split_by_role(model, queries, candidates), token_log_probabilities(model, queries, candidates)


@call()
def bounds(model: HookedTransformer, asked: Asked) -> Any:
    spans = [pair.forward.answer_span for pair in [*asked.pairs[:3], *asked.named]]
    return bound(model, asked.sentences, n_draws=3), bound(model, asked.sentences, spans, n_draws=3)


@call(*BIDIRECTIONAL)
def compared_answers(model: HookedTransformer, asked: Asked) -> Any:
    return compare_answers(model, asked.pairs, WORLD)


@call(*BIDIRECTIONAL)
def denoised(model: HookedTransformer, asked: Asked) -> Any:
    tokens, _, real = in_text(model)
    mask, device = real & (tokens > 5), model.cfg.device
    given = tokens.masked_fill(mask, WORLD.config.mask_token_id).to(device), real.to(device)
    certain: tuple[FillOrder, ...] = ("confidence", "left_to_right")
    return [denoise(model, given[0], steps=3, order=order, attention_mask=given[1]) for order in certain]


@call(*BIDIRECTIONAL)
def denoised_at_random(model: HookedTransformer, asked: Asked) -> Any:
    """Devices draw differently, so only what is filled is the same."""
    tokens = in_text(model)[0].to(model.cfg.device)
    generator = seeded(0) if tokens.device.type == PRETENDED else torch.Generator(tokens.device).manual_seed(0)
    done = denoise(model, tokens, steps=2, order="random", temperature=1.0, generator=generator)
    return done.filled_at > 0


# ---- measures


@call()
def found_routes(model: HookedTransformer, asked: Asked) -> Any:
    return routes.compute_routes(model, asked.queries)


@call(*BIDIRECTIONAL)
def route_correlations(model: HookedTransformer, asked: Asked) -> Any:
    measures = routes.score_correlation, routes.route_correlation
    return [measure(model, pairs) for measure in measures for pairs in (asked.pairs, asked.named)]


@call()
def scores_of_tokens(model: HookedTransformer, asked: Asked) -> Any:
    entities, last = torch.arange(WORLD.config.n_entities), model.cfg.n_layers - 1
    return [routes.score_matrix(model, entities, entities, offset, layer) for offset, layer in ((-2, 0), (0, last))]


@call()
def found_evidence(model: HookedTransformer, asked: Asked) -> Any:
    entities, positions = torch.arange(WORLD.config.n_entities), torch.arange(3)
    matrix = evidence.evidence_matrix(model, entities, entities, positions)
    unplaced = evidence.evidence_matrix(model, entities, entities.to(model.cfg.device))
    parts = evidence.decompose_logits(model, collate(asked.queries, model.cfg), entities)
    queries = [pair.forward for pair in asked.pairs]
    return [
        evidence.readout_directions(model),
        evidence.readout_directions(model, entities),
        matrix,
        unplaced,
        evidence.position_index(matrix),
        evidence.position_share(matrix),
        evidence.relation_evidence(model, WORLD, int(WORLD.facts[0, 1]), "left"),
        evidence.compute_evidence(model, asked.queries, entities),
        (parts, parts.total()),
        evidence.storage_coupling(model, asked.pairs),
        evidence.evidence_scores(model, queries, WORLD.candidates(queries)),
        evidence.margin_and_rank(model, queries, WORLD.candidates(queries)),
    ]


@call(*BIDIRECTIONAL)
def evidence_of_pairs(model: HookedTransformer, asked: Asked) -> Any:
    entities = torch.arange(WORLD.config.n_entities)
    coupling = evidence.storage_coupling(model, asked.named)
    return evidence.pair_position_index(model, asked.named, entities), coupling


@call()
def evidence_for_answers(model: HookedTransformer, asked: Asked) -> Any:
    contexts = torch.tensor([len(query.answer) for query in asked.queries])
    return answer_evidence(model, asked.queries), answer_evidence(model, asked.queries, contexts)


@call()
def answered(model: HookedTransformer, asked: Asked) -> Any:
    ends = frozenset({1, 2})
    questions = [answers.Question(pair.reverse, pair, "positional", "reverse", pair.side, ends) for pair in asked.named]
    found = answers.answer_all(model, questions)
    return {str(name): one.map(lambda values: values.astype(np.float32)) for name, one in found.items()}


@call("deep", "causal")
def routes_of_facts(model: HookedTransformer, asked: Asked) -> Any:
    sample = fact_routes.same_lengths(asked.pairs, [0] * len(asked.pairs))
    found = fact_routes.compute_fact_routes(model, asked.pairs, sample)
    return found, fact_routes.rope_predictions(model, asked.pairs, sample)


@call(*BIDIRECTIONAL)
def parities(model: HookedTransformer, asked: Asked) -> Any:
    found = parity.score_parity(model, asked.pairs)
    coupled = None if model.cfg.use_qk_norm else parity.route_coupling(model, asked.pairs)
    return found, parity.direction_selectivity(found, asked.pairs), coupled


@call(*ROTATING)
def rotations(model: HookedTransformer, asked: Asked) -> Any:
    distance = torch.arange(1.0, 4.0, dtype=torch.float64)
    return [
        compute_content(model, asked.queries),
        distance_correlation(model, asked.named, distance),
        isotropy(model, asked.pairs),
        plane_scores(model, asked.queries),
        parity.rope_parity(model, asked.pairs),
        parity.plane_parity(model, asked.pairs),
        parity.plane_spectrum(model, asked.pairs),
        parity.plane_energy(model, asked.pairs),
    ]


@call(*BIDIRECTIONAL)
def compared_heads(model: HookedTransformer, asked: Asked) -> Any:
    others = WORLD.candidates([pair.forward for pair in asked.pairs])
    contributions = heads.compute_contributions(model, asked.pairs, others)
    reading = heads.compute_reading(model, asked.pairs, others)
    return contributions, reading, heads.compare_heads(model, asked.pairs, WORLD)


@call()
def scored_heads(model: HookedTransformer, asked: Asked) -> Any:
    return head_scores(model, asked.pairs), head_scores(model, asked.named)


@call()
def seen_by_a_lens(model: HookedTransformer, asked: Asked) -> Any:
    sides = [[pair.forward for pair in asked.named], [pair.reverse for pair in asked.named]]
    return [lens(model, queries, other_answers(asked.named, queries)) for queries in sides]


@call()
def found_sinks(model: HookedTransformer, asked: Asked) -> Any:
    return sinks(model, asked.queries, threshold=1.0)


@call(*BIDIRECTIONAL)
def watched_sinks(model: HookedTransformer, asked: Asked) -> Any:
    queries = [trajectory.source_only(pair.reverse, model.cfg) for pair in asked.named]
    return watch_sinks(model, queries, steps=3, threshold=1.0)


@call()
def representations(model: HookedTransformer, asked: Asked) -> Any:
    return compute_representations(model, asked.queries)


@call(*BIDIRECTIONAL)
def all_signatures(model: HookedTransformer, asked: Asked) -> Any:
    pairs = asked.pairs
    return [
        signatures.evidence(model, pairs, WORLD),
        signatures.position(model, pairs, WORLD),
        signatures.route(model, pairs),
        signatures.score(model, pairs),
        signatures.alignment(model, pairs),
    ]


@call(*BIDIRECTIONAL)
def denoised_answers(model: HookedTransformer, asked: Asked) -> Any:
    queries = [trajectory.source_only(pair.reverse, model.cfg) for pair in asked.named]
    return trajectory.denoise_answers(model, queries, stages=2)


# ---- gradients


@call()
def inner_products(model: HookedTransformer, asked: Asked) -> Any:
    forward, reverse = [pair.forward for pair in asked.named], [pair.reverse for pair in asked.named]
    return gradients.gram(model, forward, reverse).inner, gradients.gram(model, asked.queries).inner


@call("rope")
def inner_products_of_a_scheme(model: HookedTransformer, asked: Asked) -> Any:
    """Of what is learnt about the positions of queries and keys, too."""
    model.pos_embed = XPos(model.cfg).to(model.cfg.device)
    return gradients.gram(model, asked.queries).inner


@call()
def inner_products_of_attention(model: HookedTransformer, asked: Asked) -> Any:
    attended = gradients.SourceAttention(model.cfg.n_layers - 1, 0), gradients.SourceAttention(0)
    return [gradients.gram(model, asked.queries, loss=attention).inner for attention in attended]


@call()
def alignments(model: HookedTransformer, asked: Asked) -> Any:
    aligned = gradients.gradient_alignment(model, asked.named)
    return aligned.pair_cosine(layers=[0]), aligned.fact_cosine(gradients.STORAGE), aligned.gram.inner


@call()
def mean_gradients(model: HookedTransformer, asked: Asked) -> Any:
    gradient = gradients.mean_gradient(model, asked.queries)
    drawn = gradients.random_direction(gradient, seed=0)
    return gradient, drawn, gradients.layer_cosines(model, asked.named, {"storage": gradients.STORAGE})


@call()
def first_order_steps(model: HookedTransformer, asked: Asked) -> Any:
    steps = gradients.first_order(model, asked.named, [1e-2])
    return steps, gradients.contrast_steps(model, asked.named, [1e-3, 1e-1], gradients.STORAGE, seed=0)


@call()
def influences(model: HookedTransformer, asked: Asked) -> Any:
    queries = [pair.reverse for pair in asked.named]
    of_queries = gradients.influence(model, asked.queries[:5], queries)
    traced = gradients.traced_influence([(model, 0.5), (model, 0.25)], asked.sentences, queries, n_draws=2)
    return of_queries, traced


@call()
def learning_path(model: HookedTransformer, asked: Asked) -> Any:
    losses = {"forward": [pair.forward for pair in asked.named], "reverse": [pair.reverse for pair in asked.named]}
    path = gradients.LearningPath(model, losses, tolerance=1e-3)  # with which rounding decides no halving
    for seed in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (0.01 * torch.randn(parameter.shape, generator=seeded(seed))).to(parameter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # where other experts are chosen, the loss jumps
            path.advance()
    return path.learnt, path.change


# ---- interventions


for _name in ("transplant_routes", "share_routes", "ablate_storage", "ablate_routes", "patch_heads", "patch_positions"):

    def _edit(model: HookedTransformer, asked: Asked, edit: Any) -> Any:
        return edit(model, asked.pairs), edit(model, asked.named)

    call(*BIDIRECTIONAL, name=_name)(partial(_edit, edit=getattr(interventions, _name)))


@call("rope", "deep", "normed", "buckets")
def project_even_routes(model: HookedTransformer, asked: Asked) -> Any:
    some = [(0, 1), (model.cfg.n_layers - 1, 2)]
    effects = [interventions.project_even_routes(model, pairs, heads=some) for pairs in (asked.pairs, asked.named)]
    return interventions.project_even_routes(model, asked.pairs), effects


@call(*BIDIRECTIONAL)
def edit_heads(model: HookedTransformer, asked: Asked) -> Any:
    specific = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, dtype=torch.bool)
    specific[0, 1] = True
    return interventions.edit_heads(model, asked.pairs, specific)


@call(*BIDIRECTIONAL)
def effect_of_hooks(model: HookedTransformer, asked: Asked) -> Any:
    hooks = [(f"blocks.{layer}.attn.hook_z", lambda z, hook: z / 2) for layer in range(model.cfg.n_layers)]
    return interventions.effect(model, asked.named, hooks)


# ---- training


@call()
def training_steps(model: HookedTransformer, asked: Asked) -> Any:
    generator, steps = seeded(5), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    objectives: tuple[Objective, ...] = get_args(Objective)
    for objective in objectives[3:] if model.cfg.is_causal else objectives[:3]:
        found = training_loss(model, WORLD.sample(8, generator), objective, generator)
        optimizer.zero_grad()
        found.backward()
        steps.append((found, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        steps.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        optimizer.step()
    return steps


def run_config(model: HookedTransformer, **changes: Any) -> TrainConfig:
    # The gradient of a key's bias is 0 where RoPE does not turn it, but for rounding, which Adam makes large.
    kind = ModelConfig(**{**model.cfg.model_dump(), "n_ctx": WORLD.config.seq_len, "qkv_bias": False})
    objective: Objective = "causal" if model.cfg.is_causal else "any_order"
    sizes = {"steps": 3, "batch_size": 8, "n_checkpoints": 2, "warmup": 1}
    return TrainConfig(model=kind, facts=WORLD.config, objective=objective, **{**sizes, **changes})


@call("rope", "causal")
def trained_run(model: HookedTransformer, asked: Asked) -> Any:
    with TemporaryDirectory() as folder:
        run = train(run_config(model), root=Path(folder), device=model.cfg.device, progress=False)
        weights = [dict(run.model(step, model.cfg.device).named_parameters()) for step in run.steps]
        return weights, [{name: np.float32(value) for name, value in row.items()} for row in run.metrics()]


@call(*(name for name in MODELS if name not in ("experts", "blocks")))
def trained_together(model: HookedTransformer, asked: Asked) -> Any:
    """On a GPU the last steps are one launch each."""
    configs = [run_config(model, seed=seed, grad_clip=0.1 * (seed + 1), warmup=2) for seed in range(3)]
    members = [Trainee(config, FactWorld(config.facts, config.seed), model.cfg.device) for config in configs]
    ensemble = Ensemble(members)
    losses = [ensemble.advance(step) for step in range(1, 11)]
    ensemble.update_members()
    return losses, [dict(member.model.named_parameters()) for member in members]


# ---- models from elsewhere


@call("rope")
def loaded_checkpoints(model: HookedTransformer, asked: Asked) -> Any:
    """A small one, and one whose experts are a tensor each."""
    with TemporaryDirectory() as folder:
        save_checkpoint(random_model(**SHAPE), Path(folder, "own"), "mdm_interp")
        write_llada2(Path(folder, "experts"), block_size=4, mask_token_id=5)
        loaded = [load_checkpoint(Path(folder, name), model.cfg.device, model.cfg.dtype) for name in ("own", "experts")]
        return [(dict(one.named_parameters()), one(in_text(model)[0])) for one in loaded]


@call("deep")
def asked_bridge(model: HookedTransformer, asked: Asked) -> Any:
    """In float32, as parts of a bridge compute in it whatever it is given."""
    kind = random_model(**SHAPE, d_mlp=24, n_key_value_heads=2)
    bridge = native_peer(kind).to(model.cfg.device, print_details=False)
    bridge.ln_final.w = bridge.ln_final.original_component.weight  # which it keeps, and on a GPU is moved in place
    return [
        evidence.compute_evidence(bridge, asked.queries, torch.arange(WORLD.config.n_entities)),
        distance_correlation(bridge, asked.named, torch.arange(1.0, 4.0)),
        gradients.gram(bridge, asked.queries).inner,
        sinks(bridge, asked.queries, threshold=1.0),
        predict(bridge, asked.queries),
    ]


OWN_MODELS = ("trained_run", "trained_together", "loaded_checkpoints", "asked_bridge")
"""Calls that make models of their own."""


# ---- pages

PACKED, ROUNDED = ("patterns", "values"), ("lens", "denoised")
"""What pages write in steps: of 16 bits, and of four digits."""


def on_page(page: Page) -> Any:
    """The numbers of a page's data, in steps or as rounded as they are in JSON."""

    def numbers(data: Any, key: str = "") -> Any:
        if isinstance(data, Mapping):
            return {name: numbers(part, name if name in (*PACKED, *ROUNDED) else key) for name, part in data.items()}
        if isinstance(data, (list, tuple)):
            return [numbers(part, key) for part in data]
        if isinstance(data, str):
            return np.frombuffer(base64.b64decode(data), "<u2") if key in PACKED else None
        if isinstance(data, float):
            return np.uint16(round(1e4 * data)) if key in ROUNDED else np.float32(data)
        return data

    return numbers(page.data)


@call()
def attention_page(model: HookedTransformer, asked: Asked) -> Any:
    shown = [viz.attention(model, query) for query in (asked.pairs[0].forward, asked.named[0].reverse)]
    return [on_page(page) for page in shown]


@call()
def routes_page(model: HookedTransformer, asked: Asked) -> Any:
    return on_page(viz.routes(model, asked.pairs[0])), on_page(viz.routes(model, asked.named[0]))


@call(*BIDIRECTIONAL)
def trajectory_page(model: HookedTransformer, asked: Asked) -> Any:
    return on_page(viz.trajectory(model, asked.named[0].forward))


@call("rope", "deep", "learned", "causal", "blocks")
def explorer_page(model: HookedTransformer, asked: Asked) -> Any:
    return on_page(viz.explore(model, asked.pairs[:3]))


@call("rope", "causal")
def influence_page(model: HookedTransformer, asked: Asked) -> Any:
    queries = [pair.forward for pair in asked.named] + [pair.reverse for pair in asked.named]
    found = gradients.influence(model, asked.sentences, queries, n_draws=2)
    return on_page(viz.influence(model, asked.sentences, asked.named, found))


PAGES = ("attention_page", "routes_page", "trajectory_page", "explorer_page", "influence_page")
"""Calls whose numbers are rounded."""

CASES = [(name, kind) for name, (_, kinds) in CALLS.items() for kind in kinds]


# ---- what calls return


def returned(name: str, model: HookedTransformer) -> dict[str, Tensor]:
    """Call a model, and name every tensor and number that comes back."""
    function, _ = CALLS[name]
    found = dict(tensors_in(function(model, Asked.of(model))))
    assert found
    return found


def apart(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, str]:
    """Say where and how two calls of a model in `dtype` differ."""
    assert expected.keys() == got.keys()
    told = {path: difference(expected[path], got[path], dtype) for path in expected}
    return {path: said for path, said in told.items() if said}


def tensors_in(result: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Name every tensor and number of a result."""
    if isinstance(result, Tensor):
        yield path, result.detach().cpu()
    elif isinstance(result, (bool, int, float, np.generic, np.ndarray)):
        yield path, torch.from_numpy(np.array(result))
    elif is_dataclass(result):
        for part in fields(result):
            yield from tensors_in(getattr(result, part.name), f"{path}.{part.name}")
    elif isinstance(result, Mapping):
        for name, part in result.items():
            yield from tensors_in(part, f"{path}[{name!r}]")
    elif isinstance(result, (list, tuple)):
        for place, part in enumerate(result):
            yield from tensors_in(part, f"{path}[{place}]")


def difference(one: Tensor, other: Tensor, dtype: torch.dtype) -> str | None:
    """Say how two tensors differ by more than rounding: by 1e-5 if they or the model are in float32, else by 1e-10,
    times the largest entry where that is above 1; by one step in what a page packs."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return f"{one.dtype}{list(one.shape)} and {other.dtype}{list(other.shape)}"
    if one.dtype == torch.uint16:
        allowed, one, other = 1.0, one.double(), other.double()
    elif one.is_floating_point():
        finite = one[one.isfinite()].abs()
        largest = max(1.0, finite.max().item() if len(finite) else 0.0)
        allowed = largest * (1e-10 if one.dtype == dtype == torch.float64 else 1e-5)
    else:
        allowed = 0.0
    apart = torch.isclose(one, other, rtol=0, atol=allowed, equal_nan=True).logical_not()
    return f"{int(apart.sum())} of {one.numel()}, up to {(one - other)[apart].abs().max():.2g}" if apart.any() else None


# ---- what there is to call

REACHED = {"capture", "read_embedding", "read_out", "require_rope", "gradients_of", "layer_by_layer"}
REACHED |= {"recording", "mean_loss", "entries"}
REACHED |= {"fill", "fill_blanks", "log_probability"}
REACHED |= {"transplanted_routes", "shared_routes", "even_routes", "ablated_storage", "ablated_routes"}
"""What measures run through others."""
APART = {"bridge_backward", "questions", "uniform_share", "offsets_of", "is_mirrored", "hook_names", "collate_pairs"}
"""What is for bridges, or asks a model nothing but its config."""


def asking() -> set[str]:
    """The public functions of measures, inference and interventions that ask a model something, and pages of it."""
    found = {f"viz.{name}" for name in dir(viz) if _first_parameter(getattr(viz, name)) == "model"}
    for package in (measures, inference, interventions):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for name, function in inspect.getmembers(importlib.import_module(module.name), inspect.isfunction):
                own = function.__module__ == module.name and not name.startswith("_")
                if own and _first_parameter(function) in ("model", "checkpoints"):
                    found.add(name)
    assert found >= REACHED | APART
    return found - REACHED - APART


def _first_parameter(function: Any) -> str:
    return next(iter(inspect.signature(function).parameters), "") if inspect.isfunction(function) else ""


def named_in(path: Path) -> set[str]:
    """All names in a file, and all texts that could be one."""
    nodes = list(ast.walk(ast.parse(path.read_bytes())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {name for node in nodes if isinstance(node, ast.Attribute) for name in (node.attr, ast.unparse(node))}
    return names | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
