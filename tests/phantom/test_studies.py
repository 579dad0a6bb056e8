"""Studies of several films: the second is needed, and their reports say what it shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxr_jax import phantom, rewards
from cxr_jax.data.prompts import FIND_PROMPT, NEW_PROMPT
from cxr_jax.data.sources.phantom import PhantomSource, PhantomStudies
from cxr_jax.errors import UserError
from cxr_jax.labels import phrase_reading
from cxr_jax.labels.phrase_bank import device_phrase_bank
from cxr_jax.labels.taxonomy import CHEXPERT_14
from cxr_jax.labels.text_batches import map_texts
from cxr_jax.metrics.bootstrap import Bootstrap
from cxr_jax.metrics.scores import Answers, Reference, constant_policies
from cxr_jax.phantom import report_writer, studies
from cxr_jax.phantom.constants import FINDINGS, PATHOLOGIES, POSITIVE_AT, Acquisition, Finding
from cxr_jax.phantom.studies import Change, lateral, reports

ALL = studies.STUDIES[-1]
DRAWN = 12  # films of each kind that the tests draw


def films(study):
    """The films of studies, by the program that draws those of sources: one study at a time."""
    rows = range(len(study["hidden"]))
    return np.concatenate([studies.draw_films(take(study, [row]), ALL) for row in rows])


def take(study, rows):
    return jax.tree.map(lambda leaf: leaf[np.asarray(rows)], study)


def without(study, name):
    return {key: value for key, value in study.items() if key != name}


@pytest.fixture(scope="module")
def many():
    """2,048 studies of all films of hospital A, without the films."""
    return studies.sample(phantom.example_keys(5, "test", "A", np.arange(2048)), "A", ALL)


@pytest.fixture(scope="module")
def drawn(many):
    """Studies in which the frontal hides something, and their films."""
    hiding = np.flatnonzero(np.asarray(many["hidden"]).any(1))[:DRAWN]
    study = take(many, hiding)
    return study, films(study)


# ---- The second film is needed -----------------------------------------------------------------------


def test_nothing_that_the_frontal_hides_can_be_told_from_it(drawn):
    study, shown = drawn
    nothing = study | {"scene": study["frontal"], "hidden": jnp.zeros_like(study["hidden"])}
    without_it = films(nothing)
    assert np.array_equal(shown[:, 0], without_it[:, 0])  # bit for bit
    # The lateral shows it, and as the patient had it now, the prior does not.
    change = np.abs(shown[:, 1] - without_it[:, 1]).max((1, 2))
    assert change.min() > 0.1, change
    assert np.array_equal(shown[:, 2], without_it[:, 2])
    truths = [np.asarray(phantom.labels(each["scene"])) == 1 for each in (study, nothing)]
    assert (truths[0] != truths[1]).any(1).all()


def test_the_current_film_is_the_same_whatever_the_prior(drawn):
    study, shown = drawn
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 77))(study["keys"])
    look_back = jax.jit(studies.priors.look_back, static_argnums=3)
    prior, change = look_back(study["scene"], study["hidden"], keys, "A")
    other = study | {"prior": prior, "change": change}
    again = films(other)
    assert np.array_equal(shown[:, :2], again[:, :2])
    assert np.abs(shown[:, 2] - again[:, 2]).max((1, 2)).min() > 0.1
    answers = [np.asarray(phantom.labels(studies.asked(each))) == 1 for each in (study, other)]
    assert (answers[0] != answers[1]).any(1).mean() > 0.25


def test_the_frontal_is_that_of_the_phantom_without_studies():
    plain = phantom.make_batch(5, "train", "A", [9])
    batch = studies.make_batch(5, "train", "A", [9], ALL)
    assert batch["image"].shape == (1, 3, 224, 224) and batch["image"].dtype == np.float32
    np.testing.assert_allclose(batch["image"][:, 0], plain["image"], atol=1e-6)
    assert batch["regions"].shape == (1, 12, 24, 8)
    np.testing.assert_allclose(batch["regions"][:, :, :8], plain["regions"], atol=1e-6)
    assert 0 <= batch["image"].min() and batch["image"].max() <= 1
    assert np.isfinite(batch["image"]).all() and batch["image"].std((2, 3)).min() > 0.1


def test_no_reader_of_the_frontal_alone_answers_well(many):
    """The best that can be done without the second film: to know the scene of the frontal exactly, and the rates."""
    frontal = many["frontal"]
    seen = np.asarray(phantom.labels(frontal)) == 1
    for question in (studies.asked(without(many, "change")), studies.asked(many)):
        truth = np.asarray(phantom.labels(question)) == 1
        reference = Reference(truth)
        # Name what is seen, or always the same, whichever is better.
        says = [Answers(seen), Answers(np.tile(np.array(CHEXPERT_14) == "No Finding", (2048, 1)))]
        jaccard = max(
            (np.sum(a.labels & truth, 1) / np.sum(a.labels | truth, 1)).mean() for a in says
        )
        constant = constant_policies(reference, bootstrap=Bootstrap(2))["best_jaccard"]
        assert max(jaccard, constant["jaccard"]["value"]) < 0.85
    # Whether a finding is new depends on nothing that the current film shows: not on how large it is.
    severity, change = np.asarray(frontal["severity"]), np.asarray(many["change"])
    called = severity[:, :PATHOLOGIES] >= POSITIVE_AT
    new = change[:, :PATHOLOGIES] == Change.NEW
    for part in (severity[:, :PATHOLOGIES] < 0.7, severity[:, :PATHOLOGIES] >= 0.7):
        assert abs(new[called & part].mean() - 0.40) < 0.03


# ---- What is drawn -----------------------------------------------------------------------------------


_lateral = jax.jit(lateral.render)
_lateral_regions = jax.jit(lateral.regions)


@pytest.mark.parametrize("finding", range(12), ids=FINDINGS)
def test_the_lateral_draws_a_finding_where_its_region_says(many, finding):
    scenes = jax.tree.map(np.asarray, many["scene"])
    rows = np.flatnonzero(scenes["severity"][:, finding] >= POSITIVE_AT)[:DRAWN]
    sick, keys = take(scenes, rows), many["keys"][rows]
    hidden = np.asarray(many["hidden"])[rows] & (np.arange(12) == finding)
    # Nothing else in the picture, so that the difference is this finding alone.
    sick["severity"] = sick["severity"] * (np.arange(12) == finding)
    sick["device"] = sick["device"] & (finding == Finding.SUPPORT_DEVICES)
    healthy = dict(sick, severity=sick["severity"] * 0, device=sick["device"] & False)
    films = [np.asarray(_lateral(each, hidden, keys)) for each in (sick, healthy)]
    change = np.abs(films[0] - films[1]).reshape(-1, 8, 28, 8, 28).mean((2, 4))
    region = np.asarray(_lateral_regions(sick, hidden, keys))[:, finding]
    for difference, cells in zip(change, region, strict=True):
        inside = (difference * cells).sum() / cells.sum()
        outside = difference[cells < 0.02].mean()
        assert inside > 0.002 and inside > 4 * outside, (inside, outside)


def test_a_prior_is_of_the_same_patient_and_changed_as_it_says(many):
    now, before = (jax.tree.map(np.asarray, many[name]) for name in ("scene", "prior"))
    change = np.asarray(many["change"])
    for same in ("side", "zone", "variant", "anatomy"):
        assert np.array_equal(now[same], before[same])
    trees = [Acquisition.TREE_RIGHT, Acquisition.TREE_LEFT]
    assert np.array_equal(now["acq"][:, trees], before["acq"][:, trees])
    others = np.setdiff1d(np.arange(16), [*trees, Acquisition.AP])
    assert (now["acq"][:, others] != before["acq"][:, others]).mean() > 0.99
    assert (now["noise_key"] != before["noise_key"]).any(1).all()

    more = now["severity"] - before["severity"]
    was, called = before["severity"] >= POSITIVE_AT, now["severity"] >= POSITIVE_AT
    said = {each: change == each for each in Change}
    assert np.array_equal(said[Change.NEW], called & (before["severity"] == 0))
    assert np.array_equal(said[Change.RESOLVED], was & (now["severity"] == 0))
    assert (more[said[Change.LARGER]] > 0.29).all() and was[said[Change.LARGER]].all()
    assert (more[said[Change.SMALLER]] < -0.29).all() and called[said[Change.SMALLER]].all()
    assert (more[said[Change.UNCHANGED] | said[Change.ABSENT]] == 0).all()
    assert ((before["severity"] == 0) | (before["severity"] >= 0.15)).all()
    assert before["severity"].max() <= 1
    for each in Change:
        assert said[each].any(0).sum() >= 9, each  # of nearly every finding
    had = before["device"].any(1)
    assert np.array_equal(had, before["severity"][:, Finding.SUPPORT_DEVICES] == 1)
    assert not said[Change.UNCHANGED][np.asarray(many["hidden"])].any()


def test_a_frontal_hides_what_a_lateral_shows_in_two_of_five(many):
    hidden, severity = np.asarray(many["hidden"]), np.asarray(many["frontal"]["severity"])
    assert 0.3 < hidden.any(1).mean() < 0.5
    assert (severity[hidden] == 0).all()
    assert (np.asarray(many["scene"]["severity"])[hidden] >= POSITIVE_AT).all()
    opacities = [int(finding) for finding in studies.hidden.RETROCARDIAC]
    assert (hidden[:, opacities].sum(1) <= 1).all() and hidden[:, opacities].any(0).all()


# ---- What is written ---------------------------------------------------------------------------------


@jax.jit
def _read(stream, lengths, labels, sides, bank):
    facts = phrase_reading.Truth.from_arrays(labels == 1, labels == -1, sides)
    parsed = rewards.read_bytes(stream, lengths, bank, facts)
    kept = {key: parsed["trace"][key] for key in ("state", "unread", "claims", "wrong")}
    return kept | rewards.reward_terms(parsed, labels == 1)


def read(texts, lexicon, labels, sides):
    """What completions say to a lexicon, and their terms, held against a truth."""
    bank = device_phrase_bank(None, lexicon)
    program = lambda *arguments: _read(*arguments, bank)
    return map_texts(program, texts, labels, sides)


@pytest.mark.parametrize("hospital", "AB")
@pytest.mark.parametrize("views", studies.STUDIES[1:], ids="+".join)
def test_traces_are_true_to_the_film_and_to_the_question(hospital, views):
    count = 256
    keys = phantom.example_keys(6, "test", hospital, np.arange(count))
    study = without(studies.sample(keys, hospital, views), "keys")
    asked = studies.asked(study)
    labels, sides = np.asarray(phantom.labels(asked)), np.asarray(phantom.sides(asked))
    now = np.asarray(phantom.labels(study["scene"]))
    study = jax.tree.map(np.asarray, study)
    written = [
        reports.write(take(study, row), hospital, views, np.random.default_rng(row))
        for row in range(count)
    ]
    # The answer is what is asked, in order.
    for report, state in zip(written, labels, strict=True):
        answer = [name for name, s in zip(CHEXPERT_14, state, strict=True) if s == 1]
        assert report.answer == ", ".join(answer), report.trace
    texts = [report_writer.target(report) for report in written]

    # To the parser of reports, every trace is a true report of the study as it is now.
    plain = read(texts, phantom.LEXICON, now, np.asarray(phantom.sides(study["scene"])))
    assert not plain["unread"].any() and not plain["wrong"].any()
    named = [i for i, name in enumerate(CHEXPERT_14) if name not in ("No Finding", "Lung Opacity")]
    for state in (1, -1):
        assert np.array_equal(plain["state"][:, named] == state, now[:, named] == state)

    # To the rewards, it answers the question: nothing is claimed that is not so.
    lexicon = PhantomStudies(hospital, "test", views=views).lexicon
    asked_of = read(texts, lexicon, labels, sides)
    wrong = np.flatnonzero(asked_of["wrong"])
    assert not wrong.size, written[wrong[0]].trace
    assert (asked_of["claims"] >= 6).all() and (asked_of["accuracy_hard"] == 1).all()
    assert (asked_of["trace_answer"] == 1).all()
    # What is hedged leaves the trace without No Finding, here as of one film; so does a poor inspiration.
    is_sure = ~(labels == -1).any(1) & (labels[:, 0] == 0)
    assert is_sure.sum() > 80 and (asked_of["trace_findings"][is_sure] == 1).all()
    # Another patient's truth is another.
    rolled = read(texts, lexicon, np.roll(labels, 1, axis=0), np.roll(sides, 1, axis=0))
    assert rolled["wrong"].mean() > 0.5


def test_what_a_reader_misses_is_missed_in_all_films():
    source = PhantomStudies("A", "train", 3, reader_miss=1.0, views=ALL)
    facts = source.facts(np.arange(64))
    exact = PhantomStudies("A", "train", 3, views=ALL).targets(facts, np.arange(64))
    missed = source.targets(facts, np.arange(64))
    assert sum(a != b for a, b in zip(exact, missed, strict=True)) > 5
    for full, part in zip(exact, missed, strict=True):
        names = [set(text.split("<answer>")[1][:-9].split(", ")) for text in (full, part)]
        assert names[1] - names[0] <= {"No Finding"}
        assert part.count("resolved") == full.count("resolved")


# ---- The source --------------------------------------------------------------------------------------


def test_a_source_of_studies_keeps_what_sources_promise():
    source = PhantomStudies("A", "train", 5, views=ALL)
    indices = np.array([9, 2, 40])
    whole = source.batch(indices)
    part = source.batch(indices[[2, 0]])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[[2, 0]], b), whole, part)
    assert whole["image"].shape == (3, 3, 224, 224) and whole["known"].all()
    assert np.array_equal(source.solutions(indices), whole["solution"])
    known, hedged = source.masks(indices)
    assert known.all() and np.array_equal(hedged, whole["hedged"])
    texts = source.targets(whole, indices)
    assert texts == source.targets(source.facts(indices), indices)
    [prompt] = source.prompts()
    assert source.about(indices)["prompts"] == [prompt] * 3
    films = "Current frontal: <image> Current lateral: <image> Prior frontal: <image>"
    assert prompt == f"{films}\n{NEW_PROMPT}"
    assert PhantomStudies("A", "train").prompt.endswith(f"<image>\n{FIND_PROMPT}")


def test_both_films_are_taken_at_the_site_of_the_example():
    at_sites = PhantomStudies("A", "train", 5, sites=3, views=ALL).facts(np.arange(48))
    noise = [np.asarray(at_sites[name]["acq"])[:, Acquisition.NOISE] for name in ("scene", "prior")]
    log_means = [[np.log(part[site::3]).mean() for site in range(3)] for part in noise]
    assert np.corrcoef(log_means)[0, 1] > 0.9 and np.ptp(log_means[0]) > 0.2


def test_roles_that_make_no_study_are_refused():
    for views in (
        (),
        ("lateral",),
        ("prior", "frontal"),
        ("frontal", "frontal"),
        ("frontal", "ap"),
    ):
        with pytest.raises(UserError, match=r"config\.data\.views"):
            PhantomStudies("A", "train", views=views)
    assert PhantomSource("A", "train").views == ("frontal",)
    assert PhantomStudies("A", "train", views=["frontal, prior"]).views == ("frontal", "prior")
