"""Generated key frames under nuScenes' file names: a data root on which a detector runs unchanged.

Each generation has its own root. The tables are those of the data set, cut to the scored key frames; camera pictures
are frames of the videos, lidar and radar files are the real ones. Pictures are lossless PNG data under any extension:
PIL and OpenCV detect the format from the contents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

from PIL import Image

from magicdrive_core.config.schema import Config
from magicdrive_core.data.limits import check_path
from magicdrive_core.data.nuscenes_files import REPAIR, Tables, cut_tables, link_or_copy, read_key_frames, write_cut
from magicdrive_core.data.records import Scene
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.evaluation.protocol import FRAMES, KEY_FRAMES
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.utils.files import atomic_folder
from magicdrive_core.utils.progress import track
from magicdrive_core.video.decoder import scan_video
from magicdrive_core.video.frames import LEVEL
from magicdrive_core.video.item_record import item_name, video_name


def key_samples(scene: Scene) -> list[str]:
    """Return the sample tokens of a scene's scored key frames: frames 0, 6 and 12 at 12 Hz.

    Args:
        scene: The scene.

    Returns:
        Three tokens, in the order of the frames.

    Raises:
        MagicDriveError: One of these frames is not a key frame of the scene.
    """
    for frame in KEY_FRAMES:
        if frame >= len(scene) or not scene.key_frames[frame]:
            raise MagicDriveError(
                f"{scene.name}: frame {frame} is not a key frame of the data set",
                "remove the scene from data.val_scenes",
            )
    return [scene.tokens[frame] for frame in KEY_FRAMES]


def cut_to_clips(config: Config, scenes: Sequence[Scene], project: Path = Path()) -> Tables:
    """Cut the tables of the data set to the scored key frames.

    Args:
        config: All settings; ``data`` names the data set and its version.
        scenes: The scored scenes.
        project: The project's folder.

    Returns:
        Records by name of the table (``nuscenes_files.cut_tables``).

    Raises:
        UsageError: The data set has no nuScenes tables.
        MagicDriveError: A table is incomplete, or a scored frame is not a key frame.
    """
    if config.data.format != "nuscenes":
        raise UsageError(
            f"data.format {config.data.format} has no nuScenes tables", "mAP needs a data set in nuScenes format"
        )
    samples = [token for scene in scenes for token in key_samples(scene)]
    folder = project / config.data.root / config.data.version
    tables = read_key_frames(project / config.data.root, config.data.version, samples)
    try:
        cut = cut_tables(tables, samples)
        for name in ("map", "sample_data"):
            for record in cut[name]:
                check_path(record["filename"], f"{folder / name}.json: filename")
    except KeyError as error:
        raise MagicDriveError(f"the tables in {folder} are inconsistent: {error} is missing", REPAIR) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise MagicDriveError(f"the tables in {folder} hold an impossible value: {error}", REPAIR) from None
    return cut


def export_frames(
    config: Config, videos: Path, scenes: Sequence[Scene], generation: int, out: Path, project: Path = Path()
) -> int:
    """Write the data root of one generation, atomically.

    Args:
        config: All settings; ``data`` names the real data.
        videos: The folder ``{team}_standard`` of a package.
        scenes: The scenes of the package.
        generation: Number of the generation to export, from 0.
        out: The new data root.
        project: The project's folder.

    Returns:
        The number of written pictures.

    Raises:
        UsageError: The data set has no nuScenes tables.
        MagicDriveError: A video or a real file is missing or broken.
    """
    root = project / config.data.root
    tables = cut_to_clips(config, scenes, project)
    pictures = {(r["sample_token"], Path(r["filename"]).parts[-2]): r["filename"] for r in tables["sample_data"]}
    with atomic_folder(out) as folder:
        write_cut(tables, root, config.data.version, folder)
        for (_, channel), name in pictures.items():
            if channel not in VIEWS and (root / name).is_file():  # lidar and radar, where they are on the disk
                link_or_copy(root / name, folder / name)
        work = [(scene, view) for scene in scenes for view in VIEWS]
        with ThreadPoolExecutor(cpu_count()) as pool:
            done = pool.map(lambda pair: _write_keys(videos, pair[0], pair[1], generation, pictures, folder), work)
            return sum(track(done, f"generation {generation}", len(work)))


def _write_keys(
    videos: Path, scene: Scene, view: str, generation: int, names: Mapping[tuple[str, str], str], folder: Path
) -> int:
    """Write the key frames of one video as pictures and return their number."""
    video = videos / item_name(scene.first_sample, generation) / video_name(scene.first_sample, view)
    _, kept = scan_video(video, KEY_FRAMES, most=FRAMES)
    for frame, token in zip(KEY_FRAMES, key_samples(scene), strict=True):
        if frame not in kept:
            raise MagicDriveError(f"{video} has no frame {frame}", "run magicdrive package again")
        path = folder / names[token, view]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(kept[frame]).save(path, format="PNG", compress_level=LEVEL)
    return len(kept)
