"""What notebooks show of a model and of a check: the facts, escaped."""

from html.parser import HTMLParser

import pytest

import scfm


class Text(HTMLParser):
    """Collects the text, and the tags that were opened and not closed."""

    def __init__(self, source):
        super().__init__()
        self.words, self.open = [], []
        self.feed(source)
        self.all = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def fitted():
    cells = scfm.datasets.pbmc()[:60].copy()
    cells.obs["type"] = cells.obs["bulk_labels"].astype(str).replace({"Dendritic": "<b>Dendritic & co</b>"})
    return scfm.fit(
        cells,
        labels_key="type",
        config=scfm.FitConfig(n_steps=1),
        pretrain_config=scfm.FitConfig(n_steps=1),
        progress=False,
    )


def test_a_model_shows_its_settings_labels_and_scores(fitted):
    shown = Text(fitted._repr_html_())
    assert shown.open == []
    assert f"{fitted.n_parameters:,}" in shown.all
    assert "<b>Dendritic & co</b>" in shown.all  # as text: the tag was escaped
    assert all(str(method) in shown.all for method in fitted.report().index)


def test_a_check_shows_every_finding(fitted):
    found = scfm.pp.check(scfm.datasets.pbmc()[:30], fitted)
    shown = Text(found._repr_html_())
    assert shown.open == []
    assert all(finding.what in shown.all for finding in found.findings)
