"""Pieces of the page: tables with captions in boxes that scroll by themselves, figures, lists; all words are escaped."""

from collections.abc import Iterable, Sequence
from html import escape

from attnpred.report.svg import Picture


def paragraph(words: str, kind: str = "") -> str:
    """Return a paragraph."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(words)}</p>"


def bullets(lines: Iterable[str]) -> str:
    """Return a list, a sentence each."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def table(name: str, caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. head, caption: words; rows: cells of markup, the first of each names the row. `name` is its id."""
    top = "".join(f'<th scope="col">{escape(words)}</th>' for words in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return (
        f'<div class="scroll" role="region" aria-labelledby="{name}-caption" tabindex="0"><table id="{name}">'
        f'<caption id="{name}-caption">{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def figures(pictures: Sequence[Picture]) -> str:
    """Return pictures side by side, as many as there is room for, each with its title and words below."""
    inside = "".join(
        f"<figure>{made.svg}<figcaption><b>{escape(made.title)}.</b> {escape(made.words)}</figcaption></figure>"
        for made in pictures
    )
    return f'<div class="figures">{inside}</div>' if pictures else ""


def folded(summary: str, body: str, is_open: bool = False) -> str:
    """Return what can be folded away; `summary` is markup."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{body}</details>"
