"""Debian's Chromium without a window, driven by selenium; for the tests of the report and its benchmark."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,800"),
)
SET_FIELD = """
const [id, value, event] = arguments, start = performance.now(), field = document.getElementById(id);
field.value = value;
field.dispatchEvent(new Event(event));
document.body.offsetHeight;
return performance.now() - start;
"""


def lacks_of_chromium() -> list[str]:
    """What of it this machine has not."""
    binaries = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return binaries + ([] if find_spec("selenium") else ["the Python package selenium"])


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of its own profile."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        # named, else selenium looks for one to fetch
        driver = webdriver.Chrome(
            options=options, service=webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        )
        driver.set_script_timeout(20)
        try:
            yield driver
        finally:
            driver.quit()


def set_field(page: Any, name: str, value: str) -> float:
    """Give the page's search or one of its menus a value; milliseconds until the page is laid out anew."""
    return float(page.execute_script(SET_FIELD, name, value, "input" if name == "query" else "change"))


def wait_for(page: Any, script: str, seconds: float = 10.0) -> Any:
    """What the script gives once it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(page, seconds, 0.02).until(lambda driver: driver.execute_script(script))
