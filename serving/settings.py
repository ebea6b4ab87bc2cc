"""What the environment says about a service. Read once per process; nothing else in `serving` looks at it."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_state_dir

from coterie.errors import DeviceError

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Settings of one service; every one has a default.

    Attributes:
        bundle: COTERIE_BUNDLE, the bundle directory to serve. Without it, see `serving.model_store.find_bundle`.
        state: COTERIE_STATE, the only folder the service writes to, one subfolder per gallery name. By default the
            platform's user state directory, on Linux ~/.local/state/coterie.
        device: COTERIE_DEVICE, where the encoder runs: auto (the default: a GPU if one answers), cpu, cuda or cuda:N.
    """

    bundle: Path | None
    state: Path
    device: str = "auto"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise DeviceError(f"COTERIE_DEVICE is {self.device!r}: use auto, cpu, cuda or cuda:N")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings; an empty variable counts as unset.

        Raises:
            DeviceError: COTERIE_DEVICE is no device.
        """
        bundle = environment.get("COTERIE_BUNDLE")
        state = environment.get("COTERIE_STATE") or user_state_dir("coterie", appauthor=False)
        return cls(
            # Workers start in another folder than the command that a relative path was typed in.
            bundle=Path(bundle).expanduser().absolute() if bundle else None,
            state=Path(state).expanduser().absolute(),
            device=environment.get("COTERIE_DEVICE") or "auto",
        )
