"""torch has one thread in a process of tests: `make test` starts as many as there are processors, and more would wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
