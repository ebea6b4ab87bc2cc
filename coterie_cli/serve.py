"""Hand over to BentoML: the same service, whether it is started by `coterie serve` or `bentoml serve`."""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from coterie.bundle import Bundle
from coterie.errors import CoterieError
from serving.settings import Settings

__all__ = ["listening_address", "serve_bundle"]

SERVICE = "serving.service:Coterie"
# Of a connection that nobody asks on. After uvicorn's 5 a busy service closes some on which a request has just come.
IDLE_SECONDS = 75


def listening_address(host: str, port: int) -> str:
    """The IP address of a host; raises CoterieError if nothing can listen there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise CoterieError(f"{host} has no address ({error.strerror}): choose another --host") from error
    except OSError as error:
        raise CoterieError(f"{host}:{port} cannot be listened on ({error.strerror}): choose another --port") from error
    return str(address[0])


def serve_bundle(
    bundle: Path,
    *,
    host: str,
    port: int,
    state: Path | None,
    bundles: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    more: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Check what can be checked, then become the server process; does not return.

    Args:
        more: further variables of the environment; None leaves one as it is.

    Raises:
        BundleError: the bundle is damaged or none; DeviceError: `device` is none; CoterieError: the address is taken.
    """
    Bundle.open(bundle, device=device)
    address = listening_address(host, port)  # BentoML takes no names
    environment = {**os.environ, "COTERIE_BUNDLE": str(bundle.resolve()), "COTERIE_DEVICE": device}
    # BentoML reports who serves what, and looks for this before it imports the service.
    environment.setdefault("BENTOML_DO_NOT_TRACK", "True")
    if state is not None:
        environment["COTERIE_STATE"] = str(state.resolve())
    if bundles is not None:
        environment["COTERIE_BUNDLES"] = str(bundles.resolve())
    if threads is not None:
        environment["COTERIE_THREADS"] = str(threads)
    environment |= {name: str(value) for name, value in more.items() if value is not None}
    Settings.from_environment(environment)
    sys.stdout.flush()
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE, "--host", address, "--port", str(port)]
    command += ["--timeout-keep-alive", str(IDLE_SECONDS)]
    os.execve(sys.executable, command, environment)
