"""`cola-ds train --freeze`: a run's config with all that it names, for a job that waits in a queue."""

from __future__ import annotations

import shutil
from pathlib import Path

from cola_ds.config.inputs import engine_file, named_file
from cola_ds.config.loading import dump_config
from cola_ds.config.schema import RunConfig
from cola_ds.errors import UserError
from cola_ds.run.atomic import write_atomically


def freeze(config: RunConfig, folder: Path) -> Path:
    """Write a run's config, its DeepSpeed JSON and its own task's YAML to a new folder, for a job that waits in a queue or comes
    back. Returns the config's path. Relative paths in it stay relative to where the command runs. Raises UserError."""
    try:
        folder.mkdir(parents=True)
        engine = folder.resolve() / "deepspeed.json"
        shutil.copyfile(engine_file(config.deepspeed), engine)
        frozen = config.model_copy(update={"deepspeed": str(engine)})
        if own_task := named_file("data.task", config.data.task):
            task = folder.resolve() / "task" / own_task.name  # its name is the task's
            task.parent.mkdir()
            shutil.copyfile(own_task, task)
            frozen = frozen.model_copy(update={"data": config.data.model_copy(update={"task": str(task)})})
        write_atomically(folder / "run.yaml", dump_config(frozen).encode())
    except OSError as error:
        raise UserError(f"--freeze {folder}: {error.filename or folder}: {error.strerror}") from None
    return folder / "run.yaml"
