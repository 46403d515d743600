"""`python -m seqconv_triton`."""

import sys

from seqconv_triton.cli import main

sys.exit(main())
