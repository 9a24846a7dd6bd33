"""The live page in a browser: a real server with 5,000 adapters, two tenants and a load test that keeps it busy."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from support.browser import NEEDED, Browser, browsing
from support.tiny_models import save_tiny_model

from gralora_server.loadtest.synthetic import AdapterKind, make_adapters

from .conftest import GRALORA, announced

DOCS = Path(__file__).parent.parent.parent / "docs"
SHOTS = os.environ.get("GRALORA_SCREENSHOTS")  # set: those of docs/ are taken anew
NUM_ADAPTERS = 5000
OPERATOR, ACME, BOB = "an-operators-token", "a-token-of-acme", "a-token-of-bob"
PAPER = {"light": (246, 247, 249), "dark": (15, 20, 26)}
SIZES = {"desktop": (1280, 1500), "phone": (390, 844)}
TABLES = ("requests", "ended", "adapters", "tenants")
AXE = pytest.mark.skipif(
    find_spec("axe_playwright_python") is None, reason="axe-playwright-python is not installed (make install)"
)
pytestmark = [NEEDED, pytest.mark.alone]


def config() -> str:
    hashed = {secret: hashlib.sha256(secret.encode()).hexdigest() for secret in (OPERATOR, ACME, BOB)}
    return f"""
        public_adapters = ["*"]
        [[admin_tokens]]
        sha256 = "{hashed[OPERATOR]}"
        [tenants.acme]
        weight = 3
        limits = {{streams = 64, tokens_per_s = 5000}}
        [[tenants.acme.tokens]]
        sha256 = "{hashed[ACME]}"
        [tenants.bob]
        [[tenants.bob.tokens]]
        sha256 = "{hashed[BOB]}"
    """


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page of a server that is busy for as long as the tests take."""
    root = tmp_path_factory.mktemp("live")
    save_tiny_model("llama", root / "model")
    make_adapters(root / "model", root / "adapters", [AdapterKind(4, 2, ("q_proj",))], NUM_ADAPTERS)
    (root / "gralora.toml").write_text(config())
    options = ["--config", str(root / "gralora.toml"), "--threads", "1", "--max-num-seqs", "6"]
    with (
        announced(root / "model", root / "adapters", *options, "--ui-address", "127.0.0.1:0") as said,
        ExitStack() as stack,
    ):
        for tenant, secret, clients in (("acme", ACME, 14), ("bob", BOB, 4)):
            stack.enter_context(load_test(said["address"], root / tenant, secret, clients))
        yield said["ui_address"]


@contextmanager
def load_test(address: str, folder: Path, secret: str, clients: int) -> Iterator[None]:
    """As a tenant's customers, each with the next request when it has its answer."""
    folder.mkdir()
    (folder / "token").write_text(secret)
    command = [GRALORA, "loadtest", "--address", address, "--token-file", folder / "token", "--out", folder / "out"]
    command += ["--arrivals", f"closed:{clients}", "--popularity", "zipf:1", "--warmup-s", "0", "--duration-s", "600"]
    command += ["--prompt-tokens", "16-200", "--output-tokens", "100-250"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL) as driver:
        try:
            yield
        finally:
            driver.terminate()


@pytest.fixture(scope="module")
def page(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """What an operator has let himself in to, and sees at work."""
    with browsing(tmp_path_factory.mktemp("browser")) as browser:
        browser.look(*SIZES["desktop"], "light")
        browser("Page.navigate", url=f"http://{address}/")
        browser.until("document.querySelector('#entry') && !document.querySelector('#entry').hidden")
        browser.run("document.querySelector('#token').focus()")
        browser("Input.insertText", text=OPERATOR)
        browser.press("Enter")
        browser.until("document.querySelectorAll('#requests tbody th').length > 6", timeout_s=120)
        browser.until("document.querySelector('#adapters tbody th') !== null")
        yield browser


def texts(page: Browser, table: str, column: int = 0) -> list[str]:
    found: list[str] = page.run(
        f"[...document.querySelectorAll('#{table} tbody tr')].map(r => r.cells[{column}].textContent)"
    )
    return found


def keep(page: Browser, name: str, folder: Path, part: str = "") -> Image.Image:
    """A picture of the window, or of one element of it, small enough for a repository."""
    page.picture(folder / name)
    image = Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB")
    if part:
        box = page.run(
            f"(b => [b.left, b.top, b.right, b.bottom])(document.querySelector('{part}').getBoundingClientRect())"
        )
        image = image.crop((*map(round, box[:2]), min(round(box[2]), image.width), min(round(box[3]), image.height)))
    if SHOTS:
        image.quantize(256, dither=Image.Dither.NONE).save(DOCS / name, optimize=True)
    return image


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_and_is_drawn_in_every_width_and_scheme(page: Browser, size: str, scheme: str, tmp_path: Path) -> None:
    page.look(*SIZES[size], scheme)
    page.run("scrollTo(0, 0)")
    page.until("document.querySelectorAll('#charts polyline')[0].getAttribute('points').split(' ').length > 20", 60)
    image = keep(page, f"live-{size}-{scheme}.png", tmp_path)

    assert page.run("document.documentElement.scrollWidth") == SIZES[size][0]  # it does not scroll sideways
    assert image.getpixel((2, 2)) == PAPER[scheme]
    assert page.complaints == []


@AXE
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing(page: Browser, size: str, scheme: str) -> None:
    page.look(*SIZES[size], scheme)

    assert [(one["id"], one["nodes"][0]["failureSummary"]) for one in page.axe()] == []


def test_it_shows_requests_at_work_and_why_others_wait(page: Browser) -> None:
    page.until("/for a row, \\d+ before it/.test(document.querySelector('#requests tbody').textContent)")
    page.until("document.querySelectorAll('#requests tbody tr').length > 6")

    assert set(texts(page, "requests", 1)) <= {"acme", "bob"}
    assert "answering" in texts(page, "requests", 4)
    assert {"acme", "bob"} <= set(texts(page, "tenants"))
    assert page.run("Number(document.querySelectorAll('#figures dd')[4].textContent.replace(',', '')) > 0")


def test_it_shows_what_is_new_every_second_and_tells_listeners_nothing_of_it(page: Browser) -> None:
    page.run(
        "window.heard = 0; window.seen = 0; const all = {childList: true, characterData: true, subtree: true};"
        "new MutationObserver(() => { heard += 1 }).observe(document.getElementById('said'), all);"
        "new MutationObserver(() => { seen += 1 }).observe(document.querySelector('#requests tbody'), all); 1"
    )
    page.until("seen >= 4")

    assert page.run("heard") == 0


def test_five_thousand_adapters_come_a_page_at_a_time_sorted_and_searched_by_the_server(page: Browser) -> None:
    page.look(*SIZES["desktop"], "light")
    head = "document.querySelector('#adapters thead th')"
    page.run(f"{head}.firstChild.click()")
    page.until(f"{head}.getAttribute('aria-sort') === 'ascending'")
    page.until("document.querySelectorAll('#adapters tbody th')[49].textContent.endsWith('-00049')")
    first = texts(page, "adapters")
    page.run("[...document.querySelectorAll('#adapters .pager button')].at(-1).click()")
    page.until("document.querySelector('#adapters tbody th').textContent.endsWith('-00050')")
    page.run("document.querySelector('#adapters input').value = '-0499'")
    page.run("document.querySelector('#adapters input').dispatchEvent(new Event('input'))")
    page.until("document.querySelectorAll('#adapters tbody tr').length === 10")

    assert len(first) == 50
    assert first == sorted(first)
    assert page.run("document.querySelector('#adapters .found').textContent") == "10 found"
    assert page.run("document.getElementById('said').textContent") == "adapters sorted by adapter, ascending"
    page.run("document.querySelector('#adapters input').value = ''")
    page.run("document.querySelector('#adapters input').dispatchEvent(new Event('input'))")
    page.until("document.querySelector('#adapters .found').textContent === '5,000 in all'")


def test_it_is_worked_by_keys_alone_and_shows_where_they_are(page: Browser) -> None:
    page("Page.reload")
    page.until("document.querySelectorAll('#requests tbody th').length > 6")
    passed = []
    while (here := page.run("document.activeElement.textContent.trim()")) != "Age":
        assert len(passed) < 30, passed
        passed.append(here)
        page.press("Tab")
    before = page.run("document.activeElement.parentElement.getAttribute('aria-sort')")
    outline = page.run("getComputedStyle(document.activeElement).outlineStyle")
    page.press("Enter")
    page.until(f"document.activeElement.parentElement.getAttribute('aria-sort') !== '{before}'")

    assert "Skip to the requests" in passed
    assert outline == "solid"
    assert page.run("document.activeElement.textContent") == "Age"  # what is new takes nobody's place away


def test_a_request_is_explained_where_it_stands(page: Browser, tmp_path: Path) -> None:
    page.look(*SIZES["desktop"], "light")
    page.run("document.querySelector('#requests tbody button').focus()")
    asked = page.run("document.activeElement.textContent")
    page.press("Enter")
    page.until("document.getElementById('why').open")
    keep(page, "live-explained.png", tmp_path, "#why")

    assert page.run("document.getElementById('why-title').textContent").startswith(f"{asked}: ")
    assert "decode" in texts(page, "why") or "queue" in texts(page, "why")
    assert page.run("document.getElementById('why-says').textContent")
    if find_spec("axe_playwright_python") is not None:
        assert page.axe() == []
    page.press("Enter")  # what is at hand closes it
    page.until("!document.getElementById('why').open")
    assert page.run("document.activeElement.tagName") == "BUTTON"  # where its reader was
    page.run("document.activeElement.blur()")


def test_a_request_that_ended_is_opened_from_the_list_or_by_its_id(page: Browser, tmp_path: Path) -> None:
    """By keys alone."""
    page.look(1280, 560, "light")
    page.until("document.querySelectorAll('#ended tbody button').length > 6")
    page.run("document.querySelector('#ended').scrollIntoView()")
    keep(page, "live-ended.png", tmp_path, "#ended")
    page.run("document.querySelector('#ended tbody button').focus()")
    listed = page.run("document.activeElement.textContent")
    page.press("Enter")
    page.until("document.getElementById('why').open")
    from_the_list = page.run("document.getElementById('why-title').textContent")
    page.press("Enter")
    page.until("!document.getElementById('why').open")
    page.run("document.getElementById('wanted-id').focus()")
    page("Input.insertText", text=f" {listed} ")
    page.press("Enter")
    page.until("document.getElementById('why').open")
    by_its_id = page.run("document.getElementById('why-title').textContent")
    page.press("Enter")
    page.until("!document.getElementById('why').open")

    assert from_the_list.startswith(f"{listed}: ")
    assert "it runs" not in from_the_list
    assert by_its_id == from_the_list
    assert page.run("document.activeElement.id") == "wanted-id"


def test_an_id_that_nobody_has_is_said_beside_the_field_and_read_out(page: Browser) -> None:
    page.run("document.getElementById('wanted-id').value = ''")
    page.run("document.getElementById('wanted-id').focus()")
    page("Input.insertText", text="<b>nobody</b>")
    page.press("Enter")
    said = page.until("document.getElementById('wanted-said').textContent")

    assert said == "no recent request is called '<b>nobody</b>'"
    assert page.run("document.getElementById('wanted-said').getAttribute('role')") == "status"
    page.complaints[:] = [one for one in page.complaints if "404" not in one]  # which the browser logs of any refusal


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_tables(page: Browser, table: str) -> None:
    heads = page.run(f"[...document.querySelectorAll('#{table} thead th')].map(h => h.scope)")
    names = page.run(f"[...document.querySelectorAll('#{table} tbody tr')].map(r => r.cells[0].scope)")
    sorted_by = page.run(f"document.querySelectorAll('#{table} thead [aria-sort]').length")

    assert set(heads) == {"col"}
    assert set(names) == {"row"}
    assert sorted_by == 1


def test_paused_it_stands_still_until_it_is_let_go(page: Browser) -> None:
    page.run("document.getElementById('pause').click()")
    page.until("document.getElementById('said').textContent.startsWith('Paused')")
    page.run("new Promise(done => setTimeout(done, 1000))")  # for the answer that was under way
    held = page.run("performance.getEntriesByType('resource').length")
    page.run("new Promise(done => setTimeout(done, 2500))")
    assert page.run("performance.getEntriesByType('resource').length") == held

    page.run("document.getElementById('pause').click()")
    page.until(f"performance.getEntriesByType('resource').length > {held}")
    assert page.run("document.getElementById('pause').getAttribute('aria-pressed')") == "false"


def test_the_console_has_nothing_to_complain_of(page: Browser) -> None:
    page.run("1")

    assert page.complaints == []
