"""The embedded book: the middle of a public-domain novel that neither the demo LM nor its predictor was trained on."""

from pathlib import Path

BOOK = Path(__file__).parent.parent / "assets" / "book.txt"


def demo_book() -> str:
    """Return the text; its title is in the model card of the demo LM."""
    return BOOK.read_text(encoding="utf-8")
