"""Where keys and values live. A store knows block ids and tensors, nothing of scores, policies or models."""
