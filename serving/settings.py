"""What the environment says about a service. Read once per process; nothing else in `serving` looks at it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_state_dir

from coterie.errors import CoterieError, DeviceError
from coterie.providers import check_device

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Settings of one service; every one has a default.

    Attributes:
        bundle: COTERIE_BUNDLE, the bundle directory to serve. Without it, see `serving.model_store.find_bundle`.
        state: COTERIE_STATE, the only folder the service writes to, one subfolder per gallery name. By default the
            platform's user state directory, on Linux ~/.local/state/coterie.
        device: COTERIE_DEVICE, where the encoder runs: auto (the default: a GPU if one answers), cpu, cuda, cuda:1,
            cuda:0,1 or cuda:all for several GPUs; tensorrt likewise.
        threads: COTERIE_THREADS, of the encoder on the CPU; by default one for each processor.
    """

    bundle: Path | None
    state: Path
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        try:
            check_device(self.device)
        except DeviceError as error:
            raise DeviceError(f"COTERIE_DEVICE: {error}") from error

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings; an empty variable counts as unset.

        Raises:
            DeviceError: COTERIE_DEVICE is no device.
            CoterieError: COTERIE_THREADS is no number of threads.
        """
        threads = environment.get("COTERIE_THREADS") or None
        if threads is not None and not (threads.isdecimal() and int(threads)):
            raise CoterieError(f"COTERIE_THREADS is {threads!r}: use a number from 1 on, or leave it unset")
        bundle = environment.get("COTERIE_BUNDLE")
        state = environment.get("COTERIE_STATE") or user_state_dir("coterie", appauthor=False)
        return cls(
            # Workers start in another folder than the command that a relative path was typed in.
            bundle=Path(bundle).expanduser().absolute() if bundle else None,
            state=Path(state).expanduser().absolute(),
            device=environment.get("COTERIE_DEVICE") or "auto",
            threads=int(threads) if threads else None,
        )
