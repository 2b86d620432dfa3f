import pytest

from l2l_fast.cli import main


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capfd):
    """Runs ``l2l-fast ARGUMENTS``: exit code, stdout, stderr, those of processes it starts included."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        shown = capfd.readouterr()
        return stop.value.code or 0, shown.out, shown.err

    return run
