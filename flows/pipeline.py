"""Flow ``pipeline``: prepare, train and benchmark, as params.yaml says. Finished work is skipped.

Run it with ``python -m flows.pipeline``; ``make demo`` and ``make run`` do that.
"""

from __future__ import annotations

from prefect import flow

from flows.benchmark import benchmark
from flows.common import main
from flows.prepare import prepare
from flows.train import train
from magicdrive_core.config.load import load_config
from magicdrive_core.experiment.run_paths import find_run_paths
from magicdrive_core.wcoda.package import ZIP


@flow(name="pipeline", validate_parameters=False)
def pipeline() -> None:
    """Runs the flows ``prepare``, ``train`` and ``benchmark`` one after the other.

    Raises:
        MagicDriveError: one of them failed; finished work is reused by the next run.
    """
    prepare()
    train()
    benchmark()


def run() -> None:
    """Runs the flow and prints where the results are."""
    pipeline()
    config = load_config()
    paths = find_run_paths(config)
    package = paths.submission / ZIP
    print(f"\nreport     {paths.submission / 'report.html'}")
    print(f"videos     {paths.generated}/")
    print(f"package    {package if package.exists() else 'none: the clips are too short'}")
    print(f"weights    {paths.model.weights}")
    print("tracking   make ui")


if __name__ == "__main__":
    main(run)
