"""All claims of the book, by key and in the paper's order; each stands in a module of findings."""

import importlib
import pkgutil

from lib.findings.claims import Claim

_found = [
    claim
    for module in pkgutil.iter_modules(__path__)
    for group in vars(importlib.import_module(f"{__name__}.{module.name}")).values()
    if isinstance(group, list)
    for claim in group
    if isinstance(claim, Claim)
]
CLAIMS = {c.key: c for c in sorted(_found, key=lambda claim: claim.key.partition("-")[0])}
