"""Fetches packages without their dependencies, each into its own folder of the virtual environment that runs it.

`openenv`: tests load its client from there (tests/openenv_client.py). Its server would need 450 MB of other packages.
`bitsandbytes`: installed in the usual place, peft and transformers would import it in all tests.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    version: str
    checksum: str


PACKAGES = {
    "openenv": Package("0.10.0", "5e0a1019253802551de7890f7638c977c4a36540a4b19f01e5a6fcdb5f5fd135"),
    "bitsandbytes": Package("0.50.2", "55348a9a4a21bfd99cf8c7b32fe67b4030ae5c2a05738e03c1747f65fa6ec283"),  # x86-64
}


def folder(name: str) -> Path:
    """The folder of a package."""
    return Path(sys.prefix) / "fetched" / name


def ready(name: str) -> Path:
    """The file that tells make and tests/conftest.py that the package is there."""
    return folder(name) / ".ready"


def fetch(name: str) -> None:
    """Installs the package from the registry that pip is configured for."""
    version, checksum = PACKAGES[name]
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps", "--upgrade"]
    with tempfile.TemporaryDirectory() as work:
        requirements = Path(work) / "requirements.txt"
        requirements.write_text(f"{name}=={version} --hash=sha256:{checksum}\n")
        subprocess.run([*pip, "--target", str(folder(name)), "--require-hashes", "-r", str(requirements)], check=True)
    ready(name).touch()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        try:
            fetch(name)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{name} could not be fetched: pip ended with status {error.returncode}.")
