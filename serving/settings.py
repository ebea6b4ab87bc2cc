"""What the environment says about a service. Read once per process; nothing else in `serving` looks at it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_state_dir

from coterie.errors import CoterieError, DeviceError
from coterie.providers import check_device
from coterie.store import CLASS_QUOTA, StoreOptions

__all__ = ["Settings"]

TRUE, FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True)
class Settings:
    """Settings of one service; every one has a default.

    Attributes:
        bundle: COTERIE_BUNDLE, the bundle directory to serve. Without it, see `serving.model_store.find_bundle`.
        bundles: COTERIE_BUNDLES, a folder below which POST /v1/bundle takes paths; without it, only tags.
        state: COTERIE_STATE, the only folder the service writes to, one subfolder per gallery name. By default the
            platform's user state directory, on Linux ~/.local/state/coterie.
        device: COTERIE_DEVICE, where the encoder runs: auto (the default: a GPU if one answers), cpu, cuda, cuda:1,
            cuda:0,1 or cuda:all for several GPUs; tensorrt likewise.
        threads: COTERIE_THREADS, of the encoder on the CPU; by default one for each processor.
        store: COTERIE_ORIGINALS, whether enrolled images are kept (1, the default) or not (0), and COTERIE_CLASS_QUOTA,
            how many enrolled items a class may have.
    """

    bundle: Path | None
    state: Path
    bundles: Path | None = None
    device: str = "auto"
    threads: int | None = None
    store: StoreOptions = field(default_factory=StoreOptions)

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
            CoterieError: another variable is not what it should be.
        """
        threads = environment.get("COTERIE_THREADS") or None
        if threads is not None and not (threads.isdecimal() and int(threads)):
            raise CoterieError(f"COTERIE_THREADS is {threads!r}: use a number from 1 on, or leave it unset")
        bundle, bundles = environment.get("COTERIE_BUNDLE"), environment.get("COTERIE_BUNDLES")
        state = environment.get("COTERIE_STATE") or user_state_dir("coterie", appauthor=False)
        return cls(
            # Workers start in another folder than the command that a relative path was typed in.
            bundle=Path(bundle).expanduser().absolute() if bundle else None,
            state=Path(state).expanduser().absolute(),
            bundles=Path(bundles).expanduser().absolute() if bundles else None,
            device=environment.get("COTERIE_DEVICE") or "auto",
            threads=int(threads) if threads else None,
            store=StoreOptions(
                originals=_flag(environment, "COTERIE_ORIGINALS", True),
                class_quota=_count(environment, "COTERIE_CLASS_QUOTA", CLASS_QUOTA),
            ),
        )


def _flag(environment: Mapping[str, str], name: str, default: bool) -> bool:
    value = environment.get(name) or str(int(default))
    if value.lower() not in TRUE | FALSE:
        raise CoterieError(f"{name} is {value!r}: use 1 or 0")
    return value.lower() in TRUE


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name) or str(default)
    if not value.isdecimal() or int(value) < 1:
        raise CoterieError(f"{name} is {value!r}: use a whole number from 1 on")
    return int(value)
