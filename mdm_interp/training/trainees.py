"""What is trained: a model alone, or several of one shape as one batched model."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mdm_interp.config import TrainConfig
from mdm_interp.data.worlds import FactWorld
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.training.losses import Drawn, draw, drawn_loss


class Trainee:
    """A model in training, and all that a step of it changes."""

    def __init__(self, config: TrainConfig, facts: FactWorld, device: str) -> None:
        self.config, self.facts = config, facts
        self.generator = torch.Generator().manual_seed(config.seed)
        self.model = HookedTransformer(config.model, generator=self.generator).to(device)
        self.optimizer = _adamw([{"params": list(self.model.parameters()), **_settings(config)}])

    def copy(self) -> Trainee:
        """Return another that goes on as this one does."""
        other = Trainee(self.config, self.facts, str(self.model.W_E.device))
        other.model.load_state_dict(self.model.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.generator.set_state(self.generator.get_state())
        return other

    def draw(self) -> Drawn:
        """Draw the next batch, on the CPU."""
        config, generator = self.config, self.generator
        batch = self.facts.sample(config.batch_size, generator)
        return draw(batch, config.objective, self.model, generator, config.mask_rate)

    def advance(self, step: int) -> Float[Tensor, ""]:
        """Take a step, and return the loss of its batch before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(step)
        drawn = Drawn(*(tensor.to(self.model.cfg.device) for tensor in self.draw()))
        loss = drawn_loss(self.model(drawn.inputs), drawn, self.config.objective)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        return loss


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return a run's optimizer settings."""
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}


def _adamw(groups: Sequence[dict[str, Any]], **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, fused=True, **options)


def shape_of(config: TrainConfig) -> tuple[str, int, int, int, bool]:
    """Return what runs have in common that can be trained together. Their seeds, worlds and masking, and the settings
    of their optimizers, may differ."""
    model = config.model.model_dump_json()
    return model, config.facts.seq_len, config.batch_size, config.steps, config.objective == "causal"


class Ensemble:
    """Models of one shape that take their steps together, each on its own data and by its own settings.

    Weights and moments are stacked, and one batched forward and backward pass serves all; on a GPU it is one launch.
    Up to rounding, each member becomes what it would have become alone. The members themselves stand still until
    :meth:`update_members`.
    """

    def __init__(self, members: Sequence[Trainee]) -> None:
        """Start where the members are.

        Args:
            members: Of one shape (:func:`shape_of`), and as many steps trained.

        Raises:
            ValueError: some have taken steps and others have not.
        """
        self._places: dict[str, list[int]] = {}
        for place, member in enumerate(members):  # an optimizer has one setting for a whole stack
            self._places.setdefault(f"{_settings(member.config)} {member.config.warmup}", []).append(place)
        self._stacks = [_Stack([members[place] for place in places]) for places in self._places.values()]
        self._members = [member for stack in self._stacks for member in stack.members]
        weights = self._members[0].model.W_E
        self._device, on_gpu = weights.device, weights.is_cuda
        self._optimizer = _adamw(
            [{"params": list(stack.weights.values()), **_settings(stack.members[0].config)} for stack in self._stacks],
            capturable=on_gpu,
        )
        for stack in self._stacks:
            stack.gather(self._optimizer)
        order = [place for places in self._places.values() for place in places]
        self._order = torch.tensor(order, device=self._device)
        self._recorded = _Recorded(self._learn) if on_gpu else None

    def advance(self, step: int) -> Float[Tensor, "member"]:
        """Take a step with every member, the first of which is 1, and return the losses of their batches before it."""
        for group, stack in zip(self._optimizer.param_groups, self._stacks, strict=True):
            group["lr"] = stack.members[0].config.learning_rate(step)
        each = [one.draw() for one in self._members]
        warm = step >= max(member.config.warmup for member in self._members)  # a record has its rates in it
        learn = self._recorded if self._recorded is not None and warm else self._learn
        losses = learn(*(torch.stack(column).to(self._device) for column in zip(*each, strict=True)))
        return torch.empty_like(losses).index_copy_(0, self._order, losses)

    def _learn(self, *drawn: Tensor) -> Float[Tensor, "member"]:
        """Take a step on what was drawn (:class:`~mdm_interp.training.losses.Drawn`)."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels are batched one by one, or not at all
            losses = vmap(self._loss)(self._weights(), Drawn(*drawn))
        self._optimizer.zero_grad()
        losses.sum().backward()
        for stack in self._stacks:
            stack.clip()
        self._optimizer.step()
        return losses.detach()

    def _weights(self) -> dict[str, Tensor]:
        """Return every member's weights, stacked."""
        first, *others = (stack.weights for stack in self._stacks)
        return (
            {name: torch.cat([first[name], *(other[name] for other in others)]) for name in first} if others else first
        )

    def _loss(self, weights: dict[str, Tensor], drawn: Drawn) -> Float[Tensor, ""]:
        one = self._members[0]
        return drawn_loss(functional_call(one.model, weights, (drawn.inputs,)), drawn, one.config.objective)

    def update_members(self) -> None:
        """Give every member its weights and moments."""
        for stack in self._stacks:
            stack.scatter(self._optimizer)


class _Stack:
    """The weights of members whose optimizers have the same settings."""

    def __init__(self, members: Sequence[Trainee]) -> None:
        self.members = members
        self._most = torch.tensor([member.config.grad_clip for member in members]).to(members[0].model.W_E)
        self._of_each = [dict(member.model.named_parameters()) for member in members]
        self.weights = {
            name: torch.stack([of_one[name].detach() for of_one in self._of_each]).requires_grad_()
            for name in self._of_each[0]
        }

    def gather(self, optimizer: torch.optim.Optimizer) -> None:
        """Stack what the members' optimizers hold; before the first step they hold nothing."""
        for name, stacked in self.weights.items():
            states = [
                member.optimizer.state.get(of_one[name])
                for member, of_one in zip(self.members, self._of_each, strict=True)
            ]
            held = [state for state in states if state]
            if len(held) not in (0, len(states)):  # the optimizer would write past the end of theirs
                raise ValueError(f"members: {len(held)} of {len(states)} have begun to learn; stack those at one step")
            if held:
                optimizer.state[stacked] = {
                    key: value.clone() if key == "step" else torch.stack([state[key] for state in held])
                    for key, value in held[0].items()
                }

    @torch.no_grad()
    def scatter(self, optimizer: torch.optim.Optimizer) -> None:
        for place, (member, of_one) in enumerate(zip(self.members, self._of_each, strict=True)):
            for name, stacked in self.weights.items():
                of_one[name].copy_(stacked[place])
                member.optimizer.state[of_one[name]] = {
                    key: (value if key == "step" else value[place]).clone()
                    for key, value in optimizer.state[stacked].items()
                }

    @torch.no_grad()
    def clip(self) -> None:
        """Do for every member as :func:`torch.nn.utils.clip_grad_norm_` does for one."""
        grads = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        norms = torch.stack([grad.reshape(len(grad), -1).norm(dim=1) for grad in grads]).norm(dim=0)
        shares = (self._most / (norms + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad *= shares.view(-1, *[1] * (grad.ndim - 1))


class _Recorded:
    """A function of tensors on a GPU as a CUDA graph: recorded once, then launched as a whole.

    What it is given must keep its shapes, and what it reads besides its place. What it returns is overwritten by the
    next call.
    """

    BEFORE = 3
    """How many calls run as usual, so that libraries have what they set up at first."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function, self._calls = function, 0
        self._graph = torch.cuda.CUDAGraph()

    def __call__(self, *given: Tensor) -> Tensor:
        self._calls += 1
        if self._calls <= self.BEFORE:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                returned = self._function(*given)
            torch.cuda.current_stream().wait_stream(aside)
            return returned
        if self._calls == self.BEFORE + 1:
            self._given = given
            gc.collect()  # an old graph, freed while another is recorded, spoils that
            with torch.cuda.graph(self._graph):  # nothing is computed yet
                self._returned = self._function(*given)
        else:
            for held, new in zip(self._given, given, strict=True):
                held.copy_(new)
        self._graph.replay()
        return self._returned
