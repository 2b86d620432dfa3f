import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="sweeps need Optuna")


@pytest.fixture(scope="session")
def postgres():
    """URL of a PostgreSQL server of our own, from Debian's packages, that listens on a socket in its own folder."""
    pytest.importorskip("psycopg", reason="no psycopg, the driver of PostgreSQL")
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), *map(Path, os.get_exec_path())]
    binaries = next((place for place in places if (place / "initdb").exists()), None)
    if binaries is None:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    user, become = None, []
    if os.geteuid() == 0:  # as which it does not run
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("no user postgres to run the server as, and root may not")
        become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    folder = Path(tempfile.mkdtemp(prefix="l2l-postgres-"))  # a socket's path is short, and pytest's folders are ours
    if user:
        os.chown(folder, user.pw_uid, user.pw_gid)

    def call(program, *arguments):
        command = [*become, binaries / program, *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder)

    data = folder / "data"
    try:
        call("initdb", "-D", data, "-U", "studies", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        call("pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start")
        yield f"postgresql+psycopg://studies@/postgres?host={folder}"
        call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def storage(request, tmp_path):
    """URL of a database of each kind."""
    return f"sqlite:///{tmp_path}/study.db" if request.param == "sqlite" else request.getfixturevalue("postgres")
