"""Settings of the whole test run, the chapters' kernels included."""

import os

# As in lib.site.run: a progress bar is no result, and its timings differ from run to run.
os.environ["TQDM_DISABLE"] = "1"
