"""``llmtools serve`` and ``llmtools chat``: transformers' own commands, in a process that has imported llmtools.

The import registers our checkpoints with transformers. Options, endpoints and messages are transformers'; see
``llmtools serve --help``. A GGUF file is served from a checkpoint with the same weights, in a temporary folder that
exists while the server runs. The server answers requests for the file's name, without its folder.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, chdir, suppress
from importlib.util import find_spec
from typing import Any

from ..errors import InputError
from ..signals import Request, interruptible
from ..startup import libraries_loaded

SUMMARIES = {
    "serve": "serve a model with transformers' server (OpenAI's API)",
    "chat": "chat with a running server in the terminal, by transformers",
}

NEEDS = {"serve": ("fastapi", "uvicorn", "openai", "pydantic"), "chat": ("rich",)}
"""Command → packages that it imports beyond transformers' own requirements."""


def run(command: str, args: Sequence[str]) -> int:
    """Runs transformers' `command` with these arguments; returns its exit code.

    Raises InputError where transformers has no such command, or a package that it needs is not installed.
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
    args = _joined(args)
    if command == "serve":
        _check_served(args)
        _make_cache()
    app = _app(command)
    libraries_loaded()
    hook, request = sys.excepthook, Request()
    try:
        with interruptible() as request, ExitStack() as stack:  # the server passes SIGTERM on once it has shut down
            if args and _is_gguf(args[0]):
                args = _opened(args, stack) if command == "serve" else [os.path.basename(args[0]), *args[1:]]
            app(args=[command, *args], prog_name="llmtools")
    except SystemExit as stopped:
        if request.number is not None:  # typer makes 1 or 130 of any interrupt
            return request.exit_code
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except ValueError as error:  # transformers' error for what the user can fix, such as a server that does not run
        raise InputError(f"{error}".replace("`transformers serve`", "`llmtools serve MODEL`")) from error
    except ImportError as error:
        raise _missing(command, error) from error
    finally:
        sys.excepthook = hook  # typer replaces it
    return 0


def _check_served(args: Sequence[str]) -> None:
    """Raises InputError for a model (the first argument) that cannot be served."""
    from ..checkpoint.loading import check_model

    if not args or args[0].startswith("-"):
        return
    check_model(args[0])
    if "@" in args[0] and os.path.isdir(args[0]):
        raise InputError(f"{args[0]}: transformers reads the part after @ as a revision; rename the folder")


def _make_cache() -> None:
    """Creates the hub's cache folder; /v1/models lists it, and fails without."""
    from huggingface_hub.constants import HF_HUB_CACHE

    with suppress(OSError):
        os.makedirs(HF_HUB_CACHE, exist_ok=True)


def _missing(command: str, error: ImportError) -> InputError:
    return InputError(f"{command}: {error}; pip install 'llmtools[serve]'")


def _joined(args: Sequence[str]) -> list[str]:
    """The arguments with ``--gguf_file`` joined to the folder or repository that the first argument names."""
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--gguf_file=") else [arg])]
    if "--gguf_file" in args[1:-1]:
        at = args.index("--gguf_file")
        file = args.pop(at + 1)
        args.pop(at)
        args[0] = f"{args[0].rstrip('/')}/{file}"
    return args


def _is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file in our notation; transformers' own is ``repo:file.gguf``."""
    return name.endswith(".gguf") and ":" not in name and not os.path.isdir(name)


def _opened(args: Sequence[str], stack: ExitStack) -> list[str]:
    """The arguments to serve a GGUF file from a checkpoint with its name in a temporary folder.

    That is the current folder until the stack closes: transformers' server answers requests for the very path that it
    was given, and so that is the name alone. Files that other arguments name become absolute.
    """
    from ..checkpoint.folder import load, save

    name, file = args[0], os.path.basename(args[0])
    model, tokenizer = load(name)
    place = stack.enter_context(tempfile.TemporaryDirectory(prefix="llmtools-"))
    save(model, tokenizer, os.path.join(place, file))
    others = [_absolute(arg) for arg in args[1:]]
    stack.enter_context(chdir(place))
    print(f"{name} is served as {file}", file=sys.stderr, flush=True)
    return [file, *others]


def _absolute(arg: str) -> str:
    """A file's path, alone or after ``--option=``, as an absolute one; other arguments as they are."""
    option, equals, value = arg.rpartition("=")
    return f"{option}{equals}{os.path.abspath(value)}" if os.path.isfile(value) else arg


def _holds(folder: str, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name))  # also false for text that is no valid path


def _app(command: str) -> Any:
    """transformers' command line app. Raises InputError unless it has `command`."""
    import transformers

    try:
        if find_spec(f"transformers.cli.{command}") is not None:
            from transformers.cli.transformers import app

            return app
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("transformers"):
            raise _missing(command, error) from error
    raise InputError(
        f"transformers {transformers.__version__} has no command {command!r} to pass on to; "
        "pip install 'transformers>=5.16,<6', or answer prompts with `llmtools generate`"
    )
