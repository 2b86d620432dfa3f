"""All commands in one place."""

import typer

from l2l_fast.cli import compare, demo, info, meta_train, sweep, tasks

app = typer.Typer(
    name="l2l-fast",
    help="Meta-train learned LSTM optimizers, and compare them with tuned hand-designed ones.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("meta-train")(meta_train.meta_train)
app.command("compare")(compare.compare)
app.command("sweep")(sweep.sweep)
app.command("tasks")(tasks.tasks)
app.command("info")(info.info)
