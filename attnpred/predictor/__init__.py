"""The forecast of the next token's attention: networks, trained weights, traces and training. Needs torch only."""
