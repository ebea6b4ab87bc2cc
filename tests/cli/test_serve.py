"""Where `coterie serve` listens."""

import os
import socket

import pytest

from coterie.bundle import Bundle
from coterie.errors import CoterieError
from coterie_cli.serve import listening_address, serve_bundle


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "addresses"), [("localhost", {"127.0.0.1", "::1"}), ("127.0.0.1", {"127.0.0.1"}), ("0.0.0.0", {"0.0.0.0"})]
)
def test_a_name_is_handed_to_the_server_as_its_address(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, host: str, addresses: set[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda program, command, environment: started.append(command))
    serve_bundle(tiny_bundle.path, host=host, port=free_port(), state=None)
    (command,) = started
    assert command[command.index("--host") + 1] in addresses


def test_an_address_that_is_taken_or_none_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CoterieError, match=f"127.0.0.1:{port} cannot be listened on"):
            listening_address("127.0.0.1", port)
    with pytest.raises(CoterieError, match=r"nowhere\.invalid has no address .* choose another --host"):
        listening_address("nowhere.invalid", 3000)
