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
        """A :class:`~mdm_interp.config.ModelConfig`."""
        hook_dict: Any
        """Every hook point by name."""
        blocks: Any
        """The layers, whose `attn` holds `W_Q`, `W_K`, `W_V`, `W_O`."""
        W_E: Any
        """[d_vocab d_model]"""
        W_U: Any
        """[d_model d_vocab]"""
        pos_embed: Any
        """The :class:`~mdm_interp.models.positions.PositionScheme`."""
        ln_final: Any
        """The last norm."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Logits [batch pos d_vocab] of tokens [batch pos]; `attention_mask` [batch pos] is True at real tokens."""
            ...

        def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
            """Add hooks for a while."""
            ...

        def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
            """Logits, with hooks."""
            ...

        def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
            """Logits, and the activations that `names_filter` names."""
            ...

        def residual_directions(self, tokens: Any) -> Any:
            """The direction of the residual stream, [… d_model], that raises each token's logit."""
            ...

        def accumulated_bias(self, *args: Any, **kwargs: Any) -> Any:
            """What biases add to the residual stream, [d_model]."""
            ...

        def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            """Every parameter by its name."""
            ...

else:
    HookedModel = Any  # whatever is none is refused by `hooked`, in words
