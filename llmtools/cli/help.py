"""How a command's ``--help`` looks: the options that most people need first, the others with ``--help_all``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any


def formatter(shown: Sequence[str] = ()) -> Any:
    """A formatter class for jsonargparse. shown: names of the options in the short help, in order; none: all of them.

    It is made on demand, so that jsonargparse is not imported for the overview of all commands.
    """
    from jsonargparse import DefaultHelpFormatter

    class Help(DefaultHelpFormatter):
        """Keeps the lines of the examples as they are."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            if text.startswith("examples:"):
                return text
            return str(super()._fill_text(text, width, indent))

    class ShortHelp(Help):
        """Shows the chosen options alone, all in one section."""

        def start_section(self, heading: str | None) -> None:
            super().start_section("options" if heading == "options" else None)

        def add_usage(self, usage: Any, actions: Iterable[Any], groups: Any, prefix: str | None = None) -> None:
            needed = [action for action in actions if action.required]
            super().add_usage(usage, [action for action in needed if action.dest in shown], (), prefix)

        def add_arguments(self, actions: Iterable[Any]) -> None:
            known = {action.dest: action for action in actions}
            super().add_arguments([known[name] for name in shown if name in known])

        def format_help(self) -> str:
            return str(super().format_help())

    return ShortHelp if shown else Help


class HelpAll(argparse.Action):
    """``--help_all``: prints every option and stops."""

    def __call__(self, parser: Any, *_: Any) -> None:
        parser.formatter_class = formatter()
        parser.print_help()
        parser.exit()
