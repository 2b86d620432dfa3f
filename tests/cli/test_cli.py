"""The command line as a person meets it: what it prints where, what it writes, how it fails."""

import json
import subprocess
import sys
from importlib import metadata

import pytest
import torch

import l2l_fast
from l2l_fast import CoordinatewiseLSTM, MetaTrainer, files, tasks
from l2l_fast.evaluate.compare import held_out_seeds
from l2l_fast.studies import sweeps

COMMANDS = ["demo", "meta-train", "compare", "sweep", "reproduce", "bench", "tasks", "info"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"l2l-fast {command}" in out
    assert "Examples:" in out
    assert "--json" in out


def test_no_command_shows_the_commands(run):
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err == run("--help")[1]  # as it stands, line by line
    assert all(f"\n  {command} " in err for command in COMMANDS)


def test_version(run):
    code, out, _ = run("--version")
    assert (code, out) == (0, f"l2l_fast {metadata.version('l2l_fast')}\n")
    assert json.loads(run("info", "--json")[1])["l2l_fast"] == l2l_fast.__version__ == metadata.version("l2l_fast")


def test_tasks_lists_every_name(run):
    code, out, _ = run("tasks")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == tasks.names()
    assert list(json.loads(run("tasks", "--json")[1])) == tasks.names()


def test_info_says_what_runs(run):
    code, out, _ = run("info")
    assert code == 0
    assert "native" in out
    facts = json.loads(run("info", "--json")[1])
    assert {"native", "cpu_isa", "cuda", "cuda_archs", "torch", "reason"} <= set(facts)


def test_meta_train_then_compare(run, tmp_path):
    out = tmp_path / "trained"
    arguments = ("meta-train", "quadratic", "--meta-steps", 6, "--instances", 4, "--horizon", "20:40", "--out", out)
    code, text, err = run(*arguments)
    assert code == 0
    assert "6 meta-steps" in text
    assert "meta-training" in err
    assert "meta-training" not in text
    assert len(json.loads((out / "history.json").read_text())["meta_losses"]) == 6
    assert (out / "meta_training.png").stat().st_size > 5000
    assert CoordinatewiseLSTM.from_pretrained(out / "network").config.features == "identity"

    arguments = ("compare", "quadratic", "--network", out / "network", "--horizon", 20, "--seeds", 3, "--out", "found")
    code, text, _ = run(*arguments, "--baselines", "adam, nesterov")
    assert code == 0
    assert "3 held-out seeds" in text
    assert (tmp_path / "found" / "comparison.png").stat().st_size > 5000
    written = json.loads((tmp_path / "found" / "comparison.json").read_text())
    assert {"task", "horizon", "seeds", "network", "optimizers", "best_baseline", "ratio_mean", "ratio_final",
            "ratio_steps", "ratio_seconds", "environment"} <= set(written)  # fmt: skip
    assert written["best_baseline"] in ("adam", "nesterov")
    code, text, _ = run(*arguments, "--baselines", "adam", "--json")
    assert code == 0
    assert json.loads(text)["best_baseline"] == "adam"


def test_meta_train_by_evolution_strategies(run, tmp_path):
    arguments = ("meta-train", "quadratic", "--meta-steps", 2, "--instances", 2, "--horizon", "20", "--out", tmp_path)
    options = ("--estimator", "pes+backpropagation", "--perturbations", 4, "--sigma", 0.02)
    code, text, _ = run(*arguments, *options, "--perturbed-share", "variance")
    assert code == 0
    assert "2 meta-steps" in text
    code, _, err = run(*arguments, *options, "--perturbed-share", "half")
    assert code == 2
    assert "give a number from 0 to 1, or variance" in err
    code, _, err = run(*arguments, "--estimator", "bptt")
    assert code != 0
    assert "estimator must be one of" in err


def test_meta_train_by_a_recipe(run, tmp_path):
    recipe = {"tasks": [{"name": "digits-mlp", "init_scale": [0.01, 0.1]}], "network": {"hidden_size": 3},
              "training": {"horizon": "5:10", "unroll": 5, "meta_optimizer": "soap", "average": 0.5,
                           "validation_instances": 1}, "meta_steps": 3}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    code, text, _ = run("meta-train", "--recipe", tmp_path / "mine.json", "--json", "--out", "a")
    assert code == 0
    assert (json.loads(text)["meta_steps"], json.loads(text)["tasks"]) == (3, ["digits-mlp"])
    assert CoordinatewiseLSTM.from_pretrained(tmp_path / "a" / "network").config.hidden_size == 3
    code, _, err = run("meta-train", "--recipe", "nothing")
    assert code == 2
    assert "no recipe 'nothing'" in err
    assert "l2l-base-v1" in err
    assert run("meta-train", "--recipe", "l2l-base-v1", "quadratic")[0] == 2
    assert run("meta-train")[0] == 2
    assert run("meta-train", "--recipe", "l2l-base-v1", "--init-scale", "0.1")[0] == 2
    (tmp_path / "broken.json").write_text("{")
    code, _, err = run("meta-train", "--recipe", tmp_path / "broken.json")
    assert code == 2
    assert "is not JSON" in err
    (tmp_path / "short.json").write_text('{"tasks": [], "network": {}}')
    code, _, err = run("meta-train", "--recipe", tmp_path / "short.json")
    assert code == 2
    assert "must have training, meta_steps" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": 5}, "another recipe's name, or a list such as"),
        ({"tasks": ["digits-mlp"]}, "another recipe's name, or a list such as"),
        ({"tasks": [{"activation": "gelu"}]}, "another recipe's name, or a list such as"),
        ({"tasks": "nothing"}, "no recipe 'nothing'"),
        ({"tasks": "wrong.json"}, "wrong.json leads back to itself"),
        ({"like": "wrong.json"}, "wrong.json leads back to itself"),
        ({"like": 3}, '"like" of a recipe must be another recipe\'s name, or a path that ends in .json, got 3'),
        ({"network": 3}, '"network" of a recipe must hold options by name, got 3'),
        ({"training": []}, '"training" of a recipe must hold options by name, got []'),
        ({"meta_steps": "many"}, "\"meta_steps\" of a recipe must be a whole number of at least 1, got 'many'"),
        ({"then": [{"meta_steps": 0}]}, '"meta_steps" of a recipe must be a whole number of at least 1, got 0'),
        ({"tasks": [{"name": 3}]}, "another recipe's name, or a list such as"),
        ({"tasks": [{"name": "{data}-mlp"}]}, "there is no task '{data}-mlp'"),
        ([], "wrong.json must hold tasks, network, training and meta_steps by name, got []"),
    ],
)
def test_a_recipe_with_a_wrong_value(run, tmp_path, changes, message):
    recipe = {"tasks": [{"name": "digits-mlp"}], "network": {}, "training": {}, "meta_steps": 2}
    (tmp_path / "wrong.json").write_text(json.dumps(recipe | changes if isinstance(changes, dict) else changes))
    code, _, err = run("meta-train", "--recipe", "wrong.json")
    assert (code, len(err.splitlines())) == (2, 1)
    assert message in err


def test_second_derivatives_by_a_recipe_and_by_the_command(run, tmp_path):
    """A recipe's own are kept; the command's win over it, and take back what does not go with them."""
    options = {"unroll": 5, "validation_instances": 1, "horizon": 5}
    recipe = {"tasks": [{"name": "digits-mlp"}], "network": {"hidden_size": 3}, "meta_steps": 2}
    ways = {"first": ({"coordinates": 64}, ()), "recipe": ({"second_derivatives": True}, ()),
            "command": ({"coordinates": 64}, ("--second-derivatives",))}  # fmt: skip
    weights = {}
    for name, (training, flags) in ways.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(recipe | {"training": options | training}))
        assert run("meta-train", "--recipe", tmp_path / f"{name}.json", "--out", name, *flags)[0] == 0
        weights[name] = CoordinatewiseLSTM.from_pretrained(tmp_path / name / "network").flat_weights()
    assert torch.equal(weights["recipe"], weights["command"])
    assert not torch.equal(weights["recipe"], weights["first"])


def test_a_recipe_of_two_stages(run, tmp_path):
    options = {"unroll": 5, "validation_instances": 1, "horizon": 5}
    recipe = {"tasks": [{"name": "digits-mlp"}], "network": {"hidden_size": 3}, "training": options, "meta_steps": 2}
    second = {"tasks": [{"name": "digits-mlp-2layer"}], "training": {"horizon": 10}, "meta_steps": 3}
    for name, contents in (("one", recipe), ("both", recipe | {"then": [second]}),
                           ("second", recipe | second | {"training": options | {"horizon": 10}})):  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(contents))
    code, text, _ = run("meta-train", "--recipe", tmp_path / "both.json", "--json", "--out", "both")
    assert (code, json.loads(text)["meta_steps"], json.loads(text)["tasks"]) == (0, 3, ["digits-mlp-2layer"])
    assert len(json.loads((tmp_path / "both" / "stage-1" / "history.json").read_text())["meta_losses"]) == 2
    # The same as one recipe after the other.
    assert run("meta-train", "--recipe", tmp_path / "one.json", "--out", "one")[0] == 0
    assert run("meta-train", "--recipe", tmp_path / "second.json", "--network", tmp_path / "one" / "network",
               "--out", "two")[0] == 0  # fmt: skip
    both, two = (CoordinatewiseLSTM.from_pretrained(tmp_path / name / "network") for name in ("both", "two"))
    assert torch.equal(both.flat_weights(), two.flat_weights())
    for then in (["more"], [{"network": {"hidden_size": 4}}]):
        (tmp_path / "wrong.json").write_text(json.dumps(recipe | {"then": then}))
        code, _, err = run("meta-train", "--recipe", tmp_path / "wrong.json", "--out", "wrong")
        assert code == 2
        assert "must hold what differs from the stage before, of tasks, training, meta_steps; got" in err
        assert len(err.splitlines()) == 1
    (tmp_path / "wrong.json").write_text(json.dumps(recipe | {"then": [{"training": 5}]}))
    code, _, err = run("meta-train", "--recipe", tmp_path / "wrong.json", "--out", "wrong")
    assert (code, len(err.splitlines())) == (2, 1)
    assert '"training" of a recipe must hold options by name, got 5' in err
    # A number of meta-steps is the last stage's; the first is no longer than that.
    code, text, _ = run("meta-train", "--recipe", tmp_path / "both.json", "--meta-steps", 1, "--json", "--out", "short")
    assert (code, json.loads(text)["meta_steps"]) == (0, 1)
    assert len(json.loads((tmp_path / "short" / "stage-1" / "history.json").read_text())["meta_losses"]) == 1


def test_meta_train_goes_on_where_it_stopped(run, tmp_path):
    arguments = ("meta-train", "digits-mlp", "digits-mlp-relu", "--parallel", 1, "--init-scale", "0.01:0.3",
                 "--features", "both", "--hidden-size", 3, "--tensorboard", "--json")  # fmt: skip
    code, text, _ = run(*arguments, "--meta-steps", 2, "--out", "a")
    assert (code, json.loads(text)["meta_steps"]) == (0, 2)
    code, text, _ = run(*arguments, "--meta-steps", 4, "--out", "a")
    assert (code, json.loads(text)["meta_steps"]) == (0, 4)
    assert list((tmp_path / "a" / "tensorboard").iterdir())
    trained = CoordinatewiseLSTM.from_pretrained(tmp_path / "a" / "network").flat_weights()
    code, _, err = run(*arguments, "--meta-steps", 4, "--out", "a", "--seed", 1)
    assert code == 2
    assert "seed=0 (now 1)" in err
    assert torch.equal(CoordinatewiseLSTM.from_pretrained(tmp_path / "a" / "network").flat_weights(), trained)


def test_meta_train_keeps_the_best_network_of_a_run_that_fails(run, monkeypatch):
    found, loss = [], tasks.Quadratic.loss

    class Watched(MetaTrainer):
        def fit(self, *arguments, **options):
            found.append(self)
            return super().fit(*arguments, **options)

    def fail_later(self, params, batch):
        if found and found[0].meta_step == 110:  # validated at 100
            raise RuntimeError("no more of it")
        return loss(self, params, batch)

    monkeypatch.setattr("l2l_fast.meta.recipes.MetaTrainer", Watched)
    monkeypatch.setattr(tasks.Quadratic, "loss", fail_later)
    code, _, err = run("meta-train", "quadratic", "--horizon", 5, "--meta-steps", 120, "--out", "a")
    assert (code, "no more of it" in err) == (1, True)
    assert found[0].history.best_score < 1
    assert torch.equal(CoordinatewiseLSTM.from_pretrained("a/network").flat_weights(), found[0].weights.best)


def test_meta_train_under_torchrun_says_that_it_runs_alone(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = run("meta-train", "quadratic", "--out", "a")
    assert (code, out) == (1, "")
    assert "start one process alone, without torchrun" in err
    assert not list((tmp_path / "a").iterdir())


def test_meta_train_beside_another_run_leaves_everything_to_it(run, network, tmp_path):
    network.save_pretrained(tmp_path / "a" / "network")
    (tmp_path / "a" / "checkpoint").mkdir()
    with files.locked(tmp_path / "a" / "checkpoint"):
        code, out, err = run("meta-train", "quadratic", "--meta-steps", 2, "--out", "a")
    assert (code, out) == (1, "")
    assert "another run of this process is using a/checkpoint" in err.splitlines()[-1]
    found = CoordinatewiseLSTM.from_pretrained(tmp_path / "a" / "network")
    assert torch.equal(found.flat_weights(), network.flat_weights())


def test_a_command_to_paste_is_quoted(run):
    _, text, _ = run("meta-train", "quadratic", "--horizon", 5, "--meta-steps", 1, "--out", "two words")
    assert text.splitlines()[-1] == "try it:  l2l-fast compare quadratic --network 'two words/network'"


@pytest.mark.mnist
def test_a_command_to_paste_names_the_task_that_was_trained_on(run, tmp_path):
    recipe = {"tasks": [{"name": "{dataset}-mlp"}], "network": {"hidden_size": 3}, "meta_steps": 1,
              "training": {"unroll": 5, "horizon": 5, "validation_instances": 1}}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    _, text, _ = run("meta-train", "--recipe", "mine.json", "--out", "mine")
    assert text.splitlines()[-1] == "try it:  l2l-fast compare mnist-mlp --network mine/network"


@pytest.mark.filterwarnings("default:the network is as it was")
def test_what_diverged_is_null_in_json_and_said(run, tmp_path, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", None)  # puts back what the command sets
    code, text, said = run("meta-train", "quadratic", "--meta-lr", "1e30", "--meta-steps", 3, "--json", "--out", "a")
    assert code == 0
    assert "\nl2l-fast: warning: the network is as it was before training: none of 1 validations was finite" in said
    history = (tmp_path / "a" / "history.json").read_text()
    assert _strict(text)["best_score"] is _strict(history)["best_score"] is None
    assert _strict(history)["validations"] == [[3, None]]


def _strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_sweep_names_the_best_rate(run, tmp_path):
    pytest.importorskip("optuna", reason="sweeps need Optuna")
    arguments = ("sweep", "quadratic", "--meta-lr", "0.01,0.0001", "--meta-steps", 20, "--horizon", 30)
    code, text, err = run(*arguments)
    assert code == 0
    assert "0.01" in text.split("best")[0].splitlines()[-1]
    assert "study quadratic-" in err
    found = json.loads((tmp_path / "runs" / "sweep-quadratic" / "sweep.json").read_text())
    assert found["best"] == {"meta_lr": 0.01}
    assert [len(point["curve"]) for point in found["points"]] == [31, 31]
    assert CoordinatewiseLSTM.from_pretrained(found["best_network"].split(":", 1)[1]).config.hidden_size == 20
    assert (tmp_path / "runs" / "sweep-quadratic" / "sweep.png").stat().st_size > 5000
    code, again, err = run(*arguments)  # nothing is trained again
    assert (code, again) == (0, text)
    assert "meta_lr=0.01" not in err


def test_sweep_searches_a_range_among_other_options(run):
    pytest.importorskip("optuna", reason="sweeps need Optuna")
    arguments = ("--meta-lr", "0.001:0.1", "--vary", "unroll=2:4", "--vary", "features=identity,moments", "--trials", 3)
    code, out, _ = run("sweep", "quadratic", *arguments, "--meta-steps", 2, "--horizon", 6, "--seeds", 2, "--json")
    assert code == 0
    points = [point["options"] for point in json.loads(out)["points"]]
    assert len(points) == 3
    assert all(0.001 <= point["meta_lr"] <= 0.1 and point["unroll"] in (2, 3, 4) for point in points)
    assert {point["features"] for point in points} <= {"identity", "moments"}


def test_sweep_without_optuna_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    for arguments in (("sweep", "quadratic"), ("reproduce", "meta-lr")):
        code, out, err = run(*arguments)
        assert (code, out, err) == (1, "", "l2l-fast: sweeps need Optuna: pip install 'l2l_fast[sweep]'\n")


def test_the_seed_of_a_sweep_shifts_its_held_out_seeds(run, monkeypatch):
    pytest.importorskip("optuna", reason="sweeps need Optuna")
    seen, measure = [], sweeps.trajectories
    spy = lambda *task, seeds, **options: seen.append(seeds) or measure(*task, seeds=seeds, **options)  # noqa: E731
    monkeypatch.setattr(sweeps, "trajectories", spy)
    for number in (0, 7):
        arguments = ("--meta-lr", "0.01", "--meta-steps", 1, "--horizon", 5, "--seeds", 3, "--seed", number)
        assert run("sweep", "quadratic", *arguments)[0] == 0
    assert seen == [held_out_seeds(0, 3), held_out_seeds(7, 3)]


def test_demo_tells_the_whole_story(run, tmp_path):
    code, text, err = run("demo", "--meta-steps", 5, "--out", "demo")
    assert code == 0
    assert "100 held-out seeds" in text
    assert "accuracy" in text
    assert [line for line in err.splitlines() if " of 3:" in line].__len__() == 3
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    assert written == {"network", "comparison.json", "comparison.png", "digits.png"}
    assert "stopped after" not in err


def test_demo_says_that_it_has_learned_less_than_it_was_to(run):
    code, _, err = run("demo", "--meta-steps", 100_000, "--max-seconds", 1)
    assert code == 0
    assert "stopped after 1 s and " in err
    assert " of 100000 meta-updates: --max-seconds for more" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "quadratc", "--network", "x"], "quadratic"),
        (["compare", "quadratic", "--network", "no-such"], "no network 'no-such'"),
        (["compare", "quadratic", "--horizon", "0"], "--horizon"),
        (["compare", "quadratic", "--baselines", "adamax"], "adamax"),
        (["compare", "quadratic", "--data", "no-such-folder"], "no-such-folder"),
        (["compare", "quadratic", "--device", "tpu9"], "tpu9"),
        (["compare"], "Missing argument 'task'"),
        (["meta-train", "quadratic", "--horizon", "ten"], "--horizon 'ten'"),
        (["meta-train", "quadratic", "--features", "loud"], "features must be one of"),
        (["meta-train", "digits-mlp", "--init-scale", "big"], "--init-scale 'big'"),
        (["meta-train", "quadratic", "--init-scale", "0.1"], "--init-scale is for classifiers"),
        (["meta-train", "meta-quadratic", "--init-scale", "0.1"], "meta-quadratic starts in its own way"),
        (["sweep", "quadratic", "--meta-lr", "a,b"], "--meta-lr 'a,b'"),
        (["sweep", "quadratic", "--meta-lr", "0.01,0.010"], "give different positive numbers"),
        (["sweep", "quadratic", "--meta-lr", "0.01,-1"], "give different positive numbers"),
        (["sweep", "quadratic", "--meta-lr", "0.1:0.01"], "meta_lr must be a range LOW:HIGH of numbers"),
        (["sweep", "quadratic", "--vary", "unroll"], "give NAME=A,B,C or NAME=LOW:HIGH"),
        (["sweep", "quadratic", "--vary", "unrol=5"], "options must be named among"),
        (["sweep", "quadratic", "--vary", "unroll=5,0"], "unroll must be an int of at least 1, got 0"),
        (["sweep", "quadratic", "--vary", "unroll=5", "--vary", "unroll=6"], "unroll was given twice"),
        (["sweep", "quadratic", "--trials", "3"], "--trials goes with a range LOW:HIGH"),
        (["sweep", "quadratic", "--meta-lr", "0.01:0.1", "--meta-seeds", "2"], "--meta-seeds goes with lists"),
        (["sweep", "quadratic", "--storage", "study.db"], "storage must be a URL such as sqlite:///runs/study.db"),
        (["dance"], "dance"),
        (["tasks", "--loud"], "--loud"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(run, network, tmp_path, arguments, words):
    if arguments[0] == "sweep":
        pytest.importorskip("optuna", reason="sweeps need Optuna")
    if "--network" not in arguments and arguments[0] == "compare" and len(arguments) > 1:
        network.save_pretrained(tmp_path / "network")
        arguments = [*arguments, "--network", "network"]
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1
    assert err.startswith("l2l-fast: ")


@pytest.mark.parametrize(
    "arguments", ["demo", "meta-train quadratic", "compare quadratic", "sweep quadratic", "reproduce mnist", "bench"]
)
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(run, tmp_path, arguments):
    if arguments.startswith("sweep"):
        pytest.importorskip("optuna", reason="sweeps need Optuna")
    (tmp_path / "file").touch()
    code, out, err = run(*arguments.split(), "--out", "file/below")
    assert (code, out) == (2, "")
    assert "--out 'file/below' cannot be written (Not a directory): give another" in err
    assert len(err.splitlines()) == 1  # no bar of any stage


def test_a_network_and_its_shape_are_not_given_together(run, network, tmp_path):
    network.save_pretrained(tmp_path / "network")
    code, _, err = run("meta-train", "quadratic", "--network", "network", "--hidden-size", 4)
    assert (code, "leave them out" in err) == (2, True)


def test_a_failure_is_one_line_and_exit_code_1(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the disk\nis full")

    monkeypatch.setattr("l2l_fast.evaluate.compare", fail)
    assert run("compare", "quadratic", "--network", "x") == (1, "", "l2l-fast: the disk is full\n")


def test_ctrl_c_is_one_line_and_exit_code_130(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt("stopped at meta-step 3")

    monkeypatch.setattr("l2l_fast.meta.MetaTrainer.fit", interrupt)
    code, _, err = run("meta-train", "quadratic")
    assert code == 130
    assert "stopped at meta-step 3" in err


def test_without_the_command_lines_packages_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    code, *_ = run("tasks")
    assert "pip install 'l2l_fast[all]'" in code


def test_the_program_itself():
    found = subprocess.run(
        [sys.executable, "-c", "from l2l_fast.cli import main; main(['tasks'])"], capture_output=True
    )
    assert found.returncode == 0
