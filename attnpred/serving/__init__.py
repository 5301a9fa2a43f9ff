"""Questions about long texts: texts that are read once and kept (`reader`, `kept`), and conversations about them.

`attnpred chat` and `attnpred generate --document` are its users so far.
"""
