"""What parameters do: the components and layers that gradients are split into."""

from __future__ import annotations

from collections.abc import Iterable

COMPONENTS = ("embedding", "position", "Q", "K", "V", "O", "norms", "MLP", "unembedding")
"""`embedding` is W_E (also when it is tied), `position` what a position scheme learns; biases and the
gains of the norms of queries and keys go with their weights."""

STORAGE, ROUTING = ("V", "O"), ("Q", "K")
"""The components that decide what is written once a source is attended, and how strongly it is attended."""

GROUPS = {
    "storage": STORAGE,
    "routing": ROUTING,
    "embeddings": ("embedding", "position", "unembedding"),
    "MLP": ("MLP",),
    "norms": ("norms",),
}
"""All components, by what they do."""

Part = tuple[int | None, str]
"""A layer and one of :data:`COMPONENTS`; None is outside of all layers."""

_BY_LEAF = {
    "W_E": "embedding",
    "W_Q": "Q",
    "b_Q": "Q",
    "W_K": "K",
    "b_K": "K",
    "W_V": "V",
    "b_V": "V",
    "W_O": "O",
    "b_O": "O",
    "w": "norms",
    "b": "norms",
    "W_in": "MLP",
    "b_in": "MLP",
    "W_gate": "MLP",
    "b_gate": "MLP",
    "W_out": "MLP",
    "W_router": "MLP",
    "b_out": "MLP",
    "W_U": "unembedding",
    "b_U": "unembedding",
}

_BY_MODULE = {"q_norm": "Q", "k_norm": "K"}


def component_of(parameter: str) -> str:
    """Tell which of :data:`COMPONENTS` a parameter of a HookedTransformer belongs to, by its name."""
    *path, leaf = parameter.split(".")
    return "position" if path[0] == "pos_embed" else _BY_MODULE.get(path[-1]) or _BY_LEAF[leaf]


def part_of(parameter: str) -> Part:
    """Tell which layer and component a parameter belongs to, by its name."""
    words = parameter.split(".")
    return (int(words[1]) if words[0] == "blocks" else None), component_of(parameter)


def parts_of(parameters: Iterable[str]) -> tuple[Part, ...]:
    """List the parts that parameters belong to: what lies outside of layers, then layer by layer."""
    parts = {part_of(name) for name in parameters}
    return tuple(sorted(parts, key=lambda part: (-1 if part[0] is None else part[0], COMPONENTS.index(part[1]))))
