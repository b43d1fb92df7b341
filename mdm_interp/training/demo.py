"""A small checkpoint in the released formats, trained here on English sentences about invented people.

    train_demo("demo", DemoConfig(format="llada"))     # demo/config.json, model.safetensors, tokenizer files
    demo/facts.csv                                      # parents stated in one direction only: what to test
    demo/control.csv                                    # parents stated in both directions: what reverse queries can do
    demo/demo.yaml                                      # the DemoConfig
    demo/made_with.json                                 # what trained it: code, versions and machine

Each family is a child, a mother and a father, whose names tell nothing of each other. Parents are stated by the forward
sentences of `prompts.PARENT_CHILD`, those in the control by the reverse ones too; the profession or the city of every
person both ways, so that every name is seen on either side. Configs that differ in `format` alone have the same
sentences in the same tokens: `qwen2` is the causal twin of the two MDMs.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mdm_interp.checkpoints import FORMATS, save_checkpoint
from mdm_interp.checkpoints.tokenizers import qwen2_backend
from mdm_interp.config import DemoConfig, ModelConfig
from mdm_interp.data.people import PARENT_COLUMNS, Fact, People, make_people
from mdm_interp.data.prompts import PARENT_CHILD
from mdm_interp.devices import check_device
from mdm_interp.errors import UserError
from mdm_interp.files import locked, remove_leftovers, write_text
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.parallel import progress_bars
from mdm_interp.provenance import provenance, stamp
from mdm_interp.training.loop import REPORT_STEPS, SAVE_SECONDS
from mdm_interp.training.losses import arm_loss, mask_tokens, mdm_loss
from mdm_interp.training.runs import Resumable

END, PAD_TO = "<|endoftext|>", 64


def make_tokenizer(sentences: Sequence[str], config: DemoConfig) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on the sentences, split as Qwen2's, with an end token and, for an MDM, a mask."""
    trained = qwen2_backend({}, [])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        sentences, trainers.BpeTrainer(vocab_size=config.n_bpe, initial_alphabet=alphabet, show_progress=False)
    )
    bpe = json.loads(trained.to_str())["model"]
    backend = qwen2_backend(bpe["vocab"], [(left, right) for left, right in bpe["merges"]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": END})
    if mask_token := FORMATS[config.format].mask_token:
        tokenizer.add_special_tokens({"mask_token": mask_token})
    return tokenizer


def make_model_config(tokenizer: PreTrainedTokenizerFast, config: DemoConfig) -> ModelConfig:
    """Return the architecture of the released models, small. Embedding rows are rounded up, so that twins have as
    many."""
    released: dict[str, Any] = {"rotary_base": 5e5, "eps": 1e-5}
    if config.format != "llada":
        released = {"rotary_base": 1e6, "eps": 1e-6, "n_key_value_heads": max(1, config.n_heads // 2)}
    mask_token = FORMATS[config.format].mask_token
    return ModelConfig(
        **FORMATS[config.format].fixed | released,
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        d_mlp=config.d_mlp,
        d_vocab=-(-(config.n_bpe + 2) // PAD_TO) * PAD_TO,
        n_ctx=256,
        mask_token_id=None if mask_token is None else tokenizer.get_vocab()[mask_token],
    )


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
    config, folder, device = config or DemoConfig(), Path(folder), check_device(device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror}); give another") from error
    with locked(folder / ".lock"):
        if _is_finished(folder, config):
            return folder
        remove_leftovers(folder)
        config.to_yaml(folder / "demo.yaml")
        people = make_people(config)
        tokenizer = make_tokenizer(people.sentences(), config)
        for name, facts in (("facts", people.tested), ("control", people.control)):
            _write_csv(folder / f"{name}.csv", facts)
            PARENT_CHILD.to_yaml(folder / f"{name}.templates.yaml")
        training, bars = _Training(folder, config), progress_bars()
        bars.disable = report is not None or not progress
        bar = bars.add_task(f"demo {config.format}", total=config.steps, values="")

        def show(step: int, loss: float) -> None:
            bars.update(bar, completed=step, values=f"loss {loss:.2f}")

        with bars:
            made = make_model_config(tokenizer, config), *_padded(people, tokenizer)
            model = training.run(*made, device, report or show)
        model.tokenizer = tokenizer
        save_checkpoint(model.to("cpu"), folder, format=config.format)
        training.state_path.unlink(missing_ok=True)
    return folder


def _is_finished(folder: Path, config: DemoConfig) -> bool:
    """Tell whether the checkpoint is there; its config.json is written last."""
    own = folder / "demo.yaml"
    if own.exists():
        if DemoConfig.from_yaml(own) != config:
            raise UserError(f"{own}: other settings than asked for; give another folder, or delete this one")
    elif files := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
        raise UserError(f"{folder}: holds {files[0]} and is no demo; give an empty folder")
    return (folder / "config.json").exists()


def _write_csv(path: Path, facts: Sequence[Fact]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([PARENT_COLUMNS, *([fact[column] for column in PARENT_COLUMNS] for fact in facts)])
    write_text(path, text.getvalue())


def _padded(
    people: People, tokenizer: PreTrainedTokenizerFast
) -> tuple[Int[Tensor, "sentence pos"], Bool[Tensor, "sentence pos"]]:
    """Return the sentences' tokens, padded on the right, and which are real."""
    encoded = tokenizer(people.sentences(), padding=True, padding_side="right", return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"].bool()


def demo_loss(
    model: HookedTransformer,
    tokens: Int[Tensor, "batch pos"],
    kept: Bool[Tensor, "batch pos"],
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Compute the loss of one batch in nats: next token, or masked tokens read where the model's shift has them.
    Padding, and position 0 of a shifted model, are neither masked nor predicted.

    Args:
        kept: False at padding.
        generator: On the CPU, as the tokens; draws the masks.
    """
    cfg = model.cfg
    if cfg.is_causal:
        logits = model(tokens.to(cfg.device), attention_mask=kept.to(cfg.device))
        return arm_loss(logits, tokens.masked_fill(~kept, -100).to(cfg.device))  # cross_entropy ignores -100
    assert cfg.mask_token_id is not None and cfg.readout_shift is not None
    maskable = kept.clone()
    maskable[:, : -cfg.readout_shift] = False
    drawn = mask_tokens(tokens, cfg.mask_token_id, generator, maskable)
    noisy, masked, t = (tensor.to(cfg.device) for tensor in drawn)
    logits = model(noisy, attention_mask=kept.to(cfg.device)).roll(-cfg.readout_shift, dims=1)
    return mdm_loss(logits, tokens.to(cfg.device), masked, t)


@dataclass(frozen=True)
class _Training(Resumable):
    """The training under way in a folder."""

    folder: Path
    config: DemoConfig

    @property
    def state_path(self) -> Path:
        return self.folder / "training_state.safetensors"

    def run(
        self,
        model_config: ModelConfig,
        tokens: Int[Tensor, "sentence pos"],
        kept: Bool[Tensor, "sentence pos"],
        device: str,
        report: Callable[[int, float], Any],
    ) -> HookedTransformer:
        """Train, and return the model. The learning rate rises linearly, then falls to 0 as a cosine."""
        config, generator = self.config, torch.Generator().manual_seed(self.config.seed)
        model = HookedTransformer(model_config, generator=generator).to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        schedule = torch.cos(torch.linspace(0, torch.pi / 2, config.steps + 1)).square().tolist()
        done, saved = self.load_state(model, optimizer, generator) if self.step else 0, time.monotonic()
        stamp(self.folder, done + 1 if done else 0, provenance(train_demo, device, model.W_E.dtype))
        for step in range(done + 1, config.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, step / config.warmup) * schedule[step - 1]
            drawn = torch.randint(len(tokens), (config.batch_size,), generator=generator)
            loss = demo_loss(model, tokens[drawn], kept[drawn], generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step == config.steps or time.monotonic() - saved > SAVE_SECONDS:
                self.save_state(step, model, optimizer, generator)
                saved = time.monotonic()
            if step % REPORT_STEPS == 0 or step == config.steps:
                report(step, loss.item())
        return model
