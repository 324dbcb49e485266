"""`python -m d2lora` and the `d2lora` command."""

import sys

from d2lora import cli


def main() -> None:
    """Run a command and end the process with its exit code."""
    code = cli.main()
    if code >= cli.INTERRUPTED:
        from d2lora.runtime.signals import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
