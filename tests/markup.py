"""Reading a page back: a strict parser, and text that a careless page would break on."""

import base64
import html.parser
import io

import numpy as np
from PIL import Image

HOSTILE = (
    '<script>alert("1")</script>&amp; \'"><img src=http://x.y/z onerror=a> {0} $a_$ \x1b[31m\ud800'
)

# Names that files may have: markup, right to left, emoji, invisible turns of direction, control
# characters, length.
NAMES = [
    HOSTILE,
    "</style></script><script>document.title = 'ran'</script>.png",
    "\u0635\u0648\u0631/\u0642\u0637\u0629 (1).png",
    "\U0001f984 \U0001f469\u200d\U0001f680.png",
    "photo\u202egnp.exe",
    "line\nbreak\ttab\r.png",
    "folder name/" + "long-name-" * 24 + ".png",
    "x" * 240 + ".png",
    " .png",
]


class Strict(html.parser.HTMLParser):
    """Refuses tags that do not nest and records what it sees."""

    VOID = {"meta", "img", "br", "hr", "input", "wbr"}

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.data = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.data.append((self.open[-1] if self.open else None, text))


def parse(text):
    """The page as `Strict` sees it."""
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def assert_self_contained(parser):
    """No script, no handler of events, no address but pictures in the page and its own parts."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(parser.tags)
    for tag, name, value in parser.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "srcset", "action", "data"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:40])
    (style,) = [text for tag, text in parser.data if tag == "style"]
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert ("meta", "http-equiv", "Content-Security-Policy") in parser.attributes


def shown(text):
    """What of a hostile text must come out: all, control characters as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def pictures(parser):
    """Pixels `[h, w, 3]` of every picture of the page."""
    found = []
    for tag, name, value in parser.attributes:
        if (tag, name) == ("img", "src"):
            data = base64.b64decode(value.split(",")[1], validate=True)
            found.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    return found
