"""The whole room, real server and real browser, by the keyboard alone: a film, its window, a reading, a signature."""

import json
import re

import browser
import numpy as np
import pytest
from PIL import Image as PilImage

from cxr_jax.data.sources.phantom import PhantomSource
from cxr_jax.phantom.dicom_writer import write_dicom

pytestmark = pytest.mark.slow
# In the order of the page's buttons.
ENDINGS = ("json", "txt", "sr.dcm", "text.dcm", "sc.dcm", "fhir.json")


def test_from_a_dicom_to_a_signed_export_by_the_keyboard(room, tmp_path):
    image = np.asarray(PhantomSource("A", "test", 3).batch(np.arange(3))["image"])[2]
    write_dicom(tmp_path / "film.dcm", image, hospital="A", ap=False, seed=1)
    noise = np.random.default_rng(1).integers(0, 255, (300, 280)).astype(np.uint8)
    PilImage.fromarray(noise).save(tmp_path / "noise.png")
    with browser.launched() as chromium, browser.page_of(chromium, room.url) as page:
        page.wait_for_selector("html[data-ready=yes]")
        # ---- A film, its window, the model's view ----
        browser.upload(page, tmp_path / "film.dcm")
        page.locator("#gate.ok").wait_for()
        before = page.locator("#corner-window").text_content()
        page.keyboard.press("ArrowRight")
        assert page.locator("#corner-window").text_content() != before
        page.keyboard.press("1")
        assert page.locator("#corner-window").text_content() == before
        page.keyboard.press("v")
        page.locator("#split-words", has_text="224 \u00d7 224").wait_for()
        page.keyboard.press("v")

        # ---- A reading: every sentence, chips, a report from it ----
        page.keyboard.press("q")
        page.locator("#report-state", has_text="version 1").wait_for(timeout=120_000)
        document = page.evaluate(
            "() => fetch(`/room/readings/${new URLSearchParams(location.hash.slice(1)).get('reading')}`)"
            ".then((answer) => answer.json())"
        )
        shown = page.locator("#sentences .model-text").all_text_contents()
        assert shown == [sentence["text"] for sentence in document["trace"]]
        for key, text in document["report"].items():
            assert page.locator(f"#field-{key}").input_value() == text

        # ---- Flagged, edited, saved, signed ----
        page.keyboard.press("j")
        page.keyboard.press("f")
        page.keyboard.press("o")
        page.locator("#sentence-2.flagged").wait_for()
        page.keyboard.press("g")
        page.keyboard.press("b")
        page.keyboard.press("Control+a")
        page.keyboard.type("No free air below the diaphragm.")
        page.locator("#saved", has_text=re.compile(r"saved \d\d:")).wait_for()
        page.keyboard.press("Control+Enter")
        page.keyboard.press("Space")
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
        page.locator("#signature-state", has_text="signed by local").wait_for(timeout=60_000)

        # ---- Exports ----
        page.locator("#viewport").focus()
        exported = {}
        for count, suffix in enumerate(ENDINGS):
            page.keyboard.press("s")
            for _ in range(count):
                page.keyboard.press("Tab")
            with page.expect_download(timeout=60_000) as download:
                page.keyboard.press("Enter")
            assert download.value.suggested_filename.endswith(suffix)
            with open(download.value.path(), "rb") as file:
                exported[suffix] = file.read()
            page.locator("#viewport").focus()
        signed = json.loads(exported["json"])
        assert signed["status"] == "signed"
        assert signed["report"]["abdomen"] == "No free air below the diaphragm."
        assert b"Research use only." in exported["txt"]
        for ending in ("sr.dcm", "text.dcm", "sc.dcm"):
            assert exported[ending][128:132] == b"DICM"
        assert json.loads(exported["fhir.json"])["resourceType"] == "Bundle"

        # ---- A reload shows the same; another film begins anew ----
        page.reload()
        page.wait_for_selector("html[data-ready=yes]")
        page.locator("#sentence-2.flagged").wait_for()
        assert "signed by local" in page.locator("#signature-state").text_content()
        browser.upload(page, tmp_path / "noise.png")
        page.locator("#refusal").wait_for()
        assert page.locator("#sentences li").count() == 0
        assert page.locator("#signature-state").text_content() == "not signed"
        assert page.evaluate("() => Object.keys(localStorage)") == []
