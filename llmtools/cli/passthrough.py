"""``llmtools serve`` and ``llmtools chat``: transformers' own commands, in a process that has imported llmtools.

That import is all there is to it: it teaches transformers to open our checkpoints. Options, endpoints and messages are
transformers'; see ``llmtools serve --help``. A GGUF file is served from a checkpoint of the same bits, which is written
to a temporary folder for as long as the server runs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

from ..errors import InputError

SUMMARIES = {
    "serve": "transformers' server (OpenAI's API) for our checkpoints, too",
    "chat": "transformers' chat in the terminal, with a server that runs",
}

NEEDS = {"serve": ("fastapi", "uvicorn", "openai", "pydantic"), "chat": ("rich",)}
"""what transformers' command imports, beyond what transformers itself needs"""


def run(command: str, args: Sequence[str]) -> int:
    """Runs transformers' `command` with these arguments; returns its exit code.

    Raises InputError where transformers has no such command, or something that it needs is not installed.
    """
    missing = [module for module in NEEDS[command] if find_spec(module) is None]
    if missing:
        raise InputError(f"{command} needs {', '.join(missing)}: pip install 'llmtools[serve]'")
    for arg in args:
        if _holds(arg, "adapter_config.json") and not _holds(arg, "config.json"):
            raise InputError(
                f"{arg} is an adapter, and {command} takes whole models; merge it first: llmtools export "
                f"--adapter {arg} --format dense --out MERGED"
            )
    app = _app(command)
    hook = sys.excepthook
    try:
        with ExitStack() as stack:
            app(args=[command, *_as_folders(args, stack)], prog_name="llmtools")
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except ValueError as error:  # transformers' word for what the user can mend, such as a server that is not there
        raise InputError(f"{error}") from error
    finally:
        sys.excepthook = hook  # typer replaces it
    return 0


def _as_folders(args: Sequence[str], stack: ExitStack) -> list[str]:
    """The arguments with a folder of ours for each GGUF file, until the stack is closed."""
    words = list(args)
    if "--gguf_file" in words[:-1]:  # a file in the folder or repository that the first argument names
        at = words.index("--gguf_file")
        file = words.pop(at + 1)
        words.pop(at)
        words = [f"{word.rstrip('/')}/{file}" if number == 0 else word for number, word in enumerate(words)]
    return [_folder_of(word, stack) if word.endswith(".gguf") else word for word in words]


def _folder_of(name: str, stack: ExitStack) -> str:
    from ..checkpoint.folder import load, save

    model, tokenizer = load(name)
    place = stack.enter_context(tempfile.TemporaryDirectory(prefix="llmtools-"))
    folder = save(model, tokenizer, os.path.join(place, os.path.basename(name).removesuffix(".gguf")))
    print(f"{name} is served as {folder}", file=sys.stderr, flush=True)
    return str(folder)


def _holds(folder: str, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name))  # false, too, for prose that no folder can be called


def _app(command: str) -> Any:
    """transformers' command line, if it has `command`."""
    import transformers

    reason = ""
    try:
        if find_spec(f"transformers.cli.{command}") is not None:
            from transformers.cli.transformers import app

            return app
    except ImportError as error:
        reason = f" ({error})"
    raise InputError(
        f"transformers {transformers.__version__} has no command {command!r} that can be borrowed{reason}; "
        "pip install 'transformers>=5.16,<6', or answer prompts with `llmtools generate`"
    )
