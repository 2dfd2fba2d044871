"""Makes the pictures of docs/view.md from a run with all trees logged, such as the quickstart's:

arpo-trl train --config quickstart --max_steps 24 --trajectory_log_rate 1 --output_dir runs/mine
PYTHONPATH=benchmarks python docs/_build/view_pictures.py runs/mine --step 15 --group 2
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from arpo_trl.viewing.page import page
from arpo_trl.viewing.run import RunReader
from browser import browsing, find_browser

DOCS = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    arguments = parser.parse_args()
    browser = find_browser()
    if browser is None:
        raise SystemExit("There is no Chromium or Chrome.")
    reader = RunReader(arguments.run)
    reader.refresh()
    wanted = f"group.step === {arguments.step} && group.group === {arguments.group} && group.kind === 'step'"
    with tempfile.TemporaryDirectory() as folder, browsing(browser, Path(folder, "profile")) as tab:
        file = Path(folder, "view.html")
        file.write_text(page(reader), "utf-8")
        for name, width, height, dark in (("view", 1280, 1500, False), ("view-phone", 390, 760, True)):
            tab.open(file.as_uri(), width, height, dark=dark)
            tab.run("document.getElementById('step').value = 'step'; filter()")  # training
            tab.run(f"show(index.groups.find((group) => {wanted}).key)")
            tab.picture(DOCS / f"{name}.png")


if __name__ == "__main__":
    main()
