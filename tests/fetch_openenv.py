"""Fetches OpenEnv's package, without its dependencies, into a folder of the virtual environment that runs it.

Tests load its client from there (tests/openenv_client.py). Its server would need 450 MB of other packages.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(sys.prefix) / "openenv"
VERSION = "0.10.0"
CHECKSUM = "5e0a1019253802551de7890f7638c977c4a36540a4b19f01e5a6fcdb5f5fd135"
READY = FOLDER / ".ready"
"""Tells make and tests/conftest.py that the package is there."""


def main(folder: Path) -> None:
    """Installs the package into `folder`, from the registry that pip is configured for."""
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps", "--upgrade"]
    with tempfile.TemporaryDirectory() as work:
        requirements = Path(work) / "requirements.txt"
        requirements.write_text(f"openenv=={VERSION} --hash=sha256:{CHECKSUM}\n")
        subprocess.run([*pip, "--target", str(folder), "--require-hashes", "-r", str(requirements)], check=True)
    (folder / READY.name).touch()


if __name__ == "__main__":
    try:
        main(FOLDER)
    except subprocess.CalledProcessError as error:
        sys.exit(f"OpenEnv's client could not be fetched: pip ended with status {error.returncode}.")
