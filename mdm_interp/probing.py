"""Probes: a checkpoint, the natural-language facts it is asked, and the analyses of both.

probe = open_probe("GSAI-ML/LLaDA-8B-Base", "parent_child_pairs.csv", device="cuda", dtype="bfloat16")
result = analysis.probe(probe, Path("out"))        # analysis: a CheckpointAnalysis
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mdm_interp.analysis import Analysis, Lab
from mdm_interp.bridge import hooked
from mdm_interp.checkpoints import load_checkpoint
from mdm_interp.demo import DemoConfig, train_demo
from mdm_interp.files import UserError
from mdm_interp.presets import is_quick
from mdm_interp.prompts import FactTable, FactTemplates, Kind, Prompts, load_facts, make_prompts
from mdm_interp.queries import QueryPair
from mdm_interp.results import CheckpointOrigin, Result
from mdm_interp.workers import default_workers, progress_bars, side_by_side

KINDS: tuple[Kind, ...] = ("positional", "relational")
DEMO = DemoConfig()
"""What the demo checkpoints of `reproduce` have in common."""
TWIN: Literal["qwen2"] = "qwen2"
"""The format of the demo MDMs' causal twin."""


@dataclass(frozen=True)
class Probe:
    """A model and what it is asked."""

    name: str
    """The checkpoint's."""
    model: Any
    """As :func:`~mdm_interp.bridge.hooked` returns it."""
    prompts: Mapping[Kind, Prompts]
    """Both kinds of reverse query, kept apart."""
    twin: Probe | None = None
    """Another model, asked about the same facts."""

    @classmethod
    def of(cls, name: str, model: Any, table: FactTable, tokenizer: Any = None, twin: Probe | None = None) -> Probe:
        """A model, asked about the facts of a table.

        Args:
            tokenizer: Default: the model's.

        Raises:
            UserError: there is no tokenizer, or no fact can be asked.
        """
        model, tokenizer = hooked(model), tokenizer or model.tokenizer
        if tokenizer is None:
            raise UserError(f"{name}: has no tokenizer, which the facts are phrased in; add its tokenizer.json")
        return cls(name, model, {kind: make_prompts(table, tokenizer, model.cfg, kind) for kind in KINDS}, twin)

    def pairs(self, kind: Kind) -> list[QueryPair]:
        return self.prompts[kind].pairs

    def origin(self) -> CheckpointOrigin:
        """Return what a result says of a probe: the model, what was asked and what could not be."""
        skipped = {kind: list(map(str, prompts.skipped)) for kind, prompts in self.prompts.items()}
        first_rows = self.model.W_E[:FINGERPRINT].detach().float().cpu().numpy().tobytes()
        asked = repr({kind: prompts.pairs for kind, prompts in self.prompts.items()}).encode()
        return CheckpointOrigin(
            checkpoint=self.name,
            model=self.model.cfg.model_dump(mode="json"),
            digest=hashlib.sha256(first_rows + asked).hexdigest()[:16],
            facts=len({pair.fact for prompts in self.prompts.values() for pair in prompts.pairs}),
            pairs={kind: len(prompts.pairs) for kind, prompts in self.prompts.items()},
            skipped={kind: len(reasons) for kind, reasons in skipped.items()},
            reasons={kind: reasons[:REASONS] for kind, reasons in skipped.items()},
            twin=self.twin.origin() if self.twin else None,
        )


FINGERPRINT = 64
"""From how many rows of the embedding a result tells whether it is of the same weights."""
REASONS = 20
"""How many of the reasons for which something was skipped a result quotes."""


def open_probe(
    checkpoint: str | Path,
    facts: str | Path,
    *,
    templates: FactTemplates | str | Path | None = None,
    limit: int | None = None,
    twin: str | Path | None = None,
    **loading: Any,
) -> Probe:
    """Load a checkpoint and phrase the facts in its tokens.

    Args:
        checkpoint: Folder or hub id, as for :func:`~mdm_interp.checkpoints.load_checkpoint`.
        facts: A CSV, as for :func:`~mdm_interp.prompts.load_facts`.
        templates: How to state them.
        limit: Ask about the first so many usable facts only.
        twin: A second checkpoint, asked about the same facts.
        loading: `device`, `dtype`, `device_map`, `revision` of `load_checkpoint`; the last is not the twin's.

    Raises:
        UserError: a checkpoint or the facts cannot be used, or a checkpoint has no tokenizer.
    """
    table = load_facts(facts, templates)
    if limit is not None:
        table = replace(table, rows=dict(list(table.rows.items())[:limit]))
    name, model, other = Path(checkpoint).absolute().name, load_checkpoint(checkpoint, **loading), None
    if twin is not None:
        alike = {name: value for name, value in loading.items() if name != "revision"}
        of_twin = Path(twin).absolute().name
        of_twin += " (twin)" if of_twin == name else ""  # run1/final and run2/final stay apart
        other = Probe.of(of_twin, load_checkpoint(twin, **alike), table)
    return Probe.of(name, model, table, twin=other)


def each_checkpoint(probes: Iterable[Probe]) -> list[Probe]:
    """The probes and their twins, every checkpoint once."""
    members = (member for probe in probes for member in (probe, probe.twin) if member is not None)
    return list({member.name: member for member in members}.values())


def demos(seeds: Sequence[int]) -> list[DemoConfig]:
    """The demo checkpoints of `reproduce`, of the first seed, their intervals being over facts: LLaDA's and the twin's,
    and in a full run Dream's."""
    formats = ("llada", TWIN) if is_quick(seeds) else ("llada", "dream", TWIN)
    return [DEMO.model_copy(update={"format": format, "seed": seeds[0]}) for format in formats]


def demo_folder(config: DemoConfig, root: Path) -> Path:
    """Where the run store keeps a demo checkpoint."""
    return root / "demos" / f"{config.format}-{config.digest()}"


def train_demos(configs: Sequence[DemoConfig], lab: Lab) -> list[Path]:
    """The folders of the demo checkpoints of `configs`; those that the run store lacks are trained first."""
    wanted = {config: demo_folder(config, lab.root) for config in configs}
    missing = [(config, folder) for config, folder in wanted.items() if not (folder / "config.json").exists()]
    if missing:
        with progress_bars() as bars:
            bar = bars.add_task("training demo checkpoints", total=len(missing), values="")
            side_by_side(
                _train_demo,
                [(folder, config, lab.device) for config, folder in missing],
                workers=lab.workers or default_workers(lab.device),
                show=lambda done: bars.advance(bar),
            )
    return [wanted[config] for config in configs]


def _train_demo(folder: Path, config: DemoConfig, device: str, report: Callable[[None], None]) -> None:
    train_demo(folder, config, device=device, progress=False)
    report(None)


@dataclass(frozen=True)
class CheckpointAnalysis(Analysis):
    """An analysis of checkpoints: its `measure` takes probes instead of runs. `reproduce` gives it the demo
    checkpoints, `mdm-interp probe` any other."""

    measure: Callable[[Sequence[Probe]], list[dict[str, Any]]]
    trainer = staticmethod(train_demo)
    opener = (open_probe,)
    needs_twin: bool = False
    """Whether it compares with a twin, and has nothing to say without one."""

    def subjects(self, lab: Lab) -> list[Probe]:
        """The demo MDMs, each with the twin of its seed, asked about the facts that training states one way."""
        configs = self.configs(lab.seeds)
        folders = dict(zip(configs, train_demos(configs, lab), strict=True))

        def opened(config: DemoConfig) -> Probe:
            folder = folders[config]
            return replace(open_probe(folder, folder / "facts.csv", device=lab.device), name=f"demo {config.format}")

        (twin,) = [opened(config) for config in configs if config.format == TWIN]
        return [replace(opened(config), twin=twin) for config in configs if config.format != TWIN]

    def probe(self, probe: Probe, out: Path) -> Result:
        """The result for one probe: from `out` if it is there, otherwise measured and saved there."""
        planned = self._planned(probe.origin(), [])
        return self._stored(planned, out) or self._measured(planned, [probe], out)
