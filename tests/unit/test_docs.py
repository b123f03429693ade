"""The documents point at what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_to_a_file_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    broken = [
        link for link in links if "://" not in link and not (page.parent / link).resolve().exists()
    ]
    assert broken == []


def test_every_promise_names_a_test_that_exists():
    text = (ROOT / "docs" / "guarantees.md").read_text()
    pages = sorted((ROOT / "tests").rglob("test_*.py"))
    defined = {name for page in pages for name in re.findall(r"def (test_\w+)", page.read_text())}
    named = set(re.findall(r"\b(test_\w+)\b(?!\.py)", text))
    assert len(named) > 40
    assert named - defined == set()
    assert set(re.findall(r"(test_\w+\.py)", text)) <= {page.name for page in pages}
