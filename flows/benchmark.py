"""Flow ``benchmark``: generate, package, validate, score and report, for W-CODA.

Run it with ``python -m flows.benchmark``, or as the deployment ``benchmark/wcoda``.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow, get_run_logger

from flows.common import flow_command, main, run_verb, setting_words
from flows.generate import generate
from magicdrive_core.config.load import load_config
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.experiment.run_paths import find_run_paths, pin_registered
from magicdrive_core.inference.items import list_items
from magicdrive_core.video.item_record import RECORD
from magicdrive_core.wcoda.validator import VERDICT


@flow(name="benchmark", validate_parameters=False)
def benchmark(params: str = "params.yaml", overrides: list[str] | None = None) -> str:
    """Generates the clips, packages and validates them, scores the package and writes the report.

    Where clips are shorter than a W-CODA video (a data set of single key frames), there is a report without a package.

    Args:
        params: the file of settings.
        overrides: ``key.key=value`` texts.

    Returns:
        The folder of package and report.

    Raises:
        MagicDriveError: a step failed; finished work is kept.
    """
    overrides = [*(overrides or []), *pin_registered(load_config(params, overrides))]
    config = load_config(params, overrides)
    paths = find_run_paths(config)
    settings = setting_words(params, overrides)
    generate(params, overrides)
    items = list_items(config, read_scenes(Path("artifacts/infos")))
    short = [item for item in items if item.kept < config.submission.frames]
    if short:
        get_run_logger().warning(
            "no package: %s has %d frame(s), a W-CODA video has %d",
            short[0].name,
            short[0].kept,
            config.submission.frames,
        )
    else:
        run_verb("package", *settings)
        run_verb("score", *settings)  # returns at once if the same package was scored with the same files
    sources = [paths.generated / item.name / RECORD for item in items] + [
        paths.submission / VERDICT,
        paths.submission / "scores.json",
    ]
    if not _newer(paths.submission / "report.html", sources):
        run_verb("report", *settings)
    return str(paths.submission)


def _newer(path: Path, sources: list[Path]) -> bool:
    """Whether a file is newer than all sources that exist."""
    return path.exists() and all(
        source.stat().st_mtime <= path.stat().st_mtime for source in sources if source.exists()
    )


if __name__ == "__main__":
    main(flow_command(benchmark))
