"""Find runs, and load their configurations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.options import option
from experiments.config.experiment import from_dict, read_config
from experiments.config.schema import Config, DataConfig


def run_of(model: str) -> Path | None:
    """Return the folder of the run that a model belongs to, if any."""
    if not Path(model).exists():
        return None
    for path in (Path(model), Path(model).resolve().parent.parent):
        if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
            return path
    return None


def config_of_run(run: Path | None, packages: Sequence[str] = ()) -> Config | None:
    """Return the configuration of a run, or None if run is None. packages: packages that the user allows.

    A run may come from another machine, so its cache folder is only used if it exists. Reading a run never creates it.
    """
    if run is None:
        return None
    config = from_dict(read_config(run), str(run / "config.yaml"), packages)
    if config.data.cache and not Path(config.data.cache).expanduser().is_dir():
        config.data.cache = DataConfig.cache
    return config


def existing_runs() -> str:
    """Return a sentence that lists the runs in runs/, for error messages."""
    runs = sorted(str(path.parent) for path in Path("runs").glob("*/config.yaml"))
    return f"The runs in runs/ are: {', '.join(runs) or 'none'}"


def packages_option() -> Any:
    """Return the option for packages whose classes a command may load, in addition to ours."""
    return option(
        (),
        "packages whose encoders and readers may be loaded; importing a package runs its code",
        key="extend.packages",
    )
