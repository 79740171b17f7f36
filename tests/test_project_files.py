"""Files that no import reaches: workflows, templates, citation, gallery, changelog.

Needs neither racecore nor a network, so that it can run where racecore cannot. YAML is parsed where
PyYAML is installed; pip's `test` extra does not install it.
"""

from __future__ import annotations

import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
CHANGES = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def text(path: str | pathlib.Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def parsed(path: str | pathlib.Path) -> dict:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: YAML is not parsed")
    return yaml.safe_load(text(path))


def by_name(path: pathlib.Path) -> str:
    return path.name


def anchors(page: pathlib.Path) -> set[str]:
    """Return the anchors of a page's headings, as MyST makes them."""
    titles = re.findall(r"^#{1,3} (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_there_are_workflows_and_templates():
    assert {path.name for path in WORKFLOWS} == {"docs.yml", "package.yml", "tests.yml"}
    assert {path.name for path in TEMPLATES} == {"bug.yml", "config.yml", "feature.yml"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_a_workflow_limits_permissions_time_and_runs(path):
    workflow = parsed(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "group" in workflow["concurrency"]
    assert workflow["jobs"]
    for name, job in workflow["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 120, name
        assert "latest" not in job["runs-on"], name


@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_actions_are_pinned_to_a_major_version_of_github(path):
    actions = re.findall(r"uses: (\S+)", text(path))
    assert actions
    for action in actions:
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", action)


@pytest.mark.parametrize("path", WORKFLOWS, ids=by_name)
def test_files_named_in_a_workflow_exist(path):
    folders = r"\.ci|\.github|asv_benchmarks|docs|examples|racecore|tests"
    for name in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]+", text(path)):
        if not name.startswith("docs/_build"):
            assert (ROOT / name).exists(), name


def test_the_quick_profile_names_known_markers():
    markers = set(re.findall(r"^    \"(\w+): ", text("pyproject.toml"), re.MULTILINE))
    expressions = re.findall(r"^  QUICK: (.+)$", text(".github/workflows/tests.yml"), re.MULTILINE)
    assert len(expressions) == 1
    assert set(re.findall(r"\w+", expressions[0])) - {"not", "and", "or"} <= markers


@pytest.mark.parametrize("path", TEMPLATES, ids=by_name)
def test_an_issue_template_asks_for_the_doctor(path):
    template = parsed(path)
    if path.name == "config.yml":
        assert template == {"blank_issues_enabled": False}
        return
    labels = [field["attributes"]["label"] for field in template["body"]]
    assert "Output of `racecore doctor --json`" in labels
    assert len({field["id"] for field in template["body"]}) == len(labels)


def test_the_bug_template_requires_every_answer():
    fields = parsed(".github/ISSUE_TEMPLATE/bug.yml")["body"]
    assert [field["id"] for field in fields] == ["doctor", "script", "expected", "observed"]
    assert all(field["validations"]["required"] for field in fields)


def test_the_citation_has_the_version_of_the_package():
    version = runpy.run_path(str(ROOT / "racecore/_version.py"))["__version__"]
    assert re.search(r"^version: (\S+)$", text("CITATION.cff"), re.MULTILINE)[1] == version


def test_the_citation_is_complete():
    citation = parsed("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "type", "license"} <= set(citation)
    for entry in (citation, *citation["references"]):
        assert entry["title"]
        for author in entry["authors"]:
            assert set(author) in ({"name"}, {"given-names", "family-names"})
    identifiers = [entry["identifiers"][0]["value"] for entry in citation["references"]]
    assert identifiers == ["arXiv:2510.04008", "arXiv:2602.06283"]


def test_the_gallery_shows_every_picture_and_its_links_lead_somewhere():
    index = text("docs/index.md")
    pictures = re.findall(r"\{figure\} (images/\S+)", index)
    assert sorted(pictures) == sorted(
        path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs/images").glob("*.png")
    )
    targets = re.findall(r":target: (\w+)\.html#(\S+)", index)
    assert len(targets) == len(pictures)
    for page, anchor in targets:
        assert anchor in anchors(ROOT / f"docs/{page}.md"), f"{page}.html#{anchor}"
    assert index.count(':alt: "') == len(pictures)


def test_the_changelog_sorts_changes_by_kind():
    headings = re.findall(r"^(#+) (.+)$", text("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == ("#", "Changelog")
    versions = [title for level, title in headings if level == "##"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(.+\)", title) for title in versions)
    kinds = [title for level, title in headings if level == "###"]
    assert kinds
    assert set(kinds) <= CHANGES
    assert {level for level, _ in headings} <= {"#", "##", "###"}


def test_the_security_page_names_what_is_trusted():
    page = text("SECURITY.md")
    for name in ("racecore doctor --json", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "~/.cache"):
        assert name in page
