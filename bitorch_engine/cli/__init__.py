"""The command line, ``bitorch-engine train | eval | inspect | info``; its data, models and loop work without it."""


def main() -> None:
    """Run the command line, as the installed program does."""
    from bitorch_engine.cli.app import app

    app()
