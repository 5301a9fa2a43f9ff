"""Where keys and values live. A store knows block ids and tensors, nothing of scores, policies or models.

To add one: its file, and its line in `STORES`; the contract tests pick it up.
"""

from attnpred.store.pool import BlockPool

STORES: dict[str, type[BlockPool]] = {"pool": BlockPool}
