"""A block of source code: highlighted, with a copy button, folded when it is long."""

from html import escape

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

LONG = 20  # lines; a longer listing starts folded


def listing(source: str, language: str) -> str:
    try:
        body = highlight(source, get_lexer_by_name(language), HtmlFormatter(nowrap=True))
    except ClassNotFound:
        body = escape(source)
    block = f'<div class="listing"><pre tabindex="0"><code>{body}</code></pre></div>'
    lines = source.rstrip().count("\n") + 1
    first = escape(source.lstrip().split("\n", 1)[0])
    fold = f'<details class="fold"><summary>{lines} lines <code>{first}</code></summary>{block}</details>'
    return fold if lines > LONG else block
