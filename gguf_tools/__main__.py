"""`python -m gguf_tools`, and the console script's entry point."""

from __future__ import annotations

import sys


def entry() -> None:
    """Run the command line. Never returns: ends the process with the command's exit code."""
    try:
        # Imported here so that Ctrl-C during the import, too, ends without a traceback.
        from gguf_tools.cli import main

        main(prog_name="gguf_tools")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    entry()
