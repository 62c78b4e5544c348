"""The documentation is of this code: its metrics are those that runs log."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.helpers import metrics_page
from tests.helpers.metrics_page import ROOT

from hetero_ppo.config.load import load_config
from hetero_ppo.step.phases import step_phases

#: Paths of users, and of Megatron-Core, begin with one of these.
OTHERS = {"runs", "path", "megatron"}


def test_every_metric_of_the_code_is_explained() -> None:
    assert metrics_page.names_of_code() - metrics_page.names_of_page() == set()


def test_the_page_explains_no_metric_that_the_code_lacks() -> None:
    assert metrics_page.names_of_page() - metrics_page.names_of_code() == set()


def test_every_phase_of_a_ppo_step_is_explained() -> None:
    config = load_config(metrics_page.ROOT / "configs" / "ppo" / "word_sort.yaml", [])
    inner = {phase.split("/")[1] for phase in metrics_page.phases_of_page() if "/" in phase}
    top = {phase for phase in metrics_page.phases_of_page() if "/" not in phase}
    assert {phase.name for phase in step_phases(config)} <= inner | top
    assert metrics_page.phases_of_code() - inner == top - {"total"}


def pages() -> list[Path]:
    """Return the pages of the documentation, and those in the root of the project."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_and_paths_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    anchors = re.findall(r"\]\(([a-z_]*(?:\.md)?)#([^)\s]+)\)", text)
    lost = [anchor for name, anchor in anchors if anchor not in headings(page.parent / name if name else page)]
    assert lost == []
    paths = re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|sh|toml|lock|sbatch))", text)
    folders = [ROOT, ROOT / "hetero_ppo", ROOT / "megatron_bridge"]
    known = [path for path in paths if path.split("/")[0] not in OTHERS]
    assert [path for path in known if not any((folder / path).exists() for folder in folders)] == []


def test_the_index_links_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md" and f"({page.name})" not in index
    ] == []


def test_whole_configurations_of_the_pages_load(tmp_path: Path) -> None:
    texts = [text for page in pages() for text in re.findall(r"```yaml\n(kind: .*?)```", page.read_text(), re.DOTALL)]
    assert len(texts) >= 4
    for number, text in enumerate(texts):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        load_config(file, [])
