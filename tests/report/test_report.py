"""report/: the page is complete, self-contained, escaped, and a function of the run's folder."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from cxr_jax import report
from cxr_jax.errors import UserError
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.metrics import scores as metrics_scores
from cxr_jax.metrics.scores import Answers, Bootstrap, Reference
from cxr_jax.report import Case, markup, svg
from cxr_jax.report import cases as report_cases
from cxr_jax.report import curves as report_curves
from cxr_jax.report.__main__ import main
from cxr_jax.report.group_records import Completion, Group
from cxr_jax.report.groups import Sentence

HOSTILE = (
    '<script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(2)>\u202e\x00'
)
VOID = {"meta", "img", "line", "circle", "rect", "polyline", "br", "wbr"}


class Page(HTMLParser):
    """Elements with attributes, visible text, and whether every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text, self.script = [], [], "", ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.script += data
        else:
            self.text += data

    def all(self, tag):
        return [a for t, a in self.elements if t == tag]


def tables(n=60):
    rng = np.random.default_rng(0)
    truth = rng.random((n, 14)) < 0.3
    truth[:, 12] = False  # Fracture has no positive
    read = lambda share: np.where(rng.random((n, 14)) < share, truth, rng.random((n, 14)) < 0.3)
    out = {}
    for model, share in (("base", 0.2), ("SFT", 0.6), ("RL", 0.7)):
        others = {"blank": Answers(read(0.0)), "swapped": Answers(read(0.0))}
        out[model] = {
            s: metrics_scores.summary(
                Answers(read(share)), Reference(truth), other_images=others, bootstrap=Bootstrap(20)
            )
            for s in "AB"
        }
    return out


def curves():
    rows = []
    for step in range(100):
        row = {
            "reward": 0.5,
            "completions/mean_length": 90.0,
            "entropy": None,
            "rewards/invented/mean": 0.0,
        }
        row |= {
            "rewards/accuracy/mean": 0.4 + step / 1000,
            "rewards/trace_answer/mean": 1 - step / 1000,
        }
        rows.append(
            {
                "step": step,
                "kind": "train",
                "time": 0,
                "loss": step / 100,
                "constant/best": 0.3,
                **row,
            }
        )
        rows[-1] |= {
            "constant/no_finding": 0.2,
            "alarms/repetition": float(step in (30, 31)),
            "alarms/truncated": 0.0,
        }
        if step % 20 == 0:
            rows.append(
                {"step": step, "kind": "eval", "time": 0, "eval/A/jaccard": 0.5, "B/macro_f1": 0.2}
            )
            rows[-1]["alarms/lost_recall"] = int(step == 80)
    return rows


def case(i, **changes):
    fields = {
        "image": np.random.default_rng(i).random((40 + i, 300)),
        "prompt": "Find the abnormalities.",
        "completion": "<think>Heart is large. No effusion.</think><answer>Cardiomegaly</answer>",
        "answer": ["Cardiomegaly"],
        "truth": ["Cardiomegaly", "Edema"],
        "score": i / 10,
        "id": f"case-{i}",
        "hospital": "AB"[i % 2],
    }
    return Case(**{**fields, **changes})


def hostile_group():
    said = [
        Sentence(HOSTILE, verdict, [HOSTILE])
        for verdict in ("agrees", "contradicts", "open", HOSTILE)
    ]
    completions = [
        Completion(
            text=HOSTILE,
            length=9,
            finished=False,
            answer=[HOSTILE],
            valid_format=False,
            terms={HOSTILE: x, "format": 0.0},
            reward=2 * x,
            advantage=x,
            trained=x > 0,
            sentences=said,
        )
        for x in (-1.0, 1.0, 0.5, 0.25, 0.1)
    ]
    names = dict(truth=[HOSTILE], hedged=[HOSTILE], known=[HOSTILE], sides={HOSTILE: HOSTILE})
    return Group(
        step=3,
        id=HOSTILE,
        set=HOSTILE,
        prompt=HOSTILE,
        completions=completions,
        weights={HOSTILE: 2.0, "format": 1.0},
        kept=False,
        image=np.zeros((8, 8)),
        **names,
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text('{"task": "rl", "note": "<b>bold</b>"}')
    cases = [case(i) for i in range(6)]
    cases += [
        case(7, completion=HOSTILE, prompt=HOSTILE, id=HOSTILE, answer=[HOSTILE], truth=["Edema"])
    ]
    report.save_groups(folder, [hostile_group()])
    comparison = {
        "a": "SFT",
        "b": "RL",
        "set": "A",
        "metric": "jaccard",
        "diff": 0.01,
        "lo": -0.02,
        "hi": 0.04,
    }
    report.write_report(
        folder,
        title=f"A run {HOSTILE}",
        curves=curves(),
        tables=tables(),
        cases=cases,
        notes=[HOSTILE],
        comparisons=[comparison],
    )
    return folder


@pytest.fixture(scope="module")
def page(workdir):
    return Page((workdir / "report.html").read_text())


def test_nothing_is_loaded(workdir, page):
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "poster", "data", "action"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:image/png;base64,", "#")) or not value
        assert not any(name.startswith("on") for name in attributes)
    policy = next(
        a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:;")
    for forbidden in ("http://", "https://", "url(", "@import", "fetch(", "innerHTML"):
        assert forbidden not in page.script
    assert {t for t, _ in page.elements}.isdisjoint(
        {"iframe", "link", "object", "embed", "form", "base"}
    )


def test_hostile_text_is_text(workdir, page):
    assert len(page.all("script")) == 1
    assert "alert(" not in page.script
    assert (
        page.text.count("<script>alert(1)</script>") >= 5
    )  # title, heading, note, id, prompt, completion, chip
    raw = (workdir / "report.html").read_text()
    assert "\u202e" not in raw and "\x00" not in raw
    assert "<b>bold</b>" in page.text


def test_every_case_is_there_worst_first(workdir, page):
    images = [a for a in page.all("img") if a["alt"].startswith("Radiograph of case")]
    assert len(images) == 7 and len({a["src"] for a in images}) == 7
    cards = [a for a in page.all("article") if a["class"] == "case"]
    scores = [float(a["data-score"]) for a in cards]
    assert scores == sorted(scores) and len(cards) == 7
    assert (
        "Heart is large." in page.text
        and "missed Edema" in page.text
        and "✓ Cardiomegaly" in page.text
    )
    assert page.text.count("Invalid format. The raw text:") == 1
    assert {a["value"] for a in page.all("option")} >= {
        "Cardiomegaly",
        "Edema",
        "A",
        "B",
        "missed",
        "invalid",
    }


def test_numbers_and_warnings_are_there(workdir, page):
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    for sets in evaluation["models"].values():
        for summary in sets.values():
            for e in (summary["jaccard"], summary["macro_f1"]["all"], summary["micro_f1"]["all"]):
                assert (
                    f"{e['value']:.3f}" in page.text
                    and f"[{e['lo']:.3f}, {e['hi']:.3f}]" in page.text
                )
    for text in (
        "Phantom results",
        "Research use only. Not for diagnosis.",
        "best constant answer",
        *CHEXPERT_14,
    ):
        assert text in page.text
    assert "+0.010 [−0.020, +0.040] (the interval includes 0: no difference shown)" in page.text
    assert "real films" not in page.text


def test_curves(page):
    charts = [a for a in page.all("svg") if a.get("class") == "chart"]
    titles = [a["aria-label"] for a in charts]
    assert titles[:5] == [
        "macro-F1 on held-out images",
        "Jaccard on held-out images",
        "Reward of sampled completions",
        "Accuracy of sampled completions",
        "Reward terms: trace",
    ]
    assert "always No Finding" in page.text  # in the legend: it was logged
    assert "rewards/invented/mean" in titles[5:]  # it never moves: folded away
    assert (
        "Loss" in titles and "Entropy (nats a token)" not in titles
    )  # entropy was null throughout
    data = json.loads(charts[1]["data-chart"])
    assert data["series"] == [
        {"name": "Hospital A", "color": svg.BLUE, "points": [[s, 0.5] for s in range(0, 100, 20)]}
    ]


def test_where_alarms_rang(page):
    strip = next(a for a in page.all("svg") if a.get("aria-label") == "Alarms")
    assert "class" not in strip and not any(
        a.get("aria-label", "").startswith("alarms/") for a in page.all("svg")
    )
    assert "repetition 2 of 100 times, first at step 30: " in page.text
    assert (
        "lost recall 1 of 5 times, first at step 80" in page.text
        and "truncated 0 of" not in page.text
    )
    quiet = report_curves.section(
        [{"step": 1, "kind": "train", "reward": 1.0, "alarms/truncated": 0.0}], {}
    )
    assert "None of the 1 alarms rang." in quiet


def test_the_page_is_a_function_of_the_folder(workdir, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    before = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    assert main([str(copy)]) == 0
    assert (copy / "report.html").read_bytes() == before
    assert capsys.readouterr().out.strip().endswith("report.html")


def test_bad_folders_get_one_line(workdir, tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "has not been evaluated" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    lines = [
        line
        for line in (copy / "samples.jsonl").read_text().splitlines()
        if "cases/0000.png" in line
    ]
    (copy / "samples.jsonl").write_text(lines[0].replace("cases/0000.png", "../../secret.png"))
    with pytest.raises(UserError, match="is not a file of the folder"):
        report.render(copy)
    (copy / "samples.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="line 1"):
        report.render(copy)
    (copy / "evaluation.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 1"):
        report.render(copy)


def test_writing_again_replaces_cases_and_keeps_other_samples(tmp_path):
    other = json.dumps({"step": 3, "completion": "a rollout"})
    (tmp_path / "samples.jsonl").write_text(other + "\n")
    for n in (3, 1):
        report.save_cases(tmp_path, [case(i) for i in range(n)])
        assert len(list((tmp_path / "cases").iterdir())) == n
        assert [c.id for c in report.load_cases(tmp_path)] == [f"case-{i}" for i in range(n)]
    assert (tmp_path / "samples.jsonl").read_text().splitlines()[0] == other


def test_what_is_contaminated_says_so_over_every_section(tmp_path):
    said = report.Remarks(
        label_policy="blank=negative", contaminated="CONTAMINATED: 3 of 9 <films>"
    )
    truth = np.eye(14, dtype=bool)
    summary = metrics_scores.summary(Answers(truth), Reference(truth), bootstrap=Bootstrap(5))
    path = report.write_report(tmp_path, title="t", tables={"RL": {"A": summary}}, remarks=said)
    page = path.read_text()
    sections = page.split("<section ")[1:]
    assert len(sections) >= 3 and all(
        "CONTAMINATED: 3 of 9 &lt;films&gt;" in one for one in sections
    )
    assert (
        json.loads((tmp_path / "evaluation.json").read_text())["contaminated"] == said.contaminated
    )


def test_real_radiographs_carry_the_warning(tmp_path):
    path = report.write_report(tmp_path, title="Films", tables={}, kind="files")
    text = " ".join(Page(path.read_text()).text.split())
    assert (
        "was trained on synthetic phantoms only: its numbers on real films say nothing about patients"
        in text
    )
    assert (
        "R (patient’s right)" not in text
        and "Phantom results" not in text
        and "No evaluation was recorded" in text
    )
    with pytest.raises(ValueError, match="kind"):
        report.write_report(tmp_path, title="Films", tables={}, kind="other")


def test_only_one_hospital_and_no_audit(tmp_path):
    truth = np.eye(14, dtype=bool)
    given = {
        "base": {
            "files": metrics_scores.summary(
                Answers(truth), Reference(truth), bootstrap=Bootstrap(5)
            )
        },
        "RL": {},
    }
    page = Page(report.write_report(tmp_path, title="t", tables=given, cases=[case(0)]).read_text())
    assert (
        "Given files" in page.text
        and "not evaluated" in page.text
        and "No image-use audit" in page.text
    )


def test_marks_of_a_case():
    c = case(
        0,
        answer=["Edema", "Fracture", "Pneumonia", "Foo"],
        truth=["Edema", "Cardiomegaly", "Lung Lesion"],
    )
    c.known = [n for n in CHEXPERT_14 if n not in ("Pneumonia", "Lung Lesion")]
    assert report_cases.case_marks(c) == [
        ("missed", "Cardiomegaly"),
        ("correct", "Edema"),
        ("open", "Pneumonia"),
        ("false", "Fracture"),
        ("false", "Foo"),
    ]
    c.completion = "no tags"
    assert report_cases.case_marks(c) == [("missed", "Cardiomegaly"), ("missed", "Edema")]
    flags = np.zeros(14, np.float32)
    flags[[2, 5]] = True
    assert (
        report.label_names(flags)
        == ["Cardiomegaly", "Edema"]
        == report.label_names(("Cardiomegaly", "Edema"))
    )


def test_png_is_small_and_bounded(tmp_path):
    from PIL import Image

    (tmp_path / "x.png").write_bytes(report.png(np.full((1000, 500), np.nan)))
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (128, 256) and picture.mode == "L"
    with pytest.raises(ValueError, match="H, W"):
        report.png(np.zeros((2, 2, 3)))


def test_ticks_and_smoothing():
    assert svg.nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg.nice_ticks(-0.031, 0.047) == [-0.02, 0, 0.02, 0.04]
    assert svg.nice_ticks(3, 3) == [3]
    assert [svg.number(x) for x in (0, 0.25, -5, 1500, 1e-5, 2e6)] == [
        "0",
        "0.25",
        "−5",
        "1500",
        "1e-05",
        "2e+06",
    ]
    assert svg.smooth([(i, float(i)) for i in range(5)], 3) == [
        (0, 0.5),
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 3.5),
    ]
    assert svg._limits([0.2, 0.2 + 1e-17], False) == pytest.approx((0.18, 0.22))
    assert svg.thin([(i, i) for i in range(1000)], 10)[-1] == (999, 999)
    rows = [
        {"step": 1, "kind": "eval", "x": 1},
        {"step": 0, "kind": "eval", "x": 2},
        {"step": 1, "kind": "eval", "x": 3},
    ]
    assert report_curves.points(rows, "eval", "x") == [(0, 2), (1, 3)]
    assert markup.escape("<&\"'>\x00") == "&lt;&amp;&#34;&#39;&gt;\ufffd"


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_script_runs_in_a_browser(workdir, tmp_path):
    """Sort, filter and hover under the page's own security policy; the outcome is read back from the DOM."""
    probe = """<script>
      document.querySelector('[data-sort=best]').click();
      const set = document.getElementById('by-set'); set.value = 'B'; set.dispatchEvent(new Event('change'));
      const svg = document.querySelector('svg.chart'), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2, clientY: box.top + 9}));
      document.title = [document.getElementById('shown').textContent, document.querySelector('.case').dataset.score,
        document.querySelector('.tip').textContent].join('|');
    </script></body>"""
    path = tmp_path / "probe.html"
    path.write_text((workdir / "report.html").read_text().replace("</body>", probe))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
    ]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'p'}",
    ]
    run = subprocess.run(
        ["chromium", *flags, "--dump-dom", f"file://{path}"], capture_output=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", run.stdout.decode(), re.DOTALL)[1]
    assert title == "4 of 7 cases shown|0.7|step 40Hospital B: 0.2"


@pytest.mark.parametrize("constant", [0.0, 0.3, 0.7, 0.99])
def test_the_words_of_a_constant_stay_inside_the_picture(constant):
    estimates = {"RL": {"value": 0.9, "lo": 0.8, "hi": 1.0}}
    group = svg.ForestGroup(heading="B", color="#000", estimates=estimates, constant=constant)
    [(at, anchor)] = re.findall(
        r'<text x="([\d.]+)"[^>]* text-anchor="(\w+)">best constant',
        svg.forest("", [group], width=400),
    )
    words = 6.2 * len("best constant 0.99")  # at most, at 11 px
    left = float(at) - words * (anchor == "end")
    assert left >= 0 and left + words <= 400
