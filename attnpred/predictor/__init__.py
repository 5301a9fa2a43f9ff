"""The forecast of the next token's attention: memories, networks, traces and training. Needs torch only."""
