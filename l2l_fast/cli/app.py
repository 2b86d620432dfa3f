"""All commands in one place."""

import functools
from typing import Annotated

import typer

from l2l_fast._version import __version__
from l2l_fast.cli import bench, compare, demo, info, meta_train, reproduce, sweep, tasks
from l2l_fast.cli.options import note

app = typer.Typer(
    name="l2l-fast",
    help="Meta-train learned LSTM optimizers, and compare them with tuned hand-designed ones.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"l2l_fast {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:  # typer's own no_args_is_help raises the help as if it were an error
        note(context.get_help())
        raise typer.Exit(2)


def _register(name: str, command) -> None:
    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as interrupt:  # typer would drop what it says
            note(f"l2l-fast: {str(interrupt) or 'interrupted'}")
            raise typer.Exit(130) from None

    app.command(name)(run)


_register("demo", demo.demo)
_register("meta-train", meta_train.meta_train)
_register("compare", compare.compare)
_register("sweep", sweep.sweep)
_register("reproduce", reproduce.reproduce)
_register("bench", bench.bench)
_register("tasks", tasks.tasks)
_register("info", info.info)
