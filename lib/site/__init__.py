"""From the sources of the chapters to a site: run, keep what a run found, build the pages."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = ROOT / "chapters"  # sources, without outputs
PUBLISHED = ROOT / "book" / "chapters"  # the same as executed on the lab; what tests compare with
RESULTS = ROOT / "book" / "results"  # what other studies found, a folder for each
RUN = ROOT / "_build" / "chapters"  # the last run of the lab
DRAFTS = ROOT / "_build" / "executed"  # runs with other parameters, and those that failed
