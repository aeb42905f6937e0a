"""What a shell sees: the Typer app, a file per command."""
