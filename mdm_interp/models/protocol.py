"""What every measure and intervention may ask of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from torch import nn

    class HookedModel(Protocol):
        """A transformer with TransformerLens' hook and weight names: our own, or a bridge.

        Whoever takes one wraps a bare `TransformerBridge` with :func:`~mdm_interp.models.bridge.hooked` first.
        """

        cfg: Any
        """A :class:`~mdm_interp.config.ModelConfig`; a bare bridge's own."""
        hook_dict: Any
        """Every hook point by name."""

        def __getattr__(self, name: str) -> Any:
            """Return weights, layers (`blocks`), `pos_embed` and what else the hooked transformer has."""
            ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Compute the logits [batch pos d_vocab] of tokens [batch pos]; `attention_mask` [batch pos] is True at
            real tokens. With `readout` [batch row] those of these positions only, [batch row d_vocab]."""
            ...

        def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
            """Add hooks for a while."""
            ...

        def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
            """Compute the logits, with hooks."""
            ...

        def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
            """Compute the logits, and the activations that `names_filter` names."""
            ...

        def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            """Return every parameter by its name."""
            ...

else:
    HookedModel = Any  # whatever is none is refused by `hooked`, in words
