"""What training sentences do to a probe's queries, in files: numbers, a table and a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from mdm_interp.data.prompts import Kind
from mdm_interp.data.queries import Direction, queries_of
from mdm_interp.data.sentences import read_sentences
from mdm_interp.errors import UserError
from mdm_interp.experiments.subjects import Probe
from mdm_interp.files import write_text
from mdm_interp.measures.gradients.influence import traced_influence
from mdm_interp.viz.pages.influence import influence as influence_page
from mdm_interp.viz.pages.subject import Subject
from mdm_interp.viz.words import counted


def write_influence(
    probe: Probe,
    sentences: str | Path,
    out: str | Path,
    *,
    kind: Kind,
    top: int,
    n_draws: int,
    seed: int,
    rate: float = 1.0,
    earlier: Sequence[tuple[str, float, Callable[[], Any]]] = (),
) -> Path:
    """Measure the influence of a file's sentences on the forward and reverse queries of a probe, and write it: at the
    probe's checkpoint, or summed over several of its training
    (:func:`~mdm_interp.measures.gradients.influence.traced_influence`).

    `influence.csv` has a row per query, sentence among the strongest, layer and group
    (:meth:`~mdm_interp.measures.gradients.influence.Influence.rows`). `influence.json` says what was asked of which
    model, and the strongest sentences of each query; `influence.html` shows them.

    Args:
        sentences: A text file, a sentence on each line.
        kind: Of reverse queries.
        top: How many sentences of either sign to report of each query.
        n_draws, seed: As of :func:`~mdm_interp.measures.gradients.influence.influence`.
        rate: The learning rate at the probe's checkpoint.
        earlier: Other checkpoints of its training: name, learning rate, and what loads it when its turn comes.

    Returns:
        The page.

    Raises:
        UserError: the sentences cannot be read, or do not fit the model; or another checkpoint is not
            of the same architecture and tokens.
    """
    model, out, pairs, prompts = probe.model, Path(out), probe.pairs(kind), probe.prompts[kind]
    tokenizer = model.tokenizer
    training = read_sentences(sentences, tokenizer, model.cfg)
    ways = get_args(Direction)
    queries = [query for way in ways for query in queries_of(pairs, way)]

    def checkpoints() -> Iterator[tuple[Any, float]]:
        for name, of_rate, load in earlier:
            one = load()
            if one.cfg != model.cfg or one.tokenizer is None or one.tokenizer.get_vocab() != tokenizer.get_vocab():
                raise UserError(
                    f"{name}: has another architecture or other tokens than {probe.name}; give checkpoints of one "
                    "training"
                )
            yield one, of_rate
        yield model, rate

    found = traced_influence(
        checkpoints(), training, queries, n_draws=n_draws, seed=seed, kept=tokenizer.all_special_ids
    )
    asked = [
        {"direction": way, "fact": pair.fact, "side": pair.side, "template": template}
        for way in ways
        for pair, template in zip(pairs, prompts.templates, strict=True)
    ]
    strongest = [
        {
            sign: [{"sentence": sentence, "influence": found.total[sentence, at].item()} for sentence in sentences]
            for sign, sentences in zip(("helping", "hurting"), found.top(at, top), strict=True)
        }
        for at in range(len(queries))
    ]
    said = {
        **probe.origin().model_dump(mode="json"),
        "checkpoints": [{"checkpoint": name, "rate": of_rate} for name, of_rate, *_ in (*earlier, (probe.name, rate))],
        "kind": kind,
        "n_draws": n_draws,
        "seed": seed,
        "sentences": [tokenizer.decode(tokens).strip() for tokens in training],
        "queries": [
            of
            | {"query": tokenizer.decode(query.tokens).strip(), "answer": tokenizer.decode(query.answer).strip()}
            | moved
            for of, query, moved in zip(asked, queries, strongest, strict=True)
        ],
    }
    rows = [asked[row["query"]] | row for row in found.rows(top)]
    write_text(out / "influence.json", json.dumps(said, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "influence.csv", pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
    after = f", summed with {counted(len(earlier), 'earlier checkpoint')}" if earlier else ""
    subject = replace(Subject.of(model), name=f"{probe.name}{after}")
    return influence_page(subject, training, pairs, found, top=top).save(out / "influence.html")
