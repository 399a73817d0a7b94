"""The command line: ``llmtools VERB --key value``. Verbs are recipes; their options come from the recipes' dataclasses.

``--config FILE.yaml`` gives options by file, flags after it override them, ``--print_config`` writes such a file,
``--json`` prints the result as data. A user's mistake is one line on stderr and exit code 2; nothing heavy is imported
for help.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import io
import json
import logging
import os
import re
import sys
import textwrap
import traceback
import typing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from ..errors import InputError, did_you_mean
from ..options import current_name
from ..ranks import is_first, on_one_machine, rank
from ..recipes.configs import with_packaged
from ..recipes.plain_yaml import read_value, shown
from ..startup import collector_resting
from .arguments import check_numbers, read_arguments, with_declared
from .help import HelpAll, formatter
from .legacy import translated
from .passthrough import SUMMARIES as PASSED_ON
from .passthrough import run as pass_on
from .verbs import VERBS, Verb

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns the exit code. 0: done; 1: a check failed; 2: an error that the user can fix, in one line; 70: a bug of
    llmtools, in one line; 130: Ctrl-C; 143: SIGTERM.
    """
    with _streams(), _own_process() if argv is None else nullcontext():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(args: list[str]) -> int:
    debug = "--debug" in args or os.environ.get("LLMTOOLS_DEBUG", "") not in ("", "0")
    args = [arg for arg in args if arg != "--debug"]
    handler = _log_to_stderr(debug)
    try:
        with _environment(_threads(args) | (_DEBUG if debug else _quiet(args))), warnings.catch_warnings():
            if not debug:  # of libraries, about each other's future versions
                warnings.simplefilter("ignore", FutureWarning)
            return _run(args)
    except BrokenPipeError:  # the reader of our output closed it, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except (KeyboardInterrupt, Exception) as error:
        if debug:
            traceback.print_exc()
        code, line = _exit_code_and_line(error)
        has_verb = args and not isinstance(error, KeyboardInterrupt) and not args[0].startswith("-")
        command = f"llmtools {args[0]}" if has_verb else "llmtools"
        if not is_first():
            if isinstance(error, (InputError, KeyboardInterrupt)) and on_one_machine():
                return code  # the first process has the same error and prints it
            command = f"{command} (process {rank()})"
        print(f"{command}: {line}", file=sys.stderr)
        return code
    finally:
        logging.getLogger("llmtools").removeHandler(handler)


def _threads(args: list[str]) -> dict[str, str]:
    """What has idle threads sleep after a thousand turns of waiting, some hundredths of a millisecond, where models are
    quantized or trained.

    GNU OpenMP's own default is some milliseconds after each parallel region, which on a busy machine take most of the
    processor's time. Commands that generate keep it: the products of a token are short, and waking threads costs more.
    """
    return {"GOMP_SPINCOUNT": "1000"} if args[:1] in (["quantize"], ["finetune"], ["recover"], ["merge"]) else {}


_DEBUG = {"LLMTOOLS_DEBUG": "1"}


def _quiet(args: list[str]) -> dict[str, str]:
    """Environment variables that keep torch's C++ code from writing to the terminal.

    In a sweep the profiler, which measures memory, would log; of DDP's warnings, those of the first process are enough.
    """
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99"}
    return quiet if args[:1] == ["sweep"] or not is_first() else {}


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for the length of the block, except those that the user has set."""
    fresh = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in fresh})
    try:
        yield
    finally:
        for name in fresh:
            os.environ.pop(name, None)


def _exit_code_and_line(error: BaseException) -> tuple[int, str]:
    """The exit code of an exception, and its message in one line."""
    if isinstance(error, KeyboardInterrupt):
        return int(getattr(error, "exit_code", 130)), str(error) or "stopped"
    if isinstance(error, (InputError, OSError, ImportError, MemoryError)):
        return 2, _one_line(error)
    if type(error).__name__ == "OutOfMemoryError":
        return 2, f"not enough memory on the device: {_one_line(error)}"
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch's message on a CPU
        return 2, f"not enough memory: {_one_line(error)}"
    return 70, f"unexpected {type(error).__name__}: {_one_line(error)} (please report; --debug shows the traceback)"


@contextmanager
def _streams() -> Iterator[None]:
    """Opens standard streams that are closed, and lets whatever we print be written in the user's locale."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent process; another file would get its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    former = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace" if _is_unicode(stream) else "replace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, former, strict=True):
            if not stream.closed:
                stream.reconfigure(errors=errors)


@contextmanager
def _own_process() -> Iterator[None]:
    """What suits a process of the command's own: a garbage collector that rests, and log messages that do not reach the
    root logger, whose handlers print them again where a library gave it one (absl, which rouge-score imports)."""
    logger = logging.getLogger("llmtools")
    former, logger.propagate = logger.propagate, False
    try:
        with collector_resting():
            yield
    finally:
        logger.propagate = former


def _is_unicode(stream: Any) -> bool:
    return str(getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview(), flush=True)
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from .. import __version__

        print(__version__, flush=True)
        return 0
    _check_text(args)
    name, *args = args
    if name in PASSED_ON:
        return pass_on(name, args)
    if name not in VERBS:
        raise InputError(f"no such command; {did_you_mean(name, [*VERBS, *PASSED_ON])}")
    verb = VERBS[name]
    options = verb.recipe()
    if verb.positional and args and not args[0].startswith("-"):
        args = [f"--{verb.positional}", *args]
    as_json = "--json" in args
    args = with_packaged(translated(name, args, _names(options)))
    if name == "finetune":
        args = _with_training(args, _names(options))
    recipe = read_recipe(name, options, [arg for arg in args if arg != "--json"])
    if recipe is None:
        return 0
    result = verb.run(recipe)
    if not is_first():
        pass
    elif as_json:
        ascii_only = not _is_unicode(sys.stdout)
        print(json.dumps(dataclasses.asdict(result), indent=2, ensure_ascii=ascii_only, default=str))
    else:
        print(result)
    sys.stdout.flush()
    return int(getattr(result, "exit_code", 0))


def _with_training(args: list[str], known: list[str]) -> list[str]:
    """Adds ``training.`` to bare arguments of trl.SFTConfig: --learning_rate 2e-4, as in TRL's own scripts."""
    ours = {"config", "trust_plugins", "json", "debug", "help", "help_all", "print_config", *known}
    names = [current_name("finetune", arg.partition("=")[0].lstrip("-")) for arg in args if arg.startswith("--")]
    if all(name in ours or "." in name for name in names):
        return args
    from ..train.arguments import training_arguments

    bare = set(training_arguments()) - ours
    return [
        f"--training.{arg[2:]}" if arg.startswith("--") and arg[2:].partition("=")[0] in bare else arg for arg in args
    ]


def _bare_training_arguments(options: type[Any]) -> list[str]:
    """Arguments that `_with_training` accepts beside the recipe's own options."""
    from ..train.arguments import training_arguments
    from ..train.options import Finetune

    return list(training_arguments()) if options is Finetune else []


def _check_text(args: list[str]) -> None:
    """Raises InputError for an argument that is not valid text: the system passes any bytes but NUL."""
    for arg in args:
        try:
            arg.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{arg!a} is not text in this locale's encoding ({sys.getfilesystemencoding()}); set a UTF-8 "
                f"locale (LC_ALL=C.UTF-8), or rename the file"
            ) from error
        if "\0" in arg:
            raise InputError(f"{shown(arg)} contains a NUL character, which no text or file name may have")


_COMMON = ("config", "json", "help", "help_all")
"""Options of every command, which the short help shows after the command's own."""


def read_recipe(name: str, options: type[Any], args: list[str]) -> Any:
    """The recipe (an instance of `options`) of a command's arguments: flags, and YAML files as plain data.

    name: one of VERBS, or the name of a script. Returns None where help or the configuration was printed instead.
    Raises InputError for arguments that cannot be read.
    """
    return _parse(_parser(name, VERBS.get(name), options), name, options, args)


def _parser(name: str, verb: Verb | None, options: type[Any]) -> Any:
    from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

    first = (*verb.first, *_COMMON) if verb and verb.first else ()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("llmtools", read_value)
    parser = ArgumentParser(
        prog=_command(name),
        description=(options.__doc__ or "").strip(),
        epilog=_epilog(verb) if verb else None,
        formatter_class=formatter(first, short=bool(first)),
        parser_mode="llmtools",
        exit_on_error=False,
        allow_abbrev=False,
    )
    if first:
        parser.add_argument(
            "--help_all",
            action=HelpAll,
            nargs=0,
            const=verb.first if verb else (),
            default=argparse.SUPPRESS,
            help="Every option with its help.",
        )
    parser.add_argument(
        "--config", action="config", help="YAML of these options, or the name of a packaged one; flags override it."
    )
    parser.add_class_arguments(options, as_group=False)
    if "model" in _names(options):
        parser.add_argument(
            "--gguf_file",
            type=str,
            default=argparse.SUPPRESS,
            help="Name of a GGUF file in the folder or repository of --model.",
        )
    parser.add_argument(
        "--trust_plugins",
        type=bool,
        default=argparse.SUPPRESS,
        help="Permission to take options that run code (plugin, module:Class, trust_remote_code) from a YAML.",
    )
    parser.add_argument("--json", action="store_true", help="Output of the result as JSON.")
    parser.add_argument("--debug", action="store_true", help="Output of the traceback of an error.")
    return parser


def _epilog(verb: Verb) -> str:
    examples = "examples:\n" + textwrap.indent(verb.example, "  ")
    return f"{examples}\n\n{verb.further()}" if verb.further else examples


def _parse(parser: Any, name: str, options: type[Any], args: list[str]) -> Any:
    """The recipe of the arguments; None where help or the configuration was printed instead.

    Options that are mappings of any values are taken as `read_arguments` read them, not as jsonargparse parsed them.
    """
    given = read_arguments(args, options, name)
    try:
        parsed = parser.parse_args(given.args, env=False)
    except SystemExit as stopped:
        if stopped.code in (0, None):
            return None
        raise InputError("these arguments cannot be read; see --help") from stopped
    except (argparse.ArgumentError, argparse.ArgumentTypeError, TypeError, ValueError) as error:
        raise InputError(_readable(str(error), name, options)) from error
    recipe = _instance(options, parsed, given.open_options)
    if (file := parsed.get("gguf_file")) is not None:
        if not recipe.model:
            raise InputError(f"--gguf_file {file} is a file of a folder or repository; pass that as --model")
        recipe = dataclasses.replace(recipe, model=f"{str(recipe.model).rstrip('/')}/{file}")
    check_numbers(dataclasses.asdict(recipe))
    return with_declared(recipe, given.texts)


def _instance(options: type[Any], parsed: Any, open_options: dict[str, Any], prefix: str = "") -> Any:
    """The dataclass with the parsed values. (jsonargparse would instantiate classes that a value names.)"""
    hints = typing.get_type_hints(options)
    values = {}
    for field in dataclasses.fields(options):
        value, name = parsed[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            value = _instance(hints[field.name], value, open_options, f"{name}.")
        elif name in open_options and isinstance(open_options[name], type(value)):
            value = open_options[name]
        values[field.name] = value
    return options(**values)


def _readable(message: str, name: str, options: type[Any]) -> str:
    """jsonargparse's message as one of ours: the given value, what is expected, the nearest name."""
    known = _names(options)
    if found := re.match(r"unrecognized arguments: (--?)?([^\s=]+)", message):
        dashes, word = found.groups()
        if not dashes:
            return f"unexpected argument {word!r}; options are --key value (see {_command(name)} --help)"
        return f"no option --{word}; {_near(word, known, _bare_training_arguments(options))}"
    if found := re.match(r"Option '([^']+)' is not accepted", message):
        return f"no key {found[1]!r}; {_near(found[1], known)}"
    if found := re.match(r"Group '([^']+)' does not accept option '([^']+)'", message):
        return f"no key '{found[1]}.{found[2]}'; {_near(f'{found[1]}.{found[2]}', known)}"
    if found := re.match(r"the following arguments are required: (.*)", message):
        missing = ", ".join(f"--{option.strip()}" for option in found[1].split(","))
        return f"missing: {missing} (see {_command(name)} --help)"
    if found := re.match(r'Parser key "([^"]+)":\s*(.*)', message, flags=re.DOTALL):
        key, reason = found.groups()
        if expected := re.findall(r"Expected an? (?:<class '(\w+)'>|([^\n.]+))", reason):
            kinds = " or ".join(dict.fromkeys("null" if a == "NoneType" else a or b for a, b in expected))
            given = re.search(r"(?:Given value|Got value): (.*)", reason)
            return f"--{key} {given[1] if given else ''}: {kinds} is expected"
        return f"--{key}: {' '.join(reason.split())}"
    return " ".join(message.split())


def _command(name: str) -> str:
    return f"llmtools {name}" if name in VERBS else name


def _near(name: str, known: list[str], further: Sequence[str] = ()) -> str:
    near = difflib.get_close_matches(name, [*known, *further], n=1, cutoff=0.5)
    if near and near[0] in further:
        return f"did you mean {near[0]!r}, of trl.SFTConfig?"
    return did_you_mean(name, known).replace("(there are: ", "(there are: config, ", 1)


def _names(options: type[Any], prefix: str = "") -> list[str]:
    """Every option's name, nested ones with dots."""
    hints = typing.get_type_hints(options)
    names: list[str] = []
    for field in dataclasses.fields(options):
        name = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            names += _names(hints[field.name], f"{name}.")
        else:
            names.append(name)
    return names


def _overview() -> str:
    summaries = {name: verb.summary for name, verb in VERBS.items()} | PASSED_ON
    width = max(map(len, summaries))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in summaries.items())
    return f"""\
usage: llmtools COMMAND [--config FILE.yaml] [--key value …] [--json]

Quantize a language model to a few bits with any quantizer, finetune LoRA adapters on it, evaluate.

commands:
{commands}

examples:
  llmtools quantize --model DIR --quantizer optq --bits 3 --group_size 64 --calibration train.txt --out QDIR
  llmtools finetune --model QDIR --data train.jsonl --out ADAPTER --training.max_steps 200
  llmtools evaluate --model QDIR --adapter ADAPTER --task perplexity --data test.txt

`llmtools COMMAND --help` shows the main options, --help_all every one; --debug (or LLMTOOLS_DEBUG=1) shows an error's
traceback."""


def _log_to_stderr(debug: bool) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("llmtools")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO if is_first() else logging.ERROR)
    return handler


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    if isinstance(error, MemoryError):
        return f"not enough memory {error}".strip()
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
