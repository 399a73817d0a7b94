"""Redaction of secrets from written metadata, such as a hub token among the training arguments.

Secrets are recognised by their names, since a recipe passes many options on to libraries: `hub_token`, `api_key`,
`password`. The tokens of a vocabulary (`eos_token`) and numbers of tokens (`max_new_tokens`) are not secrets.
"""

from __future__ import annotations

import re
from typing import Any

_SECRETS = {"secret", "password", "passwd", "passphrase", "credential", "authorization", "apikey"}
"""Parts of a name that mark a secret anywhere in it; "token" and "key" do at its end."""
_VOCABULARY = {"eos", "bos", "pad", "unk", "sep", "cls", "mask", "image", "audio", "video", "boi", "eoi"}
_VOCABULARY |= {"stop", "start", "end", "special", "prefix", "suffix", "middle", "virtual", "new", "model"}


def is_secret(name: str) -> bool:
    """Whether an option of this name holds a secret.

    >>> [is_secret(name) for name in ("hub_token", "apiKey", "tokens", "eos_token", "max_new_tokens", "*.key")]
    [True, True, True, False, False, False]
    """
    if not re.fullmatch(r"[\w-]+", name):
        return False  # a pattern of modules, or a path
    words = [word.lower() for word in re.findall(r"[A-Z]*[a-z0-9]+|[A-Z0-9]+", name)]
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if word.removesuffix("s") in ("token", "key") and not after and before not in _VOCABULARY:
            return True
        if word.removesuffix("s") in _SECRETS:
            return True
    return False


def redacted(value: Any) -> Any:
    """The value without the entries under a secret's name in its mappings, at any depth."""
    if isinstance(value, dict):
        return {
            key: redacted(each)
            for key, each in value.items()
            if not (isinstance(key, str) and is_secret(key) and _holds_text(each, count=not key.lower().endswith("s")))
        }
    return [redacted(each) for each in value] if isinstance(value, list | tuple) else value


def _holds_text(value: Any, *, count: bool) -> bool:
    """Whether it contains a text; with `count`, or a number."""
    if isinstance(value, dict):
        return any(_holds_text(each, count=False) for each in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_text(each, count=False) for each in value)
    if isinstance(value, bool) or value is None:
        return False
    return count or not isinstance(value, int | float)
