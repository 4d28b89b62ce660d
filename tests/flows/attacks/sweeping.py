"""The sweep, run as an operator runs it."""

from flows.attacks.world import World


def swept(w: World) -> str:
    """What `kdguard sweep` prints about a world."""
    import os
    import subprocess
    import sys

    command = [
        *(sys.executable, "-c", "from mlflow_kdguard_cli.main import main; main()"),
        *("sweep", "--json"),
        *("--tracking-uri", w.server.uri, "--server-settings", str(w.settings)),
        *("--log-uri", w.database),
    ]
    user, password = w.http.auth or ("", "")  # type: ignore[misc]
    login = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    done = subprocess.run(
        command, env=os.environ | login, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 3, done.stderr + done.stdout
    return done.stdout
