"""`python -m logra_kernels.cli` is `logra`."""

import sys

from logra_kernels.cli.main import main

sys.exit(main())
