"""Kinds of arguments, and parsers whose complaints are one line."""

import argparse
import difflib
from collections.abc import Callable
from typing import Any, NoReturn

from aaae_dist.config import settings
from aaae_dist.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, like all others, and name the help of the verb at hand."""

    hint = ""  # what to tell of an option that is none

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        """Refuse what is left over here, not in the parser above, which does not know the verb."""
        namespace, unknown = super().parse_known_args(*arguments, **options)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
            what = "option" if unknown[0].startswith("-") else "argument"
            self.error(f"{unknown[0]}: unknown {what}" + (f"; did you mean {near[0]}?" if near else self.hint))
        return namespace, unknown


def whole(least: int, most: int = 10**12) -> Callable[[str], int]:
    """The type of an argument that is a whole number in this range."""

    def parse(text: str) -> int:
        try:
            if least <= (value := int(text)) <= most:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from {least} to {most}")

    return parse


SEED = whole(0, 2**63 - 1)


def share(text: str) -> float:
    """The type of an argument that is a share."""
    try:
        if 0 <= (value := float(text)) < 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: must be a share, from 0 to below 1")


def argument(*names: str, **options: Any) -> Callable[[Parser], Any]:
    """An argument, to be added to the verbs that take it."""
    return lambda made: made.add_argument(*names, **options)


def as_setting(flag: str, name: str, kind: Callable[[str], int]) -> Callable[[Parser], Any]:
    """A flag that means what a setting does, with its default."""
    default = settings()[name].default
    return argument(flag, type=kind, default=default, metavar="N", help=f"as {name}; default: {default}")


def verb(among: Any, command: str, summary: str, *arguments: Callable[[Parser], Any], example: str) -> Parser:
    """A verb among those of a parser or of a group."""
    made = among.add_parser(
        command.split()[-1],
        help=summary,
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=f"example:\n  {example}",
    )
    made.set_defaults(command=command)
    for add in arguments:
        add(made)
    return made


def group(verbs: Any, name: str, summary: str, *, example: str) -> Any:
    """Verbs under a name of theirs."""
    return verb(verbs, name, summary, example=example).add_subparsers(required=True, metavar="COMMAND")
