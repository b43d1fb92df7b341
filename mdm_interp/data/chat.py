"""Sentences inside a tokenizer's chat template, which is a small program that a stranger may have written.

Jinja's sandbox keeps a template from files and from Python, and not from taking all time and memory. So it is rendered
once, around words that stand for any sentence, in a process of its own that ends where it takes too much.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from mdm_interp.errors import UserError

INSTRUCTION, LEAD = "State a fact.", "Here is a fact:"
"""What a user of a chat asks, and how the answer begins, so that the sentence comes after a space."""
STAND_IN = " “Åsa” is 1 of A&B's <b>."
"""A sentence with all that a template might change: capitals, marks, accents."""
SECONDS, MEMORY, LONGEST = 3, 2**30, 10**6
"""What rendering may take, and how many characters it may give."""
BACKSTOP = 60
"""Seconds of the clock, where a system cannot count those of a processor."""


def in_chat(tokenizer: Any, sentence: str) -> str:
    """Return the chat in which an assistant states a sentence, in the words of the tokenizer's own template.

    Raises:
        UserError: the tokenizer has no chat template, or it cannot be used, takes more than :data:`SECONDS` or
            :data:`MEMORY`, or does not keep what the assistant says as it is.
    """
    if not tokenizer.chat_template:
        raise UserError("chat: the tokenizer has no chat template; leave chat out")
    named = json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map], default=str)
    before, after = _around(named)
    return f"{before}{LEAD}{sentence}{after}"


@lru_cache
def _around(named: str) -> tuple[str, str]:
    """Return what a chat has before and after what the assistant says.

    Args:
        named: A chat template, or several by their names, and special tokens, as JSON.
    """
    command = [sys.executable, "-I", "-c", RENDER, json.dumps([str(entry) for entry in sys.path])]
    try:
        ended = subprocess.run(command, input=named.encode(), capture_output=True, timeout=BACKSTOP)
        said = json.loads(ended.stdout) if ended.returncode == 0 else {"failed": _last_words(ended)}
    except subprocess.TimeoutExpired:
        said = {"failed": f"it takes more than {BACKSTOP} s"}
    except OSError as error:
        said = {"failed": f"no process can be started: {error}"}
    if "failed" in said:
        raise UserError(f"chat: the tokenizer's chat template fails ({' '.join(said['failed'].split())[:200]})")
    before, *after = said["text"].split(f"{LEAD}{STAND_IN}")
    if len(after) != 1:
        raise UserError("chat: the tokenizer's chat template does not hold what the assistant says once, as it is")
    return before, after[0]


def _last_words(ended: subprocess.CompletedProcess[bytes]) -> str:
    """Say why a process ended early: by a signal, which its limits send, or by an error."""
    if ended.returncode < 0:
        return f"it takes more than {SECONDS} s or {MEMORY} bytes"
    return ended.stderr.decode(errors="replace").strip().rpartition("\n")[2]


# ---- in a process of its own

RENDER = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from mdm_interp.data.chat import _render; _render()"
"""Starts without the folder that it is in on its path: that may be a stranger's."""


def _render() -> None:
    """Render the template that stdin has, within the limits; print the text, or why there is none, as JSON."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    template, tokens = json.load(sys.stdin)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), chat_template=template)
    turns = [{"role": "user", "content": INSTRUCTION}, {"role": "assistant", "content": f"{LEAD}{STAND_IN}"}]
    _limit()
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **tokens)
        if len(text) > LONGEST:
            raise ValueError(f"it makes {len(text)} characters, and at most {LONGEST} are read")
    except Exception as error:  # a template may do anything that its sandbox allows, and fail at it
        print(json.dumps({"failed": str(error) or type(error).__name__}))
    else:
        print(json.dumps({"text": text}))


def _limit() -> None:
    """Have this process end where it takes more than is allowed, as far as the system counts it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        seconds = int(time.process_time()) + SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
