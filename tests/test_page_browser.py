"""The listening page in a real browser: Debian's chromium, driven by playwright."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from scored_runs import HOSTILE, write_scored_run

from local.page import main

NAMES = ["AM Contra - Heart Peripheral", "B - Song", HOSTILE]  # the first has published scores
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
AUTOPLAY = "--autoplay-policy=no-user-gesture-required"
FLAGS = ["--no-sandbox", "--disable-gpu", "--mute-audio", AUTOPLAY]
STEP = 0.02  # s, by which a switch may move the position

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    parent = tmp_path_factory.mktemp("browser")
    first = write_scored_run(parent / "a", NAMES, seconds=12)
    second = write_scored_run(parent / "b", NAMES, seconds=12, shift=-1)
    flags = ["--root", str(parent / "a" / "data"), "--out", str(parent / "page")]
    main([str(first), str(second), *flags])
    return parent / "page"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser) -> Iterator:
    """A tab that fails the test if the page logs an error, or asks for anything but local files."""
    tab, faults = browser.new_page(viewport={"width": 1280, "height": 800}), []

    def note_request(request) -> None:
        if not request.url.startswith(("file://", "data:")):
            faults.append(f"request to {request.url}")

    def note_failure(request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page was left meanwhile
            faults.append(f"no {request.url}")

    tab.on("console", lambda message: faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    tab.on("requestfailed", note_failure)
    tab.on("request", note_request)
    yield tab
    tab.close()
    assert faults == []


def open_track(tab, folder: Path, part: str = "") -> None:
    tab.goto((folder / "tracks" / "1.html").as_uri() + part)


def start_playing(tab) -> None:
    tab.keyboard.press(" ")
    tab.wait_for_function("[...document.querySelectorAll('audio')].every(a => a.currentTime > 0.5)")


def read_times(tab) -> list[float]:
    return tab.evaluate("[...document.querySelectorAll('audio')].map(a => a.currentTime)")


def find_heard(tab) -> list[int]:
    """The numbers of the players that can be heard."""
    volumes = tab.evaluate("[...document.querySelectorAll('audio')].map(a => a.volume)")
    return [number for number, volume in enumerate(volumes, start=1) if volume > 0.001]


def wait_heard(tab, number: int) -> None:
    tab.wait_for_function(
        "n => [...document.querySelectorAll('audio')]"
        ".every((a, i) => (a.volume > 0.001) === (i + 1 === n))",
        arg=number,
    )


def click_at(plot, part: float) -> None:
    plot.click(position={"x": part * plot.bounding_box()["width"], "y": 30})


def wait_button(tab, text: str) -> None:
    tab.wait_for_function("text => document.querySelector('#play').textContent === text", arg=text)


def press_tab_until(tab, name: str) -> None:
    for _ in range(40):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.id") == name:
            return
    raise AssertionError(f"#{name} is not reached")


def list_names(tab) -> list[str]:
    return tab.locator("[data-target='1'] tbody tr:visible th").all_inner_texts()


# The overview


def test_the_table_sorts_and_filters(tab, folder):
    tab.goto((folder / "index.html").as_uri())
    table = tab.locator("[data-target='1']")
    assert list_names(tab) == NAMES
    heading = table.get_by_role("button", name="a/eval").first
    heading.click()
    assert heading.locator("..").get_attribute("aria-sort") == "ascending"
    assert list_names(tab) == NAMES
    heading.press("Enter")
    assert heading.locator("..").get_attribute("aria-sort") == "descending"
    assert list_names(tab) == NAMES[::-1]
    tab.get_by_label("Filter by name").fill("b - s")
    assert list_names(tab) == ["B - Song"]
    assert "1 of 3" in tab.locator("#count").inner_text()


def test_the_sorting_is_kept_while_tracks_are_visited(tab, folder):
    tab.goto((folder / "index.html").as_uri())
    for _ in range(2):
        tab.locator("[data-target='1']").get_by_role("button", name="gain of a/eval").click()
    assert list_names(tab) == NAMES[::-1]
    tab.get_by_role("link", name=NAMES[0]).first.click()
    tab.get_by_role("link", name="All tracks").click()
    assert list_names(tab) == NAMES[::-1]
    assert tab.locator("[data-target='1'] [aria-sort=descending]").count() == 1


def test_a_browser_without_storage_still_sorts(tab, folder):
    tab.add_init_script(
        "Object.defineProperty(window, 'sessionStorage', { get() { throw new Error('denied'); } })"
    )
    tab.goto((folder / "index.html").as_uri())
    tab.locator("[data-target='1']").get_by_role("button", name="Track").click()
    assert list_names(tab) == NAMES[::-1]


def test_the_worst_passage_plays_from_the_overview(tab, folder):
    tab.goto((folder / "index.html").as_uri())
    tab.locator("a[href*=loop]:visible").first.click()
    tab.wait_for_function("document.querySelectorAll('audio')[2]?.currentTime > 0.3")
    assert find_heard(tab) == [3]
    assert "loop 0:00.0–0:05.0" in tab.locator("#time").inner_text()


def test_a_browser_may_want_a_click_first(tab, folder):
    refuse = "() => Promise.reject(new DOMException('', 'NotAllowedError'))"
    tab.add_init_script(f"HTMLMediaElement.prototype.play = {refuse}")
    open_track(tab, folder, "#t=3&p=4&loop")
    tab.wait_for_function("document.querySelectorAll('audio')[3].currentTime === 3")
    wait_button(tab, "Play")
    assert "loop 0:03.0–0:08.0" in tab.locator("#time").inner_text()
    assert tab.locator("#fault").inner_text() == ""


def test_one_target_is_shown_at_a_time(tab, folder):
    tab.goto((folder / "index.html").as_uri())
    assert tab.locator(".sortable:visible").count() == 1
    tab.get_by_label("Target").select_option("accompaniment")
    assert tab.locator(".sortable:visible caption").inner_text() == "accompaniment"


def test_hostile_names_are_text(tab, folder):
    tab.goto((folder / "index.html").as_uri())
    tab.get_by_role("link", name=HOSTILE).first.click()
    assert tab.locator("h1").inner_text() == HOSTILE
    assert tab.title() == HOSTILE
    assert tab.locator("img[src=x]").count() == 0
    tab.get_by_role("link", name="All tracks").click()
    assert tab.locator("h1").inner_text() == "Listening page: a/eval, b/eval"


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(tab, folder, width, scheme):
    tab.set_viewport_size({"width": width, "height": 800})
    tab.emulate_media(color_scheme=scheme)
    for name in ("index.html", "tracks/1.html", "tracks/3.html"):
        tab.goto((folder / name).as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


# A track


def test_nothing_is_loaded_before_it_is_needed(tab, folder):
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    open_track(tab, folder)
    assert not [url for url in asked if url.endswith(".flac")]
    start_playing(tab)


def test_a_click_plays_from_there(tab, folder):
    open_track(tab, folder)
    click_at(tab.locator(".plot[data-player='3']"), 1 / 2)
    tab.wait_for_function("document.querySelectorAll('audio')[2].currentTime > 6.2")
    assert max(read_times(tab)) < 9
    assert find_heard(tab) == [3]
    click_at(tab.locator(".chart .plot").first, 1 / 4)
    tab.wait_for_function("document.querySelectorAll('audio')[2].currentTime < 5")
    assert read_times(tab)[2] >= 2.9
    assert find_heard(tab) == [3]


def test_switching_keeps_the_time(tab, folder):
    """Against a player that is silent throughout: the clock of the audio itself may waver."""
    open_track(tab, folder)
    start_playing(tab)
    moved = tab.evaluate("""async () => {
        const audio = [...document.querySelectorAll('audio')];
        const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
        const moved = [];
        let heard = 0;
        for (const number of [3, 7, 2, 5, 1]) {
            await pause(200);
            const before = audio[heard].currentTime - audio[3].currentTime;
            const key = String(number);
            document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
            heard = number - 1;
            const at_once = audio[heard].currentTime - audio[3].currentTime;
            await pause(100);
            const later = audio[heard].currentTime - audio[3].currentTime;
            moved.push(Math.abs(at_once - before), Math.abs(later - before));
        }
        return moved;
    }""")
    assert max(moved) < STEP
    wait_heard(tab, 1)


def test_the_players_stay_together(tab, folder):
    open_track(tab, folder)
    start_playing(tab)
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("document.querySelector('audio').currentTime > 6.2")
    times = read_times(tab)
    assert max(times) - min(times) < STEP


def test_keys(tab, folder):
    open_track(tab, folder)
    start_playing(tab)
    tab.keyboard.press("4")
    wait_heard(tab, 4)
    tab.keyboard.press("ArrowDown")
    wait_heard(tab, 5)
    tab.keyboard.press("ArrowUp")
    wait_heard(tab, 4)
    before = read_times(tab)[3]
    tab.keyboard.press("ArrowRight")
    assert before + 4.9 < read_times(tab)[3] < before + 6.5
    tab.keyboard.press("ArrowLeft")
    assert read_times(tab)[3] < before + 2
    tab.keyboard.press(" ")
    assert tab.evaluate("[...document.querySelectorAll('audio')].every(a => a.paused)")
    paused = read_times(tab)
    assert max(paused) - min(paused) < STEP


def test_l_repeats_five_seconds(tab, folder):
    open_track(tab, folder, "#t=6&p=2")
    assert tab.locator("#time").inner_text().startswith("0:06.0")
    tab.keyboard.press("l")
    assert tab.locator("#loop").get_attribute("aria-pressed") == "true"
    assert "loop 0:06.0–0:11.0" in tab.locator("#time").inner_text()
    tab.keyboard.press(" ")
    tab.wait_for_function("document.querySelectorAll('audio')[1].currentTime > 6.3")
    tab.evaluate("document.querySelectorAll('audio')[1].currentTime = 10.8")
    tab.wait_for_function("document.querySelectorAll('audio')[1].currentTime < 8")
    assert find_heard(tab) == [2]
    tab.keyboard.press("L")
    assert tab.locator("#loop").get_attribute("aria-pressed") == "false"


def test_a_link_plays_the_worst_passage_of_a_run(tab, folder):
    open_track(tab, folder)
    tab.locator(".passage").first.click()
    wait_heard(tab, 3)
    tab.wait_for_function("document.querySelectorAll('audio')[2].currentTime > 0.3")
    assert "p=3" in tab.url
    assert "loop 0:00.0–0:05.0" in tab.locator("#time").inner_text()


def test_a_loop_near_the_end_is_as_long_and_playing_enters_it(tab, folder):
    open_track(tab, folder, "#t=11&p=2")
    tab.keyboard.press("l")
    assert "loop 0:07.0–0:12.0" in tab.locator("#time").inner_text()
    for _ in range(2):
        tab.keyboard.press("ArrowLeft")
    assert tab.locator("#time").inner_text().startswith("0:00.0")
    tab.keyboard.press(" ")
    tab.wait_for_function("document.querySelectorAll('audio')[1].currentTime > 7.2")
    assert read_times(tab)[1] < 9
    tab.evaluate("document.querySelectorAll('audio')[1].currentTime = 11.9")
    tab.wait_for_function(
        "(time => time > 7.2 && time < 9)(document.querySelectorAll('audio')[1].currentTime)"
    )


@pytest.mark.parametrize("part", [0.92, 0.96, 0.999])
def test_a_click_at_the_end_plays_the_end(tab, folder, part):
    """Chromium hangs where a seek into the third block of FLAC from the end, 10.8 to 11.2 s."""
    open_track(tab, folder)
    click_at(tab.locator(".plot[data-player='3']"), part)
    tab.wait_for_function("document.querySelectorAll('audio')[2].currentTime > 10")
    wait_button(tab, "Play")
    tab.keyboard.press(" ")
    tab.wait_for_function("document.querySelectorAll('audio')[2].currentTime > 0.2")
    assert read_times(tab)[2] < 5


def test_space_plays_and_pauses_after_a_click(tab, folder):
    open_track(tab, folder)
    tab.locator(".passage").first.click()
    wait_button(tab, "Pause")
    tab.keyboard.press(" ")
    wait_button(tab, "Play")
    assert tab.evaluate("scrollY") == 0
    box = tab.get_by_label("matched loudness")
    box.click()
    tab.keyboard.press(" ")
    wait_button(tab, "Pause")
    assert not box.is_checked()


def test_space_works_what_was_reached_by_the_keyboard(tab, folder):
    open_track(tab, folder)
    press_tab_until(tab, "loop")
    tab.keyboard.press(" ")
    assert tab.locator("#loop").get_attribute("aria-pressed") == "true"
    press_tab_until(tab, "matched")
    tab.keyboard.press(" ")
    assert not tab.get_by_label("matched loudness").is_checked()
    assert tab.locator("#play").inner_text() == "Play"


def test_loudness_is_matched_until_that_is_switched_off(tab, folder):
    open_track(tab, folder)
    gain = float(tab.locator("input[name=player]").first.get_attribute("data-gain"))
    volume = "document.querySelector('audio').volume"
    assert tab.evaluate(volume) == pytest.approx(10 ** (gain / 20))
    tab.get_by_label("matched loudness").uncheck()
    assert tab.evaluate(volume) == 1


def test_it_stops_at_the_end_and_starts_again(tab, folder):
    open_track(tab, folder, "#t=11.5")
    tab.keyboard.press(" ")
    tab.wait_for_function("document.querySelector('#play').textContent === 'Pause'")
    tab.wait_for_function("document.querySelector('#play').textContent === 'Play'")
    tab.keyboard.press(" ")
    tab.wait_for_function("document.querySelector('audio').currentTime > 0.2")
    assert read_times(tab)[0] < 5


def test_everything_is_reached_by_the_keyboard(tab, folder):
    open_track(tab, folder)
    reached = set()
    for _ in range(40):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("document.activeElement.id || document.activeElement.name"))
    assert {"play", "loop", "matched", "seek", "player"} <= reached
    unnamed = tab.evaluate(
        "[...document.querySelectorAll('button, input, select')]"
        ".filter(e => !(e.textContent.trim() || e.labels?.[0]?.textContent.trim())).length"
    )
    assert unnamed == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(tab, folder, scheme):
    """WCAG 2.1, 1.4.3: at least 4.5 to 1."""
    tab.emulate_media(color_scheme=scheme)
    open_track(tab, folder)
    colors = tab.evaluate(
        "['--back', '--panel', '--notice', '--ink', '--quiet', '--link'].map(n =>"
        " getComputedStyle(document.documentElement).getPropertyValue(n).trim())"
    )
    back, panel, notice, ink, quiet, link = map(luminance, colors)
    pairs = [(b, f) for b in (back, panel) for f in (ink, quiet, link)] + [(notice, ink)]
    for background, text in pairs:
        low, high = sorted((background, text))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def luminance(color: str) -> float:
    digits = color.removeprefix("#")
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
