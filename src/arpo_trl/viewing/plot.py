"""`arpo-trl plot`: curves of one or more runs as a picture for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arpo_trl.common.user_files import check_picture
from arpo_trl.errors import DataError
from arpo_trl.logs.curves import PANELS, curves
from arpo_trl.logs.picture import picture, save
from arpo_trl.viewing.run import log_history
from arpo_trl.visible import get_logger

logger = get_logger(__name__)


def draw_plot(runs: Sequence[Path], kind: str, output: Path | None = None) -> Path:
    """Draws the panel `kind` of the runs into a file and returns its path.

    Args:
        output: The picture file. Its extension determines the format. Default: `<kind>.png` in the folder of the first
            run.

    Raises:
        ConfigError: The extension is not one of a picture.
        DataError: None of the runs has logged such metrics.
    """
    output = output or runs[0] / f"{kind}.png"
    check_picture(output, "--output")
    panel = next(panel for panel in PANELS if panel.name == kind)
    lines = {run: curves(panel, log_history(run)) for run in runs}
    if not any(lines.values()):
        raise DataError(
            f"{', '.join(map(str, runs))} has no logged {kind}. Pass the output_dir of a run that has ended or saved "
            "a checkpoint."
        )
    for run in (run for run, of_run in lines.items() if not of_run):
        logger.warning("%s has no logged %s and is left out of the picture.", run, kind)
    save(picture(panel, lines), output, dpi=200)
    return output
