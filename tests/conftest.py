"""What `make check` leaves out: what trains, draws many scenes, runs chapters or a browser.

The rest is some 700 tests and 75 s of processor time, half of that on two cores.
"""

import pytest

SLOW = {
    "benchmarks",
    "board",
    "chapters",
    "chapters_public",
    "execute",
    "explorer",
    "hub",
    "masked",
    "mutations",
    "pages",
    "pictures",
    "processes",
    "public",
    "receptive_field",
    "results",
    "scenes",
    "site",
    "studies",
    "photographs",
    "training",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker(pytest.mark.slow)
