"""`python -m coterie_cli` is the `coterie` command, for launchers such as torchrun that start modules."""

from coterie_cli.main import main

main()
