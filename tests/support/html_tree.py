"""HTML read into a tree, by Python's own parser: what a page's elements, texts and tables are."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "input", "br", "img"}


@dataclass
class Node:
    tag: str
    attributes: dict = field(default_factory=dict)
    inner: list = field(default_factory=list)
    """Nodes and texts."""

    @property
    def text(self):
        return "".join(each if isinstance(each, str) else each.text for each in self.inner)

    def all(self, tag=None):
        """Every node below, in order; of that tag."""
        for each in self.inner:
            if isinstance(each, Node):
                if tag in (None, each.tag):
                    yield each
                yield from each.all(tag)

    def one(self, tag):
        return next(self.all(tag))


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open = [Node("")]

    def handle_starttag(self, tag, attrs):
        node = Node(tag, dict(attrs))
        self.open[-1].inner.append(node)
        if tag not in _VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].inner.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].inner.append(data)


def read_html(text):
    """The tree of a text in which every element is closed. Fails where one is not."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1, [node.tag for node in reader.open]
    return reader.open[0]


def rows_of(node):
    """The texts of a table, its head first."""
    return [[each.text.strip() for each in row.inner if isinstance(each, Node)] for row in node.one("table").all("tr")]
