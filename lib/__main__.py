"""The book's command line: ``python -m lib COMMAND``."""

import sys

from lib.site.commands import main

if __name__ == "__main__":
    sys.exit(main())
