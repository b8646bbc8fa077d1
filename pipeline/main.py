"""The command `steerage`. Kept apart from the CLI, which needs libraries that a node lacks."""

from __future__ import annotations

import sys


def run() -> None:
    """Start the command line, or say what to install."""
    try:
        from pipeline.cli.app import main
    except ModuleNotFoundError as error:
        sys.exit(
            f"steerage: the command line needs {error.name!r}, which an inference node's install "
            "leaves out.\nInstall it with: pip install 'steerage[pipeline]'"
        )
    main()
