"""What several test files need."""

import os
import shutil

import pytest

# Of Debian's Chromium: none of its own traffic, which a closed network would refuse many times a second.
QUIET = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, driven by Playwright; without one the test is skipped, but not under LVM_BROWSER=1."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        assert not os.environ.get("LVM_BROWSER"), "LVM_BROWSER is set, and there is no Chromium"
        pytest.skip("no Chromium on this machine: the pages were not seen in a browser; apt install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason='run: pip install -e ".[browser]"')
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=[*QUIET, *(["--no-sandbox"] if root else [])])
        yield browser
        browser.close()
