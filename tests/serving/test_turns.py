"""The turns of a template, put together again, are what the template makes of the whole conversation."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from attnpred.hf import DEMO_MODEL
from attnpred.serving.turns import turns_of

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
THINKING = (  # takes the thoughts out of earlier answers, and begins new ones
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def tokenizer(template: str | None) -> Any:
    found: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
    found.chat_template = template
    return found


@pytest.mark.parametrize("template", [CHATML, GEMMA, MISTRAL])
@pytest.mark.parametrize("document", ["", "  A long story.\n"])
def test_turns_put_together_are_what_the_template_makes(template: str, document: str) -> None:
    words = tokenizer(template)
    turns = turns_of(words)
    first = "A long story.\n\nQuestion: Who?" if document else "Who?"
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "Ruth."},
        {"role": "user", "content": "When?"},
    ]
    whole = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    given = " Ruth." if template == MISTRAL else "Ruth."  # there the model itself begins with the space
    assert whole == turns.opening(document) + "Who?" + turns.answer + given + turns.question + "When?" + turns.answer
    assert not turns.note and not turns.closing


def test_an_answer_begins_as_the_template_begins_it() -> None:
    """And not as it shows an earlier answer."""
    assert turns_of(tokenizer(THINKING)).answer == "<|assistant|><think>\n"


UNUSABLE = {
    "none": (None, "has no chat template"),
    "it raises": ("{{ raise_exception('no') }}", "cannot be used (TemplateError)"),
    "it is damaged": ("{% for %}", "cannot be used (TemplateSyntaxError)"),
    "it drops messages": ("{{ messages[0]['content'] }}", "cannot be used (ValueError)"),
    "it repeats messages": (CHATML + CHATML, "cannot be used (ValueError)"),
    "its beginning depends on later turns": (
        "{{ messages | length }} messages: " + CHATML,
        "depends on later turns",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_without_a_template_that_serves_there_are_plain_turns_and_a_note(case: str) -> None:
    template, why = UNUSABLE[case]
    turns = turns_of(tokenizer(template))
    assert why in turns.note and "\n" not in turns.note
    opened = turns.opening("A story.") + "Who?" + turns.answer
    assert opened == "A story.\n\nQuestion: Who?\nAnswer:" and turns.opening("") == "Question: "
    assert turns.closing == "\n" and turns.question == "\nQuestion: "
