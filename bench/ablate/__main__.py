"""``python -m bench.ablate NAME``: the process that ``tmask ablate`` starts."""

import sys

from bench.ablate.runner import main

sys.exit(main(sys.argv[1:]))
