"""From generated clips to a checked and scored package: the steps behind the verbs, for the settings of one project."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from magicdrive_core.config.schema import Config
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.records import Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.evaluation.key_frames import export_frames
from magicdrive_core.evaluation.score_sheet import SHEET, Sheet, question, score_package
from magicdrive_core.experiment.run_paths import find_run_paths
from magicdrive_core.tracking.lineage import lineage_tags
from magicdrive_core.video.item_record import item_name
from magicdrive_core.wcoda.package import Package, pack, read_package
from magicdrive_core.wcoda.submission import Expected
from magicdrive_core.wcoda.validator import judge


def expected_package(config: Config) -> Expected:
    """Returns what the settings say that a valid package holds.

    Args:
        config: the settings of ``generate``, ``submission`` and ``video`` are used.

    Returns:
        The counts and properties; the number of standard scenes is None, so that it is taken from the package.
    """
    return Expected(
        generations=config.generate.generations,
        long_scenes=config.submission.long_scenes,
        frames=config.submission.frames,
        fps=config.video.fps,
        max_mbit_s=config.video.max_mbit_s,
    )


def package_project(config: Config) -> tuple[Path, list[str]]:
    """Packs the generated videos and validates the package.

    Args:
        config: all settings; run in the project's folder.

    Returns:
        The zip file, and its faults, one line each; none for a valid package.

    Raises:
        MagicDriveError: videos are missing or do not fit the settings.
    """
    paths = find_run_paths(config)
    package = pack(config, paths.generated, paths.submission, lineage_tags(config) | paths.model_tags(config))
    return package.zip_path, judge(package.zip_path, expected_package(config))


def score_project(config: Config) -> tuple[Sheet, Path]:
    """Scores the package, unless this package was scored with the same files before.

    Args:
        config: all settings; ``scores`` names the files to score with.

    Returns:
        The scores, and the file that holds them.

    Raises:
        MagicDriveError: there is no package, or none of its scenes is in the infos.
    """
    folder = find_run_paths(config).submission
    package, scenes = _packed_scenes(folder)
    sheet = Sheet.read(folder) if (folder / SHEET).is_file() else None
    if sheet is None or sheet.question != question(config, package.sha256):
        sheet = score_package(config, package.folder, package.sha256, scenes)
        sheet.write(folder)
    return sheet, folder / SHEET


def export_key_frames(config: Config, out: Path) -> Iterator[tuple[Path, int]]:
    """Writes the key frames of each generation as a nuScenes data root ``out/gen<N>``, N from 0.

    Args:
        config: all settings; ``data`` names the real data.
        out: folder of the data roots.

    Yields:
        Each root, and its number of pictures.

    Raises:
        MagicDriveError: there is no package, or none of its scenes is in the infos.
    """
    package, scenes = _packed_scenes(find_run_paths(config).submission)
    for generation in range(config.generate.generations):
        root = out / f"gen{generation}"
        yield root, export_frames(config, package.folder, scenes, generation, root)


def _packed_scenes(folder: Path) -> tuple[Package, list[Scene]]:
    """Returns the package and the scenes that it holds, in the order of the infos."""
    infos = Path("artifacts/infos")
    package = read_package(folder)
    scenes = [s for s in read_scenes(infos) if (package.folder / item_name(s.first_sample, 0)).is_dir()]
    if not scenes:
        raise MagicDriveError(f"{package.folder} holds no scene of {infos}", "dvc repro infos, then magicdrive package")
    return package, scenes
