"""`python -m opt`: the command line where another program called `opt` (LLVM's) comes first on the path."""

import sys

from opt.cli import main

sys.exit(main())
