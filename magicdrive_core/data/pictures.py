"""Camera pictures: decoded as video frames, and checked on disk without decoding them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from magicdrive_core.config.schema import parse_size
from magicdrive_core.data.records import Clip, Scene
from magicdrive_core.errors import MagicDriveError, UsageError
from magicdrive_core.geometry.cameras import VIEWS, Framing, full_window
from magicdrive_core.utils.files import check_regular

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG")  # others run whole programs, as Ghostscript for EPS, whatever the file is called
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_picture(path: Path, framing: Framing, *, scaled: bool = False) -> Pixels:
    """Read one picture as a video frame: resized by PIL's bicubic filter, then cropped at the top.

    Only the central window of ``full_window`` is used of a picture that is not 16:9. Sizes are checked when the infos
    are made, not here.

    Args:
        path: the picture file.
        framing: size and crop of the video.
        scaled: decode JPEG at 1/2, 1/4 or 1/8, but at least twice as large as needed, before the bicubic filter. This
            is several times as fast and agrees with full decoding to at least 50 dB PSNR.

    Returns:
        (H, W, 3) RGB in pixels.

    Raises:
        UsageError: the video has more rows than the picture has at the video's width.
        MagicDriveError: the file is missing, truncated or not a picture.
    """
    if framing.crop < 0:
        raise UsageError(
            f"size {framing.height}x{framing.width}: a picture has {framing.resized_height} rows at that width",
            "choose a size of 16:9 or flatter in params.yaml",
        )
    try:
        check_regular(path)
        with Image.open(path, formats=FORMATS) as picture:
            size = framing.width, framing.resized_height
            if scaled:
                picture.draft("RGB", (2 * size[0], 2 * size[1]))
            window = full_window(*picture.size)
            resized = _to_rgb(picture).resize(size, Image.Resampling.BICUBIC, box=window)
    except FileNotFoundError:
        raise MagicDriveError(f"{path} is missing", "complete the data set and run `dvc repro infos`") from None
    except _UNREADABLE as error:
        raise MagicDriveError(
            f"{path} is not a complete picture: {error}", "download or render the file again"
        ) from None
    return np.asarray(resized)[framing.crop :]


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB; 16-bit greys are scaled, where PIL would cut them off at 255."""
    if picture.mode.startswith("I"):
        grey = np.asarray(picture, np.float64).clip(0, 65535) / 257
        picture = Image.fromarray(np.rint(grey).astype(np.uint8))
    return picture.convert("RGB")


def read_clip(
    root: Path | str,
    scene: Scene,
    clip: Clip,
    size: str,
    *,
    scaled: bool = False,
    views: Sequence[int] = range(len(VIEWS)),
) -> Pixels:
    """Read the pictures of a clip.

    Args:
        root: the data root that picture paths are relative to.
        scene: the scene of the clip.
        clip: its frames.
        size: height and width of the video, such as "224x400".
        scaled: decode JPEG at reduced size, see ``read_picture``.
        views: indices into ``cameras.VIEWS``.

    Returns:
        (V, F, H, W, 3) RGB in pixels of the video, V views in the order of ``views``.

    Raises:
        UsageError: the video has more rows than a picture has at the video's width.
        MagicDriveError: a picture is missing, truncated or not a picture.
    """
    framing = Framing(*parse_size(size))
    frames = scene.pictures[clip.start : clip.start + clip.frames]
    out = np.empty((len(views), len(frames), framing.height, framing.width, 3), np.uint8)
    for index, paths in enumerate(frames):
        for row, view in enumerate(views):
            out[row, index] = read_picture(Path(root) / paths[view], framing, scaled=scaled)
    return out


@dataclass(frozen=True)
class PictureInventory:
    """Names and lengths of pictures, taken without reading them.

    Dates are left out, so that a copied data set is the same one. Replaced pictures change the digest: two JPEG files
    of different content rarely have equal lengths, and a whole set of them never has.
    """

    bytes: int  # total length
    digest: str  # hex SHA-256 over names and lengths

    @classmethod
    def of(cls, root: Path, paths: Iterable[str]) -> PictureInventory:
        """Take the inventory of pictures.

        Args:
            root: the data root.
            paths: relative to the root, in any order and with repeats; a missing picture counts as length 0.

        Returns:
            The inventory, equal for equal sets of names and lengths.
        """
        total, digest = 0, hashlib.sha256()
        for path in sorted(set(paths)):
            try:
                size = (root / path).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                size = 0
            total += size
            digest.update(f"{path}\0{size}\n".encode())
        return cls(total, digest.hexdigest())


def check_pictures(root: Path, sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Check the header of every picture; pixels are decoded only when a picture is used.

    Args:
        root: the data root.
        sizes: the width and height in pixels that each picture must have, by path below the root.

    Returns:
        One line for each picture that is missing, empty, not a picture or of another size.
    """
    faults = []
    for path in sorted(sizes):
        try:
            check_regular(root / path)
            with Image.open(root / path, formats=FORMATS) as picture:
                if picture.size != sizes[path]:
                    theirs, wanted = ("x".join(map(str, size)) for size in (picture.size, sizes[path]))
                    faults.append(f"{root / path} has {theirs} pixels, expected {wanted}")
        except (FileNotFoundError, NotADirectoryError):
            faults.append(f"{root / path} is missing or empty")
        except MagicDriveError as error:
            faults.append(error.message)
        except _UNREADABLE:
            size = (root / path).stat().st_size if (root / path).is_file() else 1
            faults.append(f"{root / path} is {'not a JPEG or PNG picture' if size else 'missing or empty'}")
    return faults
