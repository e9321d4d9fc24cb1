"""``python -m hf_edit``: the same as ``hf-edit``."""

import sys

from .cli import main

sys.exit(main())
