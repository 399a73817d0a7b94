"""Format of a command's help: ``--help`` shows the main options, ``--help_all`` every one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any


def formatter(first: Sequence[str] = (), *, short: bool = False) -> Any:
    """A formatter class for jsonargparse. first: names of the main options, in order; short: whether to show no others.

    It is defined on demand, so that jsonargparse is not imported for the overview of all commands.
    """
    from jsonargparse import DefaultHelpFormatter

    class Help(DefaultHelpFormatter):
        """Keeps the line breaks of the examples."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            if text.startswith("examples:"):
                return text
            return str(super()._fill_text(text, width, indent))

        def add_arguments(self, actions: Iterable[Any]) -> None:
            rank = {name: index for index, name in enumerate(first)}
            super().add_arguments(sorted(actions, key=lambda action: rank.get(action.dest, len(rank))))

    class ShortHelp(Help):
        """Shows the given options only, in one section."""

        def start_section(self, heading: str | None) -> None:
            super().start_section("options" if heading == "options" else None)

        def add_usage(self, usage: Any, actions: Iterable[Any], groups: Any, prefix: str | None = None) -> None:
            needed = [action for action in actions if action.required]
            super().add_usage(usage, [action for action in needed if action.dest in first], (), prefix)

        def add_arguments(self, actions: Iterable[Any]) -> None:
            super().add_arguments([action for action in actions if action.dest in first])

        def format_help(self) -> str:
            return str(super().format_help())

    return ShortHelp if short else Help


class HelpAll(argparse.Action):
    """``--help_all``: prints the help of every option and exits. const: names of the main options, which come first."""

    def __call__(self, parser: Any, *_: Any) -> None:
        parser.formatter_class = formatter(self.const)
        parser.print_help()
        parser.exit()
