"""The command line, ``l2l-fast``: one file a command. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import codecs
import os
import sys
import warnings

_PLAIN = {"±": "+-", "…": "...", "·": "-", "×": "x", "−": "-", "–": "-", "—": "-", "≤": "<=", "≥": ">=", "µ": "u"}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 for success, 1 for a failure, 2 for a wrong argument, 130 after Ctrl-C."""
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        sys.exit(f"l2l-fast: {error.name} is missing: pip install 'l2l_fast[all]'")
    from l2l_fast.cli.app import app

    _print_whatever_the_encoding()
    warnings.showwarning = lambda message, *where, **how: _complain(f"warning: {message}", 0)
    usage_error = typer.BadParameter.__bases__[0]  # typer brings its own click, whose names are not public
    click_error = usage_error.__bases__[0]
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="l2l-fast", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # while what it says can still be told
    except usage_error as error:
        code = _complain(error.format_message(), 2)
    except click_error as error:
        code = _complain(error.format_message(), 1)
    except (ValueError, FileNotFoundError, TypeError) as error:  # the library's own word on a bad argument
        code = _complain(error, 2)
    except BrokenPipeError:  # such as in "l2l-fast tasks | head -1": there is nobody to tell
        code = 1
        _give_up_stdout()
    except (RuntimeError, ImportError, OSError) as error:
        code = _complain(error, 1)
        _give_up_stdout()
    sys.exit(code)


def _complain(message: object, code: int) -> int:
    print("l2l-fast:", " ".join(str(message).split()), file=sys.stderr)
    return code


def _print_whatever_the_encoding() -> None:
    """What a terminal's encoding lacks comes out in plain characters, and ends no command after all its work."""

    def plain(error: UnicodeEncodeError) -> tuple[str, int]:
        missing = error.object[error.start : error.end]
        escaped = (_PLAIN.get(one) or one.encode("ascii", "backslashreplace").decode() for one in missing)
        return "".join(escaped), error.end

    codecs.register_error("l2l_fast.plain", plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="l2l_fast.plain")


def _give_up_stdout() -> None:
    """Where it cannot be written to, Python would fail once more at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
