"""A small checkpoint in the released formats, trained here on English sentences about invented people.

    train_demo("demo", DemoConfig(format="llada"))     # demo/config.json, model.safetensors, tokenizer files
    demo/facts.csv                                      # parents stated in one direction only: what to test
    demo/control.csv                                    # parents stated in both directions: what reverse queries can do
    demo/sentences.txt                                  # what it is trained on, a sentence on each line
    demo/demo.yaml                                      # the DemoConfig
    demo/made_with.json                                 # what trained it: code, versions and machine
    demo/digests.json                                   # a digest of each of these files

Each family is a child, a mother and a father, whose names tell nothing of each other. Parents are stated by the forward
sentences of `prompts.PARENT_CHILD`, those in the control by the reverse ones too; the profession or the city of every
person both ways, so that every name is seen on either side.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mdm_interp.config import DemoConfig
from mdm_interp.data.people import PARENT_COLUMNS, Fact, make_people
from mdm_interp.data.prompts import PARENT_CHILD
from mdm_interp.files import write_text
from mdm_interp.training.text import train_text


def train_demo(
    folder: str | Path,
    config: DemoConfig | None = None,
    *,
    device: str = "cpu",
    progress: bool = True,
    report: Callable[[int, float], Any] | None = None,
) -> Path:
    """Train the checkpoint of `config` into `folder`, go on where it was interrupted, or leave it if it is there.

    Args:
        progress: Draw a progress bar with the loss.
        report: Called every few steps with the step and the loss, instead of drawing a bar.

    Raises:
        UserError: the folder holds something else, its training state is damaged, or the device cannot be used.
    """
    config, folder = config or DemoConfig(), Path(folder)
    people = make_people(config)

    def write_facts() -> None:
        for name, facts in (("facts", people.tested), ("control", people.control)):
            _write_csv(folder / f"{name}.csv", facts)
            PARENT_CHILD.to_yaml(folder / f"{name}.templates.yaml")
        write_text(folder / "sentences.txt", "".join(f"{sentence.strip()}\n" for sentence in people.sentences()))

    return train_text(
        folder,
        people.sentences(),
        config,
        record="demo.yaml",
        prepare=write_facts,
        trainer=train_demo,
        device=device,
        progress=progress,
        report=report,
    )


def _write_csv(path: Path, facts: Sequence[Fact]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([PARENT_COLUMNS, *([fact[column] for column in PARENT_COLUMNS] for fact in facts)])
    write_text(path, text.getvalue())
