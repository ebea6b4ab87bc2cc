"""`coterie key`: make, show and revoke the keys that a service asks for."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from coterie_cli.options import console

__all__ = ["KeyFile", "key_app"]

key_app = typer.Typer(help="Make, show and revoke API keys.", no_args_is_help=True)

State = Annotated[
    Path | None,
    typer.Option(envvar="COTERIE_STATE", help="The service's state folder, which keeps keys.json.", show_default=False),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--keys", envvar="COTERIE_KEYS", help="The key file; else keys.json in the state folder.", show_default=False
    ),
]


@key_app.command("new")
def new(
    scope: Annotated[
        Literal["ask", "change"], typer.Option(help="ask, or change, which may also enrol, forget and swap bundles.")
    ] = "ask",
    name: Annotated[str, typer.Option(help="Whose key it is.")] = "",
    state: State = None,
    keys: KeyFile = None,
) -> None:
    """Make a key and show it, this once. With the first one, a running service begins to ask for keys.

    Example: coterie key new --scope change --name camera-7
    """
    from serving.keys import create_key

    key, token = create_key(_path(state, keys), scope, name)
    print(token)
    typer.echo(f"Key {key.id} may {key.scope}; it is not shown again. Send it as: Authorization: Bearer …", err=True)


@key_app.command("list")
def show(state: State = None, keys: KeyFile = None) -> None:
    """Show all keys, without their secrets.

    Example: coterie key list
    """
    from serving.keys import read_keys

    table = Table("id", "scope", "created", "name")
    for key in read_keys(_path(state, keys)):
        table.add_row(key.id, key.scope, key.created, Text(key.name))
    console.print(table)


@key_app.command("revoke")
def revoke(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="As coterie key list shows it.", show_default=False)],
    state: State = None,
    keys: KeyFile = None,
) -> None:
    """Revoke a key: running services refuse it within a second.

    Example: coterie key revoke 1f0c93ab
    """
    from serving.keys import revoke_key

    revoke_key(_path(state, keys), identifier)
    console.print(f"Key {identifier} is revoked.")


def _path(state: Path | None, keys: Path | None) -> Path:
    from serving.keys import FILE_NAME
    from serving.settings import Settings

    return keys or (state or Settings.from_environment({}).state) / FILE_NAME
