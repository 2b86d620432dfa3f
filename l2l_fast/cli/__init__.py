"""The command line, ``l2l-fast``: one file a command. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import sys
import warnings


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 for success, 1 for a failure, 2 for a wrong argument, 130 after Ctrl-C."""
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        sys.exit(f"l2l-fast: {error.name} is missing: pip install 'l2l_fast[all]'")
    from l2l_fast.cli.app import app

    warnings.showwarning = lambda message, *where, **how: _complain(f"warning: {message}", 0)
    usage_error = typer.BadParameter.__bases__[0]  # typer brings its own click, whose names are not public
    click_error = usage_error.__bases__[0]
    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="l2l-fast", standalone_mode=False)
    except usage_error as error:
        code = _complain(error.format_message(), 2)
    except click_error as error:
        code = _complain(error.format_message(), 1)
    except (ValueError, FileNotFoundError, TypeError) as error:  # the library's own word on a bad argument
        code = _complain(error, 2)
    except (RuntimeError, ImportError, OSError) as error:
        code = _complain(error, 1)
    sys.exit(code)


def _complain(message: object, code: int) -> int:
    print("l2l-fast:", " ".join(str(message).split()), file=sys.stderr)
    return code
