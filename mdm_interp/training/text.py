"""Small checkpoints in the released formats, trained here on sentences.

    train_text("made", sentences, TextConfig(format="llada"))     # made/config.json, model.safetensors, tokenizer files
    made/text.yaml                                                # the config
    made/made_with.json                                           # what trained it: code, versions and machine
    made/digests.json                                             # a digest of each of these files

Configs that differ in `format` alone have the same sentences in the same tokens: `qwen2` is the causal twin of the two
MDMs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from rich.progress import Progress, TaskID
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mdm_interp.checkpoints import FORMATS, save_checkpoint
from mdm_interp.checkpoints.tokenizers import qwen2_backend
from mdm_interp.checkpoints.weights import SINGLE
from mdm_interp.config import TEXT_CTX, ModelConfig, TextConfig
from mdm_interp.devices import check_device
from mdm_interp.errors import UserError
from mdm_interp.files import LOCK, check_digests, locked, remove_leftovers, write_digests
from mdm_interp.models.transformer import HookedTransformer
from mdm_interp.parallel import progress_bars
from mdm_interp.provenance import provenance, stamp
from mdm_interp.tensors import load_tensors, not_finite
from mdm_interp.training.loop import REPORT_STEPS, SAVE_SECONDS
from mdm_interp.training.losses import LastLosses, arm_loss, mask_tokens, mdm_loss
from mdm_interp.training.runs import Resumable

END, PAD_TO = "<|endoftext|>", 64


def make_tokenizer(sentences: Sequence[str], config: TextConfig) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on the sentences, split as Qwen2's, with an end token, which they may end with,
    and, for an MDM, a mask."""
    trained = qwen2_backend({}, [])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        [sentence.removesuffix(END) for sentence in sentences],
        trainers.BpeTrainer(vocab_size=config.n_bpe, initial_alphabet=alphabet, show_progress=False),
    )
    bpe = json.loads(trained.to_str())["model"]
    backend = qwen2_backend(bpe["vocab"], [(left, right) for left, right in bpe["merges"]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": END})
    if mask_token := FORMATS[config.format].mask_token:
        tokenizer.add_special_tokens({"mask_token": mask_token})
    return tokenizer


def make_model_config(tokenizer: PreTrainedTokenizerFast, config: TextConfig) -> ModelConfig:
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
        n_ctx=TEXT_CTX,
        mask_token_id=None if mask_token is None else tokenizer.get_vocab()[mask_token],
    )


def train_text(
    folder: str | Path,
    sentences: Sequence[str],
    config: TextConfig,
    *,
    record: str = "text.yaml",
    prepare: Callable[[], Any] | None = None,
    trainer: Callable[..., Any] | None = None,
    device: str = "cpu",
    progress: bool = True,
    report: Callable[[int, float], Any] | None = None,
) -> Path:
    """Train a checkpoint on sentences into `folder`, go on where it was interrupted, or leave it if it is there.

    Args:
        record: The file in `folder` that the config is kept in. It decides whether what is there was asked for, so the
            config has to tell other sentences apart.
        prepare: Called once the folder is known to be one for this config, to write what else belongs there.
        trainer: Whose code `made_with.json` names. Default: this.
        progress: Draw a progress bar with the loss.
        report: Called every few steps with the step and the loss, instead of drawing a bar.

    Raises:
        UserError: the folder holds something else, its training state or its weights are damaged, or the device cannot
            be used.
        Diverged: loss or weights are no longer finite, or the loss has exploded. What was saved before is kept.
    """
    folder, device, what = Path(folder), check_device(device), Path(record).stem
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror}); give another") from error
    with locked(folder / LOCK):
        if _is_finished(folder, config, record):
            return folder
        remove_leftovers(folder)
        config.to_yaml(folder / record)
        if prepare is not None:
            prepare()
        tokenizer = make_tokenizer(sentences, config)
        training, bars = _Training(folder, config, trainer or train_text), progress_bars()
        bars.disable = report is not None or not progress
        bar = bars.add_task(f"{what} {config.format}", total=config.steps, values="")

        def show(step: int, loss: float) -> None:
            bars.update(bar, completed=step, values=f"loss {loss:.2f}")

        with bars:
            made = make_model_config(tokenizer, config), *_padded(sentences, tokenizer)
            model = training.run(*made, device, report or show)
        model.tokenizer = tokenizer
        save_checkpoint(model.to("cpu"), folder, format=config.format)
        write_digests(folder)
        training.state_path.unlink(missing_ok=True)
    return folder


def _is_finished(folder: Path, config: TextConfig, record: str) -> bool:
    """Tell whether the checkpoint is there.

    Raises:
        UserError: the folder holds something else, or damaged weights.
    """
    own = folder / record
    if own.exists():
        if type(config).from_yaml(own) != config:
            raise UserError(f"{own}: other settings than asked for; give another folder, or delete this one")
    elif files := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
        raise UserError(f"{folder}: holds {files[0]} and is no {own.stem}; give an empty folder")
    if is_written(folder):
        load_tensors(folder / SINGLE)
        check_digests(folder)
        return True
    return False


STATE = "training_state.safetensors"


def is_written(folder: Path) -> bool:
    """Tell whether a folder has a checkpoint's weights and config.json, and no training state, which goes last."""
    return all((folder / name).exists() for name in (SINGLE, "config.json")) and not (folder / STATE).exists()


def _padded(
    sentences: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> tuple[Int[Tensor, "sentence pos"], Bool[Tensor, "sentence pos"]]:
    """Return the sentences' tokens, padded on the right, and which are real."""
    encoded = tokenizer(list(sentences), padding=True, padding_side="right", return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"].bool()


def text_loss(
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
class TextStep:
    """How far a checkpoint is."""

    config: TextConfig
    step: int
    loss: float


class TextBars:
    """A progress bar for each checkpoint in training.

    Args:
        name: What it is called.
    """

    def __init__(self, progress: Progress, name: Callable[[TextConfig], str]) -> None:
        self.progress, self.name, self.tasks = progress, name, dict[TextConfig, TaskID]()

    def add(self, config: TextConfig) -> None:
        """Draw a bar for a checkpoint before its first report."""
        self.tasks[config] = self.progress.add_task(self.name(config), total=config.steps, values="")

    def show(self, at: TextStep) -> None:
        if at.config not in self.tasks:
            self.add(at.config)
        self.progress.update(self.tasks[at.config], completed=at.step, values=f"loss {at.loss:.2f}")


@dataclass(frozen=True)
class _Training(Resumable):
    """The training under way in a folder."""

    folder: Path
    config: TextConfig
    trainer: Callable[..., Any]

    @property
    def state_path(self) -> Path:
        return self.folder / STATE

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
        losses, saved = LastLosses(model_config.d_vocab), time.monotonic()
        done = self.load_state(model, optimizer, generator, losses) if self.step else 0
        stamp(self.folder, done + 1 if done else 0, provenance(self.trainer, device, model.W_E.dtype))
        for step in range(done + 1, config.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, step / config.warmup) * schedule[step - 1]
            drawn = torch.randint(len(tokens), (config.batch_size,), generator=generator)
            batch, real = tokens[drawn], kept[drawn]
            longest = int(real.sum(1).max())
            loss = text_loss(model, batch[:, :longest], real[:, :longest], generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            due = step == config.steps or time.monotonic() - saved > SAVE_SECONDS
            to_report = step % REPORT_STEPS == 0
            seen = {"loss": loss.detach()} if due or to_report or not loss.is_cuda else {}
            if seen and loss.isfinite():
                losses.add(loss.item())
            if not_finite(seen | (model.state_dict() if due else {})) or losses.exploded:
                self.stop_diverged(step, losses)
            if due:
                self.save_state(step, model, optimizer, generator, losses)
                saved = time.monotonic()
            if to_report or step == config.steps:
                report(step, loss.item())
        return model
