"""torch has one thread in every process of the tests, of which there are as many as processors: more would wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
