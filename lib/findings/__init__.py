"""All claims of the book, by key; each stands in the module of its findings."""

import importlib
import pkgutil

from lib.findings.claims import Claim

CLAIMS: dict[str, Claim] = {
    claim.key: claim
    for module in pkgutil.iter_modules(__path__)
    for group in vars(importlib.import_module(f"{__name__}.{module.name}")).values()
    if isinstance(group, list)
    for claim in group
    if isinstance(claim, Claim)
}
