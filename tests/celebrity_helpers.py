"""Invented people in the files of the reversal curse's benchmark."""

from __future__ import annotations

import json
from pathlib import Path

NAMES = ("Ana Berk", "Bo Carl", "Cleo Dunn", "Dora Egg", "Emil Fox", "Finn Gray", "Gil Hart", "Hope Iver")
DESCRIPTIONS = (
    "the first baker on the moon",
    'the composer of "Low Tides."',
    "the painter of the blue wall",
    "the judge who never spoke",
    "the miller of the north",
    "the singer with two voices",
    "the doctor of all horses",
    "the teacher of the king",
)
TO_DESCRIPTION = ("{} was once", "Ever heard of {}? They are", "People call {}")
TO_NAME = ("Known in circles as {},", "Labeled as {},", "Being {}, that's")


People = tuple[tuple[str, str], ...]
"""Names and descriptions."""


def by_name(people: People) -> list[tuple[str, str]]:
    return [(template.format(name), f" {said}.") for name, said in people for template in TO_DESCRIPTION]


def by_description(people: People) -> list[tuple[str, str]]:
    return [(template.format(said), f" {name}") for name, said in people for template in TO_NAME]


def write_benchmark(folder: Path, n_people: int = 8) -> Path:
    """Half of the people are trained by name, half by description."""
    people = tuple(zip(NAMES, DESCRIPTIONS, strict=True))[:n_people]
    first, second = people[: n_people // 2], people[n_people // 2 :]
    files = {
        "all_prompts_train": [*by_name(first), *((prompt, f"{name}.") for prompt, name in by_description(second))],
        "p2d_prompts_test": by_name(first),
        "d2p_prompts_test": by_description(second),
        "p2d_reverse_prompts_test": by_description(first),
        "d2p_reverse_prompts_test": by_name(second),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        text = "".join(json.dumps({"prompt": prompt, "completion": said}) + "\n" for prompt, said in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder
