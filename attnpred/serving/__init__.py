"""Questions about long texts: texts that are read once and kept, conversations about them, and a server for many at once.

reader, kept, turns, conversation, answering    one conversation about one text: `attnpred chat`
keeping                                         the folders of both, and what goes when they are full
engine, admission, prefill, answers, chain      many requests on one model, and what they share
service, prompts, documents, web                what clients see of it: `attnpred serve`
"""
