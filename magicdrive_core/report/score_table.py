"""The score sheet as tables of the report: this package beside published results, figures by name, scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from magicdrive_core.evaluation.protocol import RESULTS
from magicdrive_core.evaluation.score_sheet import MEANINGS, Sheet

COLUMNS = (
    ("fvd_224", "FVD, 224 rows"),
    ("fvd_212", "FVD, 212 rows"),
    ("map", "mAP"),
    ("miou", "mIoU"),
    ("score", "score"),
)
_TITLES = {
    "small_224": "built-in, 224 rows",
    "small_212": "built-in, 212 rows",
    "fvd_224": "I3D, 224 rows",
    "fvd_212": "I3D, 212 rows",
    "map": "mAP",
    "miou": "mIoU",
    "miou_maps": "mIoU, own maps",
}


@dataclass(frozen=True)
class ScoreTable:
    """Cells of the report's score tables as text."""

    columns: list[str]
    results: list[tuple[str, list[str], bool]]  # name, cells, whether it is ours
    figures: list[tuple[str, str, str]]  # name, value, meaning
    missing: list[str]
    scene_columns: list[str]
    scenes: list[tuple[str, list[str]]]  # name, cells; farthest from the real clips first
    clips: dict[str, int]

    @classmethod
    def of(cls, sheet: Sheet, names: Mapping[str, str], ours: str) -> ScoreTable:
        """Format a score sheet.

        Args:
            sheet: The scores of the package.
            names: Names of scenes by token; a scene without a name is shown by its token.
            ours: Label of the package's line.

        Returns:
            The table; cells without a value are a dash.
        """
        keys = [key for key in _TITLES if any(key in row for row in sheet.scenes.values())]
        published = [
            (
                result.team,
                [
                    _cell(
                        {result.crop: result.fvd, "map": result.mean_ap, "miou": result.mean_iou}
                        | ({} if result.score is None else {"score": result.score}),
                        key,
                    )
                    for key, _ in COLUMNS
                ],
                False,
            )
            for result in RESULTS
        ]
        return cls(
            columns=[title for _, title in COLUMNS],
            results=[(ours, [_cell(sheet.figures, key) for key, _ in COLUMNS], True), *published],
            figures=[(name, f"{value:.4f}", MEANINGS[name]) for name, value in sheet.figures.items()],
            missing=sheet.missing,
            scene_columns=[_TITLES[key] for key in keys],
            scenes=[
                (names.get(token, token), [f"{row[key]:.4g}" if key in row else "–" for key in keys])
                for token, row in farthest_first(sheet)
            ],
            clips=sheet.clips,
        )


def farthest_first(sheet: Sheet) -> list[tuple[str, dict[str, float]]]:
    """Sort the scenes of a sheet by the built-in extractor's distance (``small_224``), largest first.

    Args:
        sheet: The scores of the package.

    Returns:
        Scene token and figures by name, for each scene.
    """
    return sorted(sheet.scenes.items(), key=lambda pair: (-pair[1].get("small_224", 0.0), pair[0]))


def order_scenes(tokens: Sequence[str], sheet: Sheet | None) -> list[str]:
    """Order scenes for the page: farthest from the real clips first, if there are scores.

    Args:
        tokens: Scene tokens.
        sheet: The scores of the package; None keeps the order of ``tokens``.

    Returns:
        The tokens; those that the sheet lacks come last, in their order.
    """
    if sheet is None:
        return list(tokens)
    ranks = {token: rank for rank, (token, _) in enumerate(farthest_first(sheet))}
    return sorted(tokens, key=lambda token: ranks.get(token, len(ranks)))


def _cell(values: Mapping[str, float], key: str) -> str:
    if key not in values:
        return "–"
    return f"{values[key]:.4f}" if key == "score" else f"{values[key]:.2f}"
