"""Checkpoints of models with registered position schemes: the name comes back, and nothing that a file says is run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import edit_config
from helpers import random_model, random_tokens
from scheme_helpers import Window, XPos, forgotten, register_all
from torch import Tensor

from mdm_interp.checkpoints import load_checkpoint, save_checkpoint
from mdm_interp.checkpoints.placement import place
from mdm_interp.config import SCHEMES, ModelConfig
from mdm_interp.errors import UserError
from mdm_interp.models.positions import POSITION_SCHEMES, register_scheme
from mdm_interp.models.transformer import HookedTransformer


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with forgotten():
        register_all()
        yield


@torch.no_grad()
def logits_of(model: HookedTransformer) -> Tensor:
    return model(random_tokens())


def changed(**members: Any) -> type[XPos]:
    """Another class of the name that XPos has."""
    return type("XPos", (XPos,), {"__module__": XPos.__module__, "__qualname__": "XPos", **members})


@pytest.mark.parametrize("name", ["xpos", "per_head", "window"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_registered_scheme_comes_back_by_its_name(name: str, dtype: str, tmp_path: Path) -> None:
    model = random_model(position=name, dtype=dtype, n_key_value_heads=2)
    if name == "xpos":
        with torch.no_grad():
            model.pos_embed.get_parameter("gamma").fill_(0.7)
    save_checkpoint(model, tmp_path, "mdm_interp", max_shard_size=3000)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["position"] == name and len(written["position_sample"]) == 4
    again = load_checkpoint(tmp_path)
    assert again.cfg == model.cfg and type(again.pos_embed) is POSITION_SCHEMES[name]
    assert torch.equal(logits_of(again), logits_of(model))
    save_checkpoint(again, tmp_path / "again", "mdm_interp")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == written


def test_schemes_of_the_package_are_saved_as_before(tmp_path: Path) -> None:
    save_checkpoint(random_model(), tmp_path, "mdm_interp")
    assert "position_sample" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.promise(
    "a checkpoint with a position scheme that is not registered", "refused by name; nothing is imported"
)
def test_a_name_that_is_not_registered_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a module of that name, which is there to be imported, is."""
    save_checkpoint(random_model(position="xpos"), tmp_path, "mdm_interp")
    (tmp_path / "xpos.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    del POSITION_SCHEMES["xpos"], SCHEMES["xpos"]
    with pytest.raises(UserError, match=r"config.json: position: 'xpos' is not one of 'rope', .* or register it"):
        load_checkpoint(tmp_path)
    for name in ("xpos:XPos", "os.path", "scheme_helpers.XPos", "__main__", ["xpos"], {"module": "xpos"}):
        edit_config(tmp_path, position=name)
        with pytest.raises(UserError, match=r"config.json: position: .* is not one of 'rope'"):
            load_checkpoint(tmp_path)
    assert "xpos" not in sys.modules


@pytest.mark.parametrize("members", [{"span": 9}, {"rotate": lambda self, x, positions, which: x}])
def test_another_class_of_the_name_is_refused(members: dict[str, Any], tmp_path: Path) -> None:
    save_checkpoint(random_model(position="xpos"), tmp_path, "mdm_interp")
    register_scheme("xpos")(changed(**members))
    with pytest.raises(
        UserError, match=r"config.json: position: the scheme that is registered as 'xpos' is not the one"
    ):
        load_checkpoint(tmp_path)
    register_scheme("xpos")(changed())
    assert logits_of(load_checkpoint(tmp_path)).isfinite().all()


@pytest.mark.parametrize("sample", [[0.0] * 4, [1] * 4, "sample", {"q": 1.0}, [[1.0]] * 4, [1.0] * 5])
def test_a_sample_that_was_edited_is_refused(sample: Any, tmp_path: Path) -> None:
    save_checkpoint(random_model(position="xpos"), tmp_path, "mdm_interp")
    edit_config(tmp_path, position_sample=sample)
    with pytest.raises(UserError, match="is not the one that the model was made with"):
        load_checkpoint(tmp_path)


def patched(model: HookedTransformer) -> None:
    model.pos_embed.bias = lambda query_pos, key_pos: None


def wider(model: HookedTransformer) -> None:
    assert isinstance(model.pos_embed, Window)
    model.pos_embed.width = 3


def faster(model: HookedTransformer) -> None:
    assert isinstance(model.pos_embed, XPos)
    model.pos_embed.theta = 2 * model.pos_embed.theta


def replaced(model: HookedTransformer) -> None:
    model.pos_embed = changed()(model.cfg)


@pytest.mark.parametrize(
    ("name", "change"),
    [("alibi", patched), ("window", patched), ("window", wider), ("xpos", faster), ("xpos", replaced)],
)
def test_what_the_name_would_not_bring_back_is_not_saved(
    name: str, change: Callable[[HookedTransformer], None], tmp_path: Path
) -> None:
    model = random_model(position=name)
    change(model)
    with pytest.raises(
        UserError, match=rf"model.pos_embed: this \w+ is not the position scheme '{name}' that config.json"
    ):
        save_checkpoint(model, tmp_path, "mdm_interp")
    assert not list(tmp_path.iterdir())


def test_what_a_scheme_stores_beside_its_parameters_comes_back(tmp_path: Path) -> None:
    class Directed(Window):
        def __init__(self, cfg: ModelConfig) -> None:
            super().__init__(cfg)
            self.register_buffer("strength", torch.rand(()))

        def bias(self, query_pos: Tensor, key_pos: Tensor) -> Tensor:
            return super().bias(query_pos, key_pos) * self.get_buffer("strength") * 1e-4

    register_scheme("directed")(Directed)
    model = random_model(position="directed")
    save_checkpoint(model, tmp_path, "mdm_interp")
    assert torch.equal(logits_of(load_checkpoint(tmp_path)), logits_of(model))


def test_released_formats_hold_no_registered_scheme(tmp_path: Path) -> None:
    model = random_model(position="xpos", d_mlp=24, gated_mlp=True, act_fn="silu", mask_token_id=12)
    with pytest.raises(UserError, match=r"format: 'llada' cannot hold this model .*position is 'xpos', not 'rope'"):
        save_checkpoint(model, tmp_path, "llada")


@pytest.mark.parametrize("name", ["xpos", "t5_bias", "per_head", "learned"])
def test_what_a_scheme_learns_for_all_layers_is_on_one_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `meta` device stands for a second one."""
    monkeypatch.setattr("mdm_interp.checkpoints.placement.check_device", lambda device: device)
    model, apart = random_model(position=name), {"": "cpu", "blocks.1": "meta"}
    if name in ("per_head", "learned"):  # the one learns nothing, the other is asked before the first layer
        assert place(model, "cpu", apart, torch.float32)["blocks.1.attn.W_Q"].type == "meta"
        return
    with pytest.raises(
        UserError, match=f"device_map: what position scheme '{name}' learns serves all layers; give one"
    ):
        place(model, "cpu", apart, torch.float32)
