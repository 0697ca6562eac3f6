"""`vmexit snapshot QMP-SOCKET DIR`: a machine that runs elsewhere is asked to save itself."""

import math
import os
from collections.abc import Callable

from vmexit.control.qmp_client import Json, QmpClient, RefusedError
from vmexit.core.errors import ConfigError, shown

# What is being done, and which part of it is.
Tell = Callable[[str, float], None]


def save(where: str, folder: str, tell: Tell, *, pause: bool) -> str:
    """Have the machine whose QMP is at `where` saved into the new `folder`; returns its path.

    With `pause` it stands still afterwards. Raises ConfigError, HostError, RefusedError, GoneError.
    """
    path = os.path.abspath(folder)  # noqa: PTH100 - not resolved: the machine's host does that
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{shown(folder)} is no text, and QMP has only that; use another path"
        ) from error

    def on_event(event: dict[str, Json]) -> None:
        match event:
            case {
                "event": "X_SNAPSHOT_PROGRESS",
                "data": {"path": to, "completed": int(done), "total": int(total)},
            } if to == path:
                tell(f"saving {shown(folder)}", done / max(total, 1))

    with QmpClient(where, "vmexit snapshot") as client:
        # As long as it takes: a disk may be slow. Who does not want to wait goes, which ends it.
        try:
            arguments: dict[str, Json] = {"path": path, "pause": pause}
            client.execute("x-snapshot-save", arguments, on_event=on_event, patience=math.inf)
        except RefusedError as error:
            if error.error_class != "CommandNotFound":
                raise
            raise ConfigError(
                f"{shown(where)} is no vmexit that saves snapshots; give the --qmp of one"
            ) from error
    return path
