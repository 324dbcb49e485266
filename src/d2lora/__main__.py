"""`python -m d2lora` and the `d2lora` command."""

import sys

from d2lora.cli import main

if __name__ == "__main__":
    sys.exit(main())
