"""A torch module of one's own is read as a model that computes the same, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny_config
from model_helpers import mirrored_pairs
from torch import Tensor, nn

from mdm_interp import HookedTransformer, viz
from mdm_interp.checkpoints import from_module
from mdm_interp.errors import UserError
from mdm_interp.measures.routes import compute_routes


class OwnBlock(nn.Module):
    """Written as a newcomer would: one head after the other, no norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for q, k, v in zip(*(part(x).chunk(self.heads, -1) for part in (self.q, self.k, self.v)), strict=True):
            out.append((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v)
        return x + self.o(torch.cat(out, -1))


class Own(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4, n_layers: int = 2, vocabulary: int = 13) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([OwnBlock(width, heads) for _ in range(n_layers)])
        self.out = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


NAMES = {
    "embed.W_E": "tokens.weight",
    "unembed.W_U": "out.weight",
    **{f"blocks.*.attn.W_{part.upper()}": f"layers.*.{part}.weight" for part in "qkvo"},
}
CFG: dict[str, Any] = {"position": "none", "normalization_type": None, "mask_token_id": 0}


@pytest.fixture
def own() -> Own:
    torch.manual_seed(0)
    return Own()


def test_it_computes_the_same_and_has_every_hook(own: Own) -> None:
    model = from_module(own.train(), tiny_config(**CFG), NAMES)
    assert isinstance(model, HookedTransformer)
    assert own.training, "it is left as it was"
    tokens = torch.arange(10).view(2, 5)
    torch.testing.assert_close(model(tokens), own(tokens), rtol=1e-4, atol=1e-5)
    assert compute_routes(model, [pair.forward for pair in mirrored_pairs(causal=False)]).pattern.shape == (4, 2, 4)
    assert viz.explore(model, mirrored_pairs(causal=False)).data["layers"] == [0, 1]


def test_its_weights_are_copied(own: Own) -> None:
    model = from_module(own, tiny_config(**CFG), NAMES)
    before = model(torch.arange(5)[None])
    with torch.no_grad():
        own.out.weight.zero_()
    assert torch.equal(model(torch.arange(5)[None]), before)


def test_what_has_logits_is_asked_for_them(own: Own) -> None:
    class Wrapped(Own):
        def forward(self, tokens: Tensor) -> Any:
            return type("Output", (), {"logits": super().forward(tokens)})()

    wrapped = Wrapped()
    wrapped.load_state_dict(own.state_dict())
    assert torch.equal(from_module(wrapped, tiny_config(**CFG), NAMES).W_E, own.tokens.weight)


@pytest.mark.parametrize(
    ("changed", "names", "says"),
    [
        (
            {"position": "rope"},
            {},
            r"^module: its logits differ by up to .* check names, and in cfg attention, position",
        ),
        ({"attention": "causal", "mask_token_id": None}, {}, r"^module: its logits differ"),
        ({}, {"blocks.*.attn.W_Q": "layers.*.k.weight"}, r"^names: .*layers\.0\.q\.weight is named by nothing"),
        ({}, {"embed.W_E": "words.weight"}, r"words\.weight \(embed\.W_E\) is not there.*tokens\.weight is named by"),
        ({"d_vocab": 12}, {}, r"tokens\.weight is \[13, 16\], not \[12, 16\]"),
        ({"normalization_type": "RMS"}, {}, r"blocks\.0\.ln1\.w has no name"),
        ({"n_layers": 1}, {}, r"layers\.1\.q\.weight is named by nothing"),
    ],
)
def test_what_does_not_fit_is_named(own: Own, changed: dict[str, Any], names: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        from_module(own, tiny_config(**{**CFG, **changed}), {**NAMES, **names})
    assert len(str(error.value)) < 500


def test_what_returns_no_logits_is_refused(own: Own) -> None:
    own.forward = lambda tokens: own.tokens(tokens)
    with pytest.raises(
        UserError, match=r"^module: returns \[2, 12, 16\] for tokens \[2, 12\], not logits \[2, 12, 13\]"
    ):
        from_module(own, tiny_config(**CFG), NAMES)
