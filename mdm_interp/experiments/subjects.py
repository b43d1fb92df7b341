"""What analyses measure: a lab's runs, and probes, which are checkpoints and the facts they are asked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from rich.progress import Progress

from mdm_interp.checkpoints import load_checkpoint
from mdm_interp.config import DemoConfig, DemoWorld, TextFormat, TrainConfig
from mdm_interp.data.prompts import FactTable, FactTemplates, Kind, Prompts, load_facts, make_prompts
from mdm_interp.data.queries import Direction, Query, QueryPair
from mdm_interp.errors import UserError
from mdm_interp.experiments.grids import QUICK_SEEDS, is_quick
from mdm_interp.experiments.results import CheckpointOrigin
from mdm_interp.files import DEFAULT_ROOT, json_digest
from mdm_interp.models.bridge import hooked
from mdm_interp.parallel import Workers, find_place, progress_bars, side_by_side
from mdm_interp.shards import Opening, shared
from mdm_interp.stats.resampling import FactSample
from mdm_interp.tensors import weights_digest
from mdm_interp.training.demo import train_demo
from mdm_interp.training.loop import train_all
from mdm_interp.training.runs import Run
from mdm_interp.training.text import TextBars, TextStep, is_written


@dataclass(frozen=True)
class Lab:
    """Where analyses get their runs: seeds, run store and device."""

    n_seeds: int = QUICK_SEEDS
    root: Path = DEFAULT_ROOT
    device: str = "cpu"
    workers: Workers = None
    """How many processes, or the address of a Dask scheduler, whose workers reach `root` under the same path."""

    @property
    def seeds(self) -> range:
        return range(self.n_seeds)

    def runs(self, configs: Sequence[TrainConfig]) -> list[Run]:
        """Return the finished runs of `configs`; what the store lacks is trained first."""
        return train_all(configs, root=self.root, device=self.device, workers=self.workers)

    def folder(self, digest: str) -> Path:
        """Find a run or, below `demos`, a demo checkpoint: the name of either's folder ends in its digest."""
        return next(self.root.glob(f"demos/*-{digest}"), self.root / digest)


KINDS: tuple[Kind, ...] = ("positional", "relational")


@dataclass(frozen=True)
class Probe:
    """A model and what it is asked."""

    name: str
    """The checkpoint's."""
    model: Any
    """As :func:`~mdm_interp.models.bridge.hooked` returns it."""
    prompts: Mapping[Kind, Prompts]
    """Both kinds of reverse query, kept apart."""
    twin: Probe | None = None
    """Another model, asked about the same facts."""

    @classmethod
    def of(
        cls,
        name: str,
        model: Any,
        table: FactTable,
        tokenizer: Any = None,
        twin: Probe | None = None,
        *,
        chat: bool = False,
    ) -> Probe:
        """Return a model, asked about the facts of a table.

        Args:
            tokenizer: Default: the model's.
            chat: Whether facts are stated in the tokenizer's chat template.

        Raises:
            UserError: there is no tokenizer, or no fact can be asked.
        """
        model, tokenizer = hooked(model), tokenizer or model.tokenizer
        if tokenizer is None:
            raise UserError(f"{name}: has no tokenizer, which the facts are phrased in; add its tokenizer.json")
        prompts: dict[Kind, Prompts] = {
            kind: make_prompts(table, tokenizer, model.cfg, kind, chat=chat) for kind in KINDS
        }
        return cls(name, model, prompts, twin)

    def pairs(self, kind: Kind) -> list[QueryPair]:
        return self.prompts[kind].pairs

    def require_twin(self) -> Probe:
        """Return the twin.

        Raises:
            UserError: there is none.
        """
        if self.twin is None:
            raise UserError(f"twin: {self.name} has none to be compared with; name a second checkpoint")
        return self.twin

    def asked_alike(self, kind: Kind, direction: Direction) -> tuple[list[Query], list[Query], FactSample]:
        """Return what the model and its twin are asked in the same words, each in its own form: forward for the right
        entity, in reverse for the left one, which comes last there. Facts and templates that one of them cannot be
        asked are left out.

        Raises:
            UserError: there is no twin, or nothing that both can be asked.
        """
        twin = self.require_twin()
        mine, theirs = (side.prompts[kind].answered_last(direction) for side in (self, twin))
        common = [place for place in mine if place in theirs]
        if not common:
            raise UserError(f"facts: {self.name} and {twin.name} can be asked no {kind} query both; use other facts")
        own, other = ([getattr(pairs[place], direction) for place in common] for pairs in (mine, theirs))
        sample = FactSample.of([mine[place] for place in common], [template for _, template in common])
        return own, other, sample

    def origin(self) -> CheckpointOrigin:
        """Return what a result says of a probe: the model, what was asked and what could not be."""
        skipped = {kind: list(map(str, prompts.skipped)) for kind, prompts in self.prompts.items()}
        asked = repr({kind: prompts.pairs for kind, prompts in self.prompts.items()})
        return CheckpointOrigin(
            checkpoint=self.name,
            model=self.model.cfg.model_dump(mode="json"),
            digest=fingerprint(self.model, asked),
            facts=len({pair.fact for prompts in self.prompts.values() for pair in prompts.pairs}),
            pairs={kind: len(prompts.pairs) for kind, prompts in self.prompts.items()},
            skipped={kind: len(reasons) for kind, reasons in skipped.items()},
            reasons={kind: reasons[:REASONS] for kind, reasons in skipped.items()},
            twin=self.twin.origin() if self.twin else None,
        )


def fingerprint(model: Any, asked: str) -> str:
    """Return 16 hexadecimal digits that depend on a model's config and every one of its weights, as they are now, and
    on what it is asked."""
    return json_digest([model.cfg.model_dump(mode="json"), weights_digest(model.state_dict()), asked])


REASONS = 20
"""How many of the reasons for which something was skipped a result quotes."""


def open_probe(
    checkpoint: str | Path,
    facts: str | Path,
    *,
    templates: FactTemplates | str | Path | None = None,
    limit: int | None = None,
    twin: str | Path | None = None,
    chat: bool = False,
    **loading: Any,
) -> Probe:
    """Load a checkpoint and phrase the facts in its tokens.

    Args:
        checkpoint: Folder or hub id, as for :func:`~mdm_interp.checkpoints.load_checkpoint`.
        facts: A CSV, as for :func:`~mdm_interp.data.prompts.load_facts`.
        templates: How to state them.
        limit: Ask about the first so many usable facts only.
        twin: A second checkpoint, asked about the same facts.
        chat: Whether facts are stated in the tokenizers' chat templates, as instruct checkpoints expect.
        loading: `device`, `dtype`, `device_map` of `load_checkpoint`, and others of its options, which are not the
            twin's.

    Raises:
        UserError: a checkpoint or the facts cannot be used, or a checkpoint has no tokenizer.
    """
    table = load_facts(facts, templates, limit=limit)
    name, model, other = Path(checkpoint).absolute().name, load_checkpoint(checkpoint, **loading), None
    if twin is not None:
        of_twin = Path(twin).absolute().name
        of_twin += " (twin)" if of_twin == name else ""  # run1/final and run2/final stay apart
        other = Probe.of(of_twin, load_checkpoint(twin, **_of_twin(loading)), table, chat=chat)
    return Probe.of(name, model, table, twin=other, chat=chat)


def shared_probe(
    probe: Probe, checkpoint: str | Path, twin: str | Path | None, shards: int, workers: Workers, **loading: Any
) -> contextlib.AbstractContextManager[None]:
    """Share out what a probe and its twin are asked, while this lasts (:func:`~mdm_interp.shards.shared`).

    Args:
        checkpoint, twin, loading: As of :func:`open_probe`; `device` is the workers'.
        shards: Into how many parts the facts are divided.
        workers: How many processes, or the address of a Dask scheduler.
    """
    sides = [(probe, checkpoint, loading)]
    if probe.twin is not None and twin is not None:
        sides.append((probe.twin, twin, _of_twin(loading)))
    openings = {}
    for side, source, options in sides:
        there = str(Path(source).absolute()) if Path(source).exists() else str(source)
        openings[side.model] = Opening(load_checkpoint, there, options)
    return shared(openings, shards, workers)


def _of_twin(loading: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of loading that are a twin's, too."""
    return {name: value for name, value in loading.items() if name in ("device", "dtype", "device_map")}


def each_checkpoint(probes: Iterable[Probe]) -> list[Probe]:
    """Return the probes and their twins, every checkpoint once."""
    members = (member for probe in probes for member in (probe, probe.twin) if member is not None)
    return list({member.name: member for member in members}.values())


DEMOS: dict[DemoWorld, DemoConfig] = {
    "memorised": DemoConfig(),
    "varied": DemoConfig(world="varied", n_families=40, n_control=28, n_bpe=900, steps=6000),
}
"""The demo checkpoints of `reproduce`, but for format and seed. The varied one was chosen by what pretraining data look
like: many facts, most of them stated both ways, each less often. Its steps are what learning forward answers takes."""
TWIN: TextFormat = "qwen2"
"""The format of the demo MDMs' causal twin."""
SEEDS_OF_ANSWERS = 3
"""How many seeds of the varied demo in LLaDA's format are asked for their answers."""


def demos(seeds: Sequence[int]) -> list[DemoConfig]:
    """Return the demo checkpoints of `reproduce`, of the first seed, their intervals being over facts: of either world
    LLaDA's format and the twin's, and Dream's memorised one. A quick run has the memorised world alone, without Dream,
    half of the families, and a quarter of the steps."""
    memorised, varied = DEMOS["memorised"], DEMOS["varied"]
    wanted = [(memorised, ("llada", TWIN, "dream")), (varied, ("llada", TWIN))]
    if is_quick(seeds):
        sizes = {"n_families": memorised.n_families // 2, "n_control": memorised.n_control // 2}
        wanted = [(memorised.model_copy(update={**sizes, "steps": memorised.steps // 4}), ("llada", TWIN))]
    return [
        world.model_copy(update={"format": format, "seed": seeds[0]}) for world, formats in wanted for format in formats
    ]


def demos_of_several_seeds(seeds: Sequence[int]) -> list[DemoConfig]:
    """Return :func:`demos`, and the varied one in LLaDA's format of further seeds."""
    found = demos(seeds)
    varied = [config for config in found if (config.world, config.format) == ("varied", "llada")]
    return found + [one.model_copy(update={"seed": seed}) for one in varied for seed in seeds[1:SEEDS_OF_ANSWERS]]


@dataclass(frozen=True)
class Demo:
    """A demo checkpoint of the run store, trained or not yet."""

    config: DemoConfig
    folder: Path

    @classmethod
    def of(cls, config: DemoConfig, root: str | Path) -> Demo:
        return cls(config, Path(root).absolute() / "demos" / f"{config.format}-{config.digest()}")

    @property
    def finished(self) -> bool:
        return is_written(self.folder)

    def train(self, device: str, report: Callable[[TextStep], Any]) -> None:
        """Train it here, or what is missing of it."""
        train_demo(self.folder, self.config, device=device, report=lambda *at: report(TextStep(self.config, *at)))

    def probe(self, device: str = "cpu") -> Probe:
        """Open it, asked about the facts that training states one way."""
        return replace(open_probe(self.folder, self.folder / "facts.csv", device=device), name=demo_name(self.config))


def demo_name(config: DemoConfig) -> str:
    """Return what results and figures call a demo checkpoint."""
    share, usual = (one.n_control / one.n_families for one in (config, DEMOS[config.world]))
    parts = [f"demo {config.format}", *([config.world] if config.world != "memorised" else [])]
    parts += [f"{share:.0%} both ways"] * (share != usual) + [f"seed {config.seed}"] * (config.seed > 0)
    return ", ".join(parts)


def train_demos(configs: Sequence[DemoConfig], lab: Lab) -> list[Demo]:
    """Return the demo checkpoints of `configs`; those that the run store lacks are trained first."""
    every = [Demo.of(config, lab.root) for config in configs]
    if missing := [demo for demo in every if not demo.finished]:
        n, device = find_place(lab.workers, lab.device)
        with progress_bars() as progress:
            tasks = [(demo, device) for demo in missing]
            side_by_side(Demo.train, tasks, workers=lab.workers or n, show=demo_bars(progress).show)
    return every


def demo_bars(progress: Progress) -> TextBars:
    """Return a progress bar for each demo checkpoint in training."""
    return TextBars(progress, lambda config: demo_name(cast(DemoConfig, config)))
