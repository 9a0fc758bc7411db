"""The command line: `diffjax COMMAND`, also as `python -m diffjax`.

What the commands take is in `diffjax.flags`, what they do in `diffjax.commands`.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence

from diffjax import registry
from diffjax.commands import USAGE_ERROR, UsageError, describe, expected_errors
from diffjax.flags import COMMANDS

DEBUG_VARIABLE = "DIFFJAX_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code.

    It is 0, 1 (it failed), 2 (it was asked for wrongly), 75 (it was interrupted, and goes on when it is started again)
    or 128 + a signal.

    Expected errors are one line on stderr; `--debug`, or `DIFFJAX_DEBUG=1`, shows the traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    argv = [a for a in argv if a != "--debug"]
    try:
        code = dispatch(argv)
        # Here, while a closed pipe can still be caught: at exit the interpreter would complain about it.
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if debug:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        if debug or not isinstance(error, (*expected_errors(), KeyboardInterrupt)):
            raise
        code, text = describe(error)
        sys.stderr.write(f"diffjax: {text}\n")
        return code


def dispatch(argv: Sequence[str]) -> int:
    """Runs what the arguments ask for and returns the exit code; errors are raised.

    Raises:
      UsageError: for an unknown command, or flags that it does not take.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0 if argv else USAGE_ERROR
    if argv[0] == "--version":
        return version()
    if argv[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise UsageError(f"unknown command {argv[0]!r}; known: {known}{registry.nearest(argv[0], COMMANDS)}")
    try:
        arguments, overrides = parse(argv[0], argv[1:])
        return COMMANDS[argv[0]].run(arguments, overrides)
    except SystemExit as stop:
        return int(stop.code or 0)


def overview() -> str:
    """The help of the program as a whole."""
    rows = "\n".join(f"  {name:9}{command.summary}" for name, command in COMMANDS.items())
    return (
        f"diffjax: diffusion models in JAX\n\nusage: diffjax COMMAND [flags]\n\n{rows}\n\n"
        "examples:\n  diffjax train --config=configs/digits.py --workdir=runs/digits\n"
        "  diffjax eval --workdir=runs/digits\n  diffjax sample --workdir=runs/digits --classes=0,1,2 --seeds=0,1\n\n"
        "`diffjax COMMAND --help` lists the flags of a command. `--debug` shows tracebacks of expected errors.\n"
    )


def parse(name: str, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags of a command, and its `--config.key=value` overrides as `{key: value text}`.

    Raises:
      UsageError: for an unknown flag (with the nearest), a value of the wrong type, or a key of a config for a command
        that takes none.
    """
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"diffjax {name}",
        description=command.summary,
        epilog="examples:\n" + "\n".join(f"  {e}" for e in command.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    for flag, settings in command.flags:
        parser.add_argument(flag, **settings)
    flags = [flag for flag, _ in command.flags]
    overrides, rest = _overrides(argv)
    configured = "--config" in flags or "--workdir" in flags
    if overrides and not configured:
        key, known = next(iter(overrides)), ", ".join(flags) or "none"
        raise UsageError(f"--config.{key}: {name} takes no config; flags: {known}")
    if configured:
        shown = "sets one key of the config, such as --config.optim.lr=1e-3"
        parser.add_argument("--config.KEY", dest="ignored", metavar="VALUE", help=shown)
    try:
        arguments, unknown = parser.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; see diffjax {name} --help") from None
    if unknown:
        given = unknown[0].partition("=")[0]
        hint = _setting(given) if "--config" in flags else ""
        twin = {"--workdir": "--out", "--out": "--workdir"}.get(given)
        hint = hint or (f"; did you mean {twin!r}?" if twin in flags else registry.nearest(given, flags))
        raise UsageError(f"{name}: unknown argument {given!r}; flags: {', '.join(flags)}{hint}")
    return arguments, overrides


def _setting(flag: str) -> str:
    """How to set the key of the config that a flag is called after; empty if there is none."""
    from diffjax.train.config import defaults, flat

    name = flag.lstrip("-").replace("-", "_")
    keys = [key for key in flat(defaults()) if not key.startswith(("sample.", "eval."))]
    keys = [f"--config.{key}=VALUE" for key in keys if name == key or re.search(rf"[._]{re.escape(name)}$", key)]
    return f"; in the config it is set by {' or '.join(keys)}" if keys else ""


def _overrides(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`--config.key=value` and `--config.key value` taken out of the arguments."""
    overrides, rest, items = {}, [], iter(argv)
    for item in items:
        if not item.startswith("--config."):
            rest.append(item)
            continue
        key, equals, value = item[len("--config.") :].partition("=")
        if not equals:
            value = next(items, None)
        if not key or value is None:
            raise UsageError(f"{item!r} needs a key and a value: write --config.KEY=VALUE")
        overrides[key] = value
    return overrides, rest


def version() -> int:
    """`diffjax --version`."""
    from diffjax import __version__

    sys.stdout.write(f"diffjax {__version__}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
