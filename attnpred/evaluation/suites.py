"""Suites: what `attnpred eval --suite NAME` measures, so that a stranger need not choose.

`quick` is to take less than 20 minutes on two cores for a model of 100 M parameters: reading 2,048 tokens is about 0.4
TFLOP, some 5 to 10 seconds; each of its 33 cells reads three documents, and all questions about one share that.
`full` is for a night on a GPU: all tasks that need no file.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Suite:
    """Words of the options that it stands for."""

    tasks: str
    lengths: str
    budgets: str
    policies: str
    documents: int
    steps: int


SUITES = {
    "quick": Suite(
        tasks="facts4,facts_turns,perplexity",
        lengths="2048",
        budgets="0.125,0.0625",
        policies="full,streaming,snapkv,ema,quest,predicted",
        documents=3,
        steps=48,
    ),
    "full": Suite(
        tasks="facts1,facts4,facts4_prompt,facts_turns,hops,chain,recite,needle,needle4,needle_values,passkey,lookup,"
        "niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multikey_3,niah_multivalue,"
        "niah_multiquery,vt,cwe,fwe,perplexity,agreement",
        lengths="4096,8192",
        budgets="0.25,0.125,0.0769,0.0625,0.03125",
        policies="full,streaming,h2o,snapkv,ema,mean_key,quest,predicted,oracle",
        documents=12,
        steps=256,
    ),
}
