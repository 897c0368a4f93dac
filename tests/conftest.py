"""What all tests share: skipping by peer, failing when CI is missing one, variants of images."""

from __future__ import annotations

import os
from functools import cache

import pytest
from hypothesis import settings

from qcowkit.operations.create import OptionValue
from tests import peers, variants

# A commit is judged by the same examples each time; `make soak` looks for new ones.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.register_profile("brief", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("steady")

PEER_PREFIX = "peer "
REQUIRE_PEERS = "QCOWKIT_REQUIRE_PEERS"

VARIANT = "--image-options"

_missing_peers: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--image-options=NAME`: see tests/variants.py."""
    parser.addoption(
        VARIANT,
        metavar="NAME",
        choices=tuple(variants.VARIANTS),
        help="make and build qcow2 images so, wherever a test leaves it open: "
        + ", ".join(variants.VARIANTS),
    )


def pytest_configure(config: pytest.Config) -> None:
    """The variant is in force before any test module is imported."""
    if name := config.getoption(VARIANT):
        variants.install(name)
        peers.variant = variants.VARIANTS[name]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under a variant only what can notice it is run: modules of tests that make images."""
    if not config.getoption(VARIANT):
        return
    notices = cache(variants.can_notice)
    kept = [item for item in items if notices(getattr(item, "module", variants))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is pinned under a variant, and a test marked `peer("qemu-img", ...)` by the name of
    the first command missing."""
    _skip_pinned(item)
    for marker in item.iter_markers("peer"):
        for command in marker.args:
            if peers.find_peer(command) is None:
                pytest.skip(f"{PEER_PREFIX}{command} is missing")


def _skip_pinned(item: pytest.Item) -> None:
    name = item.config.getoption(VARIANT)
    for marker in item.iter_markers("pinned"):
        reason, *names = marker.args
        if name and (not names or name in names):
            pytest.skip(f"pinned: {reason}")


def _note(nodeid: str, report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or not isinstance(report.longrepr, tuple):
        return
    reason = str(report.longrepr[2]).removeprefix("Skipped: ")
    if reason.startswith(PEER_PREFIX):
        _missing_peers.add(f"{nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Seen by the controller of pytest-xdist too, which has the last word."""
    _note(report.nodeid, report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A module may skip itself as a whole."""
    _note(report.nodeid, report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With QCOWKIT_REQUIRE_PEERS set, a test without its peer is a failure."""
    if os.environ.get(REQUIRE_PEERS) and _missing_peers and session.exitstatus in (0, 5):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was skipped for want of a peer, where that fails the run."""
    if os.environ.get(REQUIRE_PEERS) and _missing_peers:
        terminalreporter.section(f"peers are missing ({REQUIRE_PEERS})", red=True)
        for line in sorted(_missing_peers):
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test inherits what a developer set for the command line."""
    monkeypatch.delenv("QCOW_DEBUG", raising=False)


@pytest.fixture
def image_options(request: pytest.FixtureRequest) -> dict[str, OptionValue]:
    """The keys of `-o` of the variant; for a test that makes an image by a way of its own."""
    variant = variants.VARIANTS.get(request.config.getoption(VARIANT) or "")
    return variants.created_with(variant, {})
