"""``torchrun l2l-fast meta-train`` on two nodes: a rank is killed, all start again, and nothing is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from l2l_fast import CoordinatewiseLSTM

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
# The command itself; each meta-step that is begun leaves a line.
COMMAND = """
import os, sys, time
import l2l_fast
if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and os.environ["RANK"] == "1":
    time.sleep(3)  # until then torchrun's store has where the rank that was killed had listened
from l2l_fast.cli import main
step = l2l_fast.MetaTrainer.step
def noting(trainer):
    with open(os.environ["STEPS"], "a") as file:
        file.write(f"{os.environ['RANK']} {os.getpid()} {trainer.meta_step}\\n")
    step(trainer)
l2l_fast.MetaTrainer.step = noting
main()
"""
RECIPE = {"tasks": [{"name": "quadratic"}], "network": {"hidden_size": 4, "num_layers": 1}, "meta_steps": 120,
          "training": {"instances": 3, "horizon": 40, "unroll": 5, "validate_every": 7, "average": 0.9,
                       "meta_optimizer": "soap"}}  # fmt: skip


def agent(folder, out, *options):
    command = [sys.executable, "-m", "torch.distributed.run", *options, folder / "command.py", "meta-train", "--recipe",
               folder / "mine.json", "--checkpoint-every", "10", "--out", folder / out]  # fmt: skip
    environment = os.environ | {"STEPS": str(folder / f"{out}.txt"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def steps(folder, out):
    """(rank, process, meta-step) of each meta-step that was begun."""
    path = folder / f"{out}.txt"
    return [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []


def finish(agents):
    said = [agent.communicate(timeout=600)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * len(agents), "\n".join(said)
    return said


def test_a_killed_rank_costs_no_more_than_the_steps_since_the_last_checkpoint(tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "mine.json").write_text(json.dumps(RECIPE))
    finish([agent(tmp_path, "whole", "--standalone", "--nproc-per-node", 2)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    nodes = [
        agent(tmp_path, "broken", "--nnodes", 2, "--nproc-per-node", 1, *rendezvous, "--max-restarts", 2)
        for _ in range(2)
    ]
    try:
        while not (tmp_path / "broken" / "checkpoint" / "trainer.pt").exists():
            assert all(node.poll() is None for node in nodes)
            time.sleep(0.01)
        begun = steps(tmp_path, "broken")
        (killed,) = {process for rank, process, _ in begun if rank == 1}
        os.kill(killed, signal.SIGKILL)
        said = finish(nodes)
    finally:
        for node in nodes:
            node.kill()
    assert sum(f"{RECIPE['meta_steps']} meta-steps" in text for text in said) == 1  # rank 0 alone reports

    def ran(out, rank, without=()):
        return [step for one, process, step in steps(tmp_path, out) if one == rank and process not in without]

    assert ran("whole", 0) == ran("whole", 1) == list(range(RECIPE["meta_steps"]))
    before = {process for _, process, _ in begun}
    for rank in (0, 1):
        after = ran("broken", rank, without=before)
        assert after == list(range(after[0], RECIPE["meta_steps"]))  # once again, and to the end
        assert after[0] >= 10
    histories = [json.loads((tmp_path / out / "history.json").read_text()) for out in ("whole", "broken")]
    assert histories[0] == histories[1]
    assert len(histories[0]["meta_losses"]) == RECIPE["meta_steps"]
    networks = [CoordinatewiseLSTM.from_pretrained(tmp_path / out / "network") for out in ("whole", "broken")]
    assert torch.equal(networks[0].flat_weights(), networks[1].flat_weights())
