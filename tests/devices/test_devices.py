"""Whatever takes a model gives on a GPU what it gives on the CPU, in float32 and in float64.

Without a GPU the same calls run on a pretended accelerator (:mod:`device_helpers`), which finds a tensor that is made
on the CPU and then meets the model's.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from call_helpers import CALLS, CASES, apart, made, returned
from device_helpers import PRETENDED, accelerator

from mdm_interp.models.layers import attention_scores

SPREAD = [name for name, (_, kinds) in CALLS.items() if "deep" in kinds]


def check(name: str, kind: str, device: str, dtype: torch.dtype, *, spread: bool = False) -> None:
    """Compare one call on a device with the same call on the CPU.

    Args:
        spread: Whether the last layer and the readout stay on the CPU.
    """
    there, expected = made(kind, dtype), returned(name, made(kind, dtype))
    with accelerator() if device == PRETENDED else nullcontext():
        there.to(device)
        for part in (there.blocks[-1], there.ln_final, there.unembed) if spread else ():
            part.to("cpu")
        got = returned(name, there)
    assert (told := apart(expected, got, dtype)) == {}, f"{name} of {kind} on {device}: {told}"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_pretended_accelerator_gives_what_the_cpu_gives(name: str, kind: str) -> None:
    check(name, kind, PRETENDED, torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("unchecked")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_gpu_gives_what_the_cpu_gives(name: str, kind: str, dtype: torch.dtype) -> None:
    check(name, kind, "cuda", dtype)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", SPREAD)
def test_a_model_spread_over_devices_gives_what_the_cpu_gives(name: str) -> None:
    check(name, "deep", PRETENDED, torch.float32, spread=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("unchecked")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SPREAD)
def test_a_model_spread_over_a_gpu_and_the_cpu_gives_what_the_cpu_gives(name: str) -> None:
    check(name, "deep", "cuda", torch.float32, spread=True)


def test_a_planted_arange_without_a_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *ends, device=None, **more: arange(*ends, **more))
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        check("found_routes", "causal", PRETENDED, torch.float32)


def test_a_planted_mask_on_the_cpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def masked(*given: Any) -> torch.Tensor:
        scores = attention_scores(*given)
        return scores.masked_fill(torch.zeros(scores.shape[-2:], dtype=torch.bool), 0.0)

    monkeypatch.setattr("mdm_interp.models.layers.attention_scores", masked)
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        check("found_routes", "rope", PRETENDED, torch.float32)
