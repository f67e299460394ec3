"""Errors of interpolated objects at key frames that were held back, by class.

python benchmarks/held_back.py ../shared/data/nuscenes-drive v1.0-drive
python benchmarks/held_back.py /path/to/nuscenes v1.0-mini
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from magicdrive_core.data.held_back import held_back
from magicdrive_core.data.nuscenes import load_tables


def main() -> None:
    """Prints one row a class: median, mean and 95th percentile in metres and in degrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("version")
    arguments = parser.parse_args()
    result = held_back(load_tables(arguments.root, arguments.version))
    table = Table("seen", "class", "objects", "m median", "mean", "95 %", "degrees median", "mean", "95 %")
    for errors in result.errors:
        figures = [
            f"{figure:.{digits}f}"
            for values, digits in ((errors.metres, 3), (errors.degrees, 2))
            for figure in (np.median(values), values.mean(), np.quantile(values, 0.95))
        ]
        table.add_row(errors.kind, errors.name, str(errors.count), *figures)
    console = Console(width=120)
    console.print(table)
    console.print(f"{result.annotated} annotated at held-back key frames, {result.invented} guessed that are not there")


if __name__ == "__main__":
    main()
