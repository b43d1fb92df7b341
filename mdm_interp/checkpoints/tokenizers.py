"""Tokenizers of checkpoints, built from their files alone: no class a file names is ever imported.

`tokenizer.json` is read as it is; without one, `vocab.json` and `merges.txt` make Qwen2's byte-level BPE, which is what
Dream has under a class name of its own. `tokenizer_config.json` and `special_tokens_map.json` add the special tokens,
and `added_tokens.json` those of old files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mdm_interp.checkpoints.weights import read_json
from mdm_interp.errors import UserError
from mdm_interp.files import read_text, replacing, require_file, write_text

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 splits text before its BPE (transformers, models/qwen2)."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("additional_special_tokens", "extra_special_tokens")
CHAT = "chat_template.jinja"
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
FILES += ("special_tokens_map.json", CHAT)


def load_tokenizer(
    folder: Path, pad_id: Any, mask_id: int | None, d_vocab: int, mask_token: str | None = None
) -> PreTrainedTokenizerFast | None:
    """Load the tokenizer of a checkpoint's folder; None if the folder has none. A link that leads nowhere is a file
    that cannot be read.

    Args:
        pad_id: Where config.json has the padding, if it says.
        mask_id: Where the mask is, if that is known.
        d_vocab: Rows of the embedding, of which there must be one for every token.
        mask_token: The string to register at `mask_token_id` if the files hold nothing there.

    Raises:
        UserError: a file is damaged, the mask is not where config.json has it, or a token has no embedding.
    """
    backend = _read_backend(folder)
    if backend is None:
        return None
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= read_json(folder / name) if os.path.lexists(folder / name) else {}
    try:
        _add_tokens(backend, folder, settings)
        named = {name: _content(settings[name]) for name in SPECIAL if settings.get(name) is not None}
        extra = dict.fromkeys(_content(token) for name in EXTRA for token in _listed(settings.get(name)))
        _require_few(extra)
        kept = {
            name: settings[name] for name in ("model_max_length", "chat_template") if settings.get(name) is not None
        }
        if os.path.lexists(folder / CHAT):  # comes first in transformers, too
            kept["chat_template"] = read_text(folder / CHAT)
        tokenizer = _Tokenizer(
            tokenizer_object=backend,
            extra_special_tokens=[token for token in extra if token not in named.values()],
            clean_up_tokenization_spaces=False,
            **named,
            **kept,
        )
    except Exception as error:  # what `tokenizers` raises is a bare Exception
        raise UserError(
            f"{folder}: the tokenizer's files do not fit together ({error}); download them again"
        ) from error
    _set_mask(tokenizer, mask_id, mask_token, folder)
    highest = max(tokenizer.get_vocab().values())
    if highest >= d_vocab:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {highest}, but the embedding {d_vocab} rows; replace one"
        )
    if tokenizer.pad_token is None and type(pad_id) is int and 0 <= pad_id < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return tokenizer


def find_mask(tokenizer: PreTrainedTokenizerFast | None) -> str | None:
    """Return the mask of a tokenizer: the one that it names, or else the only added token that is called so."""
    if tokenizer is None:
        return None
    if tokenizer.mask_token is not None:
        return str(tokenizer.mask_token)
    named = [token.content for token in tokenizer.added_tokens_decoder.values() if "mask" in token.content.lower()]
    return named[0] if len(named) == 1 else None


def find_added_mask(folder: Path) -> tuple[str, int] | None:
    """Return the mask in added_tokens.json and its id, if it is the only token there that is called so."""
    path = folder / "added_tokens.json"
    added = read_json(path) if os.path.lexists(path) else {}
    named = [(token, index) for token, index in added.items() if "mask" in token.lower() and type(index) is int]
    return named[0] if len(named) == 1 else None


def qwen2_backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Build Qwen2's byte-level BPE, as transformers' `Qwen2Tokenizer` builds it."""
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix=""))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_backend(folder: Path) -> Tokenizer | None:
    whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if os.path.lexists(whole):
            require_file(whole, MOST_BYTES)
            backend = Tokenizer.from_file(str(whole))
            _require_modest(backend)
            return backend
        if not (os.path.lexists(vocab) and os.path.lexists(merges)):
            return None
        lines = [line for line in read_text(merges).split("\n") if line.strip()]
        if lines and lines[0].startswith("#version"):
            del lines[0]
        return qwen2_backend(read_json(vocab), [(left, right) for left, right in map(str.split, lines)])
    except UserError:
        raise
    except Exception as error:  # what `tokenizers` raises is a bare Exception
        raise UserError(f"{folder}: the tokenizer cannot be read ({error}); download its files again") from error


def _require_few(added: Collection[Any]) -> None:
    if len(added) > MOST_ADDED:  # each takes longer than the one before
        raise ValueError(f"they add {len(added)} tokens, and at most {MOST_ADDED} are read")


def _require_modest(backend: Tokenizer) -> None:
    """Refuse a tokenizer that makes texts many times longer: a few steps could fill the memory."""
    parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    times = math.prod(_growth(json.loads(part.__getstate__())) for part in parts if part is not None)
    if times > MOST_GROWTH:
        raise ValueError(f"it makes texts up to {times:.0e} times longer")


MOST_BYTES, MOST_GROWTH, MOST_ADDED = 48 * 2**20, 1000, 10_000


def _growth(step: Mapping[str, Any]) -> float:
    """Return how many times longer a step of a tokenizer, as tokenizer.json has it, makes a text at most, but for what
    Unicode itself does."""
    inner = next((step[name] for name in ("normalizers", "pretokenizers", "decoders") if name in step), [])
    own = len(step.get("content") or step.get("prepend") or "") if step["type"] in ("Replace", "Prepend") else 1
    own = 2 if step["type"] == "ByteLevel" else own
    return float(max(own, 1)) * math.prod(map(_growth, inner))


class _Tokenizer(PreTrainedTokenizerFast):
    """A tokenizer whose mistakes are a user's: patterns of its files that take too long, and texts that are none."""

    def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
        options.setdefault("verbose", False)  # whoever asks a model says what it takes, and of what
        try:
            return super().__call__(text, *args, **options)
        except BaseException as error:  # a panic of `tokenizers` is no Exception, and its class cannot be imported
            if type(error).__name__ == "PanicException":
                raise UserError(f"tokenizer: fails at a text ({error}); use other tokenizer files") from error
            marks = (mark for one in ([text] if isinstance(text, str) else text or ()) for mark in one)
            if half := next((mark for mark in marks if "\ud800" <= mark <= "\udfff"), None):
                raise UserError(f"text: {half!r} is half of a character; leave it out") from error
            raise


_Tokenizer.__name__ = PreTrainedTokenizerFast.__name__  # what `save_pretrained` writes


def _add_tokens(backend: Tokenizer, folder: Path, settings: Mapping[str, Any]) -> None:
    """Add the tokens beyond the vocabulary, each at the id its file gives."""
    decoder = settings.get("added_tokens_decoder")
    added = {int(index): AddedToken(**token) for index, token in decoder.items()} if decoder else {}
    if not added and (folder / "added_tokens.json").exists():
        special = {_content(settings[name]) for name in SPECIAL if settings.get(name) is not None}
        special |= {_content(token) for name in EXTRA for token in _listed(settings.get(name))}
        for token, index in read_json(folder / "added_tokens.json").items():
            added[index] = AddedToken(token, special=token in special, normalized=token not in special)
    _require_few(added)
    for index, token in sorted(added.items()):
        backend.add_tokens([token])  # special or not: the token itself says
        if backend.token_to_id(token.content) != index:
            got = backend.token_to_id(token.content)
            raise UserError(
                f"{folder}: added token {token.content!r} has id {index} in its file, but {got} in the vocabulary"
            )


def _set_mask(tokenizer: PreTrainedTokenizerFast, mask_id: int | None, mask_token: str | None, folder: Path) -> None:
    """Make the token at `mask_id` the mask, registering `mask_token` there if the vocabulary ends just before."""
    if mask_id is None:
        return
    if mask_id not in tokenizer.get_vocab().values() and mask_token is not None and tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": mask_token})
    elif tokenizer.mask_token is None and mask_id in tokenizer.added_tokens_decoder:
        tokenizer.mask_token = tokenizer.added_tokens_decoder[mask_id].content
    if tokenizer.mask_token_id != mask_id:
        has = f"{tokenizer.convert_ids_to_tokens(mask_id)!r} there" if mask_id < len(tokenizer) else "no such id"
        raise UserError(
            f"{folder}: mask_token_id is {mask_id}, but the tokenizer has {has} and its mask "
            f"{tokenizer.mask_token!r} at {tokenizer.mask_token_id}; give the tokenizer files of these weights"
        )


def _content(token: Any) -> str:
    """Return a special token's string; files hold it bare or as an object."""
    return token["content"] if isinstance(token, Mapping) else str(token)


def _listed(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, Mapping) else list(tokens or [])


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, tokenizer_class: str, *, split: bool) -> None:
    """Write a fast tokenizer's files, so that :func:`load_tokenizer` gives the same one.

    Args:
        tokenizer_class: What `tokenizer_config.json` names; nothing here reads it.
        split: Write `vocab.json`, `merges.txt` and `added_tokens.json` if these say all there is to say, as Dream's
            do; otherwise `tokenizer.json`.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    settings = {name: getattr(tokenizer, name) for name in SPECIAL if getattr(tokenizer, name) is not None}
    added = {str(token.pop("id")): token for token in content["added_tokens"]}
    named = set(settings.values())
    settings |= {
        "additional_special_tokens": [token for token in tokenizer.all_special_tokens if token not in named],
        "added_tokens_decoder": added,
        "tokenizer_class": tokenizer_class,
        "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    model = content["model"]
    if split and _is_qwen2(content):
        write_text(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
        write_text(
            folder / "merges.txt", "#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
        )
        ids = {token["content"]: int(index) for index, token in added.items()}
        write_text(folder / "added_tokens.json", json.dumps(ids, ensure_ascii=False, indent=2) + "\n")
    else:
        with replacing(folder / "tokenizer.json") as temporary:
            tokenizer.backend_tokenizer.save(str(temporary))
    write_text(folder / "tokenizer_config.json", json.dumps(settings, ensure_ascii=False, indent=2) + "\n")


def _is_qwen2(content: Mapping[str, Any]) -> bool:
    """Tell whether a tokenizer.json is what `vocab.json` and `merges.txt` alone would give."""
    if content["model"]["type"] != "BPE" or any(
        len(" ".join(pair).split()) != 2 for pair in content["model"]["merges"]
    ):
        return False
    empty = json.loads(qwen2_backend({}, []).to_str())
    parts = ("normalizer", "pre_tokenizer", "decoder")
    model = {name: value for name, value in content["model"].items() if name not in ("vocab", "merges")}
    same_model = all(empty["model"][name] == value for name, value in model.items())
    return same_model and all(content[part] == empty[part] for part in parts) and _adds_nothing(content)


def _adds_nothing(content: Mapping[str, Any]) -> bool:
    post = content["post_processor"]
    return post is None or all("Sequence" in piece for piece in post.get("single", [{}]))
