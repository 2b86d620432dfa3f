"""Meta-training in a real Jupyter kernel: what is shown, an interrupt, and the same cell run again."""

import os
import re
import sys
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install l2l_fast[notebook]")
nbclient = pytest.importorskip("nbclient", reason="pip install l2l_fast[notebook]")
pytest.importorskip("ipykernel", reason="the kernel that is tried: pip install l2l_fast[notebook]")

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "meta_training.ipynb"
pytestmark = pytest.mark.filterwarnings("ignore")  # Jupyter warns of its own versions

CELL = """
import l2l_fast as l2l
trainer = l2l.{trainer}({network}, "quadratic", unroll=5, horizon=20, checkpoint={folder!r}, validate_every=10)
history = trainer.fit({steps})
"""
KINDS = {
    "MetaTrainer": 'l2l.CoordinatewiseLSTM("moments", hidden_size=4, num_layers=1)',
    "AdaptiveTrainer": "l2l.AdaptiveMLP()",
}


@pytest.fixture
def client(tmp_path):
    """A kernel of this very Python."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import KernelManager

    manager = KernelManager()
    manager._kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], display_name="this Python",
        env={"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=120)
    yield client, manager
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(client, manager, code, *, interrupt_at=None):
    """Execute a cell; ``interrupt_at`` presses the stop button once that many meta-steps are shown.

    Returns:
        what was displayed in order, as (kind of message, data), and the reply.
    """
    request, shown, pressed = client.execute(code), [], False
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        message = client.get_iopub_msg(timeout=120)
        if message["parent_header"].get("msg_id") != request:
            continue
        kind, content = message["msg_type"], message["content"]
        if kind in ("display_data", "update_display_data"):
            shown.append((kind, content["data"]))
            done = int(re.match(r"meta-training: (\d+) of", content["data"]["text/plain"])[1])
            if interrupt_at is not None and done >= interrupt_at and not pressed:
                manager.interrupt_kernel()
                pressed = True
        elif kind == "stream":
            shown.append((kind, content["text"]))
        elif kind == "status" and content["execution_state"] == "idle":
            reply = client.get_shell_msg(timeout=120)
            while reply["parent_header"].get("msg_id") != request:
                reply = client.get_shell_msg(timeout=120)
            return shown, reply["content"]
    raise AssertionError("the cell did not end")


def value(client, manager, expression):
    request = client.execute("", user_expressions={"it": expression})
    while True:
        reply = client.get_shell_msg(timeout=120)
        if reply["parent_header"].get("msg_id") == request:
            return reply["content"]["user_expressions"]["it"]["data"]["text/plain"]


def steps_of(entry):
    return int(re.match(r"meta-training: (\d+) of", entry[1]["text/plain"])[1])


@pytest.mark.parametrize("trainer", KINDS)
def test_progress_a_live_picture_an_interrupt_and_the_same_cell_again(trainer, client, tmp_path):
    cell = CELL.format(trainer=trainer, network=KINDS[trainer], folder=str(tmp_path / "run"), steps=100_000)
    shown, reply = run(*client, cell, interrupt_at=20)
    assert reply["status"] == "error"
    assert reply["ename"] == "KeyboardInterrupt"
    stopped = int(re.search(r"stopped at meta-step (\d+) of 100000: saved to", reply["evalue"])[1])
    assert stopped >= 20

    displays = [entry for entry in shown if entry[0] != "stream"]
    assert [kind for kind, _ in displays].count("display_data") == 1  # one output, replaced in its place
    assert not [entry for entry in shown if entry[0] == "stream"]
    steps = [steps_of(entry) for entry in displays]
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert steps[-1] == stopped  # the last picture is that of where it stopped
    page = displays[-1][1]["text/html"]
    assert f'<progress value="{stopped}" max="100000"' in page
    assert page.count("<polyline") == 2  # losses and validations

    again = CELL.format(trainer=trainer, network=KINDS[trainer], folder=str(tmp_path / "run"), steps=stopped + 5)
    shown, reply = run(*client, again)
    assert reply["status"] == "ok", reply
    first = steps_of(shown[0])
    assert first == stopped  # it went on, and shows the losses of before
    assert steps_of(shown[-1]) == stopped + 5
    assert value(*client, "len(history.meta_losses)") == str(stopped + 5)


def test_the_example_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(EXAMPLE, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")  # as it is in the repository
        cell.source = cell.source.replace("META_STEPS = 500", "META_STEPS = 20")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts = [output["data"] for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("<svg" in data.get("text/html", "") for data in texts)
    assert (tmp_path / "runs" / "notebook" / "network" / "model.safetensors").exists()
