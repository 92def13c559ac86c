"""``python -m gcfunc`` is the ``gcfunc`` command."""

import sys

from gcfunc.recipes.cli import main

if __name__ == "__main__":
    sys.exit(main())
