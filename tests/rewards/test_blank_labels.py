"""Labels that a table leaves blank: what naming them costs, equal to plain Python, and what naming everything earns."""

import jax
import numpy as np
import oracle_rewards as oracle
import pytest

from cxr_jax import rewards
from cxr_jax.evaluation import model_selection
from cxr_jax.labels import CHEXPERT_14, answers
from cxr_jax.metrics import scores
from cxr_jax.metrics.scores import Answers, Bootstrap, Reference
from experiments.analysis import blank_labels

ROWS = 256
# Share of positive, negative and uncertain cells of each label in the frontal films of CheXpert's training table.
CHEXPERT_SHARES = np.array(
    [
        *((0.089, 0.0, 0.0), (0.050, 0.089, 0.056), (0.122, 0.042, 0.035), (0.493, 0.024, 0.022)),
        *(
            (0.037, 0.004, 0.006),
            (0.257, 0.089, 0.060),
            (0.068, 0.119, 0.124),
            (0.024, 0.010, 0.084),
        ),
        *(
            (0.156, 0.006, 0.155),
            (0.093, 0.247, 0.014),
            (0.402, 0.130, 0.049),
            (0.013, 0.001, 0.009),
        ),
        *((0.039, 0.010, 0.002), (0.562, 0.029, 0.005)),
    ]
)


def text_of(names):
    return f"<think>x</think><answer>{', '.join(names)}</answer>"


def drawn(seed, rows=ROWS):
    """Random texts with their truth: (texts, solutions, known, hedged); some of what is not known is hedged."""
    rng = np.random.default_rng(seed)
    texts, solutions = [], []
    for _ in range(rows):
        names = rng.choice([*CHEXPERT_14, "Effusion"], rng.integers(0, 15), replace=False)
        texts.append(text_of(names) if rng.random() < 0.9 else ", ".join(names))
        solutions.append(", ".join(rng.choice(CHEXPERT_14, rng.integers(0, 6), replace=False)))
    known = rng.random((rows, 14)) < rng.choice([0.2, 0.7, 1.0], (rows, 1))
    return texts, solutions, known, ~known & (rng.random((rows, 14)) < 0.4)


@jax.jit
def masked_terms(parsed, solution, known, hedged):
    return rewards.reward_terms(parsed, solution, known=known, hedged=hedged)


@pytest.mark.parametrize("seed", range(4))
def test_the_price_of_a_blank_label_equals_plain_python(seed):
    texts, solutions, known, hedged = drawn(seed)
    solution = rewards.solution_mask(solutions)
    got = masked_terms(answers.parse_texts(texts), solution, known, hedged)
    for i, text in enumerate(texts):
        sets = [
            {n.lower() for n, is_in in zip(CHEXPERT_14, row[i], strict=True) if is_in}
            for row in (known, hedged)
        ]
        want = np.float32(oracle.accuracy(text, solutions[i], *sets))
        assert got["accuracy"][i] == want, (text, solutions[i], sets)
        hard = want * oracle.format_ok(text) * (oracle.tag_count(text) == 1)
        assert got["accuracy_hard"][i] == hard


def test_rewards_on_full_labels_are_what_they_were_bit_for_bit():
    texts, solutions, _, hedged = drawn(9)
    parsed, solution = answers.parse_texts(texts), rewards.solution_mask(solutions)
    plain = rewards.reward_terms(parsed, solution)
    full = masked_terms(parsed, solution, np.ones_like(solution), hedged)
    assert plain.keys() == full.keys()
    for name, values in plain.items():
        assert np.asarray(values).tobytes() == np.asarray(full[name]).tobytes(), name


@pytest.mark.parametrize("seed", range(4))
def test_scores_price_a_blank_label_as_rewards_do(seed):
    texts, solutions, known, hedged = drawn(seed)
    parsed, solution = answers.parse_texts(texts), rewards.solution_mask(solutions)
    batch = {"solution": solution, "known": known, "hedged": hedged}
    reference = Reference.from_batch(batch)
    given = Answers(np.asarray(parsed["answer"]), np.asarray(parsed["has_answer"]))
    rewarded = np.asarray(masked_terms(parsed, solution, known, hedged)["accuracy"])
    scored = scores.jaccard_rows(given, reference)
    np.testing.assert_allclose(scored[known.any(1)], rewarded[known.any(1)], rtol=1e-6)


def test_f1_counts_half_a_false_positive_for_a_blank_label():
    named = np.zeros((4, 14), bool)
    named[:, 5] = True
    truth = np.zeros_like(named)
    truth[:2, 5] = True
    known = np.ones_like(named)
    known[2:, 5] = False
    batch = {"solution": truth, "known": known, "hedged": np.zeros_like(known)}
    out = scores.summary(Answers(named), Reference.from_batch(batch), bootstrap=Bootstrap(5))
    row = out["per_label"]["Edema"]
    assert (row["tp"], row["fp"], row["n_known"], row["n_blank_named"]) == (2, 0, 2, 2)
    assert row["precision"] == 2 / 3 and row["f1"]["value"] == 4 / 5
    free = scores.summary(Answers(named), Reference(truth, known), bootstrap=Bootstrap(5))
    assert free["per_label"]["Edema"]["f1"]["value"] == 1


@pytest.fixture(scope="module")
def chexpert_like():
    """States [2000, 14] as sparse as CheXpert's, of rows with a positive label and no contradiction."""
    rng = np.random.default_rng(0)
    bounds = np.cumsum(CHEXPERT_SHARES, axis=1)
    place = (rng.random((4000, 14, 1)) > bounds).sum(2)
    states = np.array([1, 0, -1, 2])[place]
    positive = states == 1
    keep = positive.any(1) & ~(positive[:, 0] & positive[:, 1:13].any(1))
    return states[keep][:2000]


def test_naming_everything_is_not_paid_where_a_table_is_mostly_blank(chexpert_like):
    """The mechanism: at no price all 14 labels beat an honest reader; at half a price they lose to it by far."""
    table = blank_labels.table(chexpert_like)
    free, priced, negative = range(3)
    honest, everything = table["mediocre reader"], table["always all labels"]
    padded = table["mediocre reader, and all that is blank"]
    for metric in (0, 1):  # Jaccard, macro-F1
        assert everything[free][metric] > honest[free][metric]
        assert padded[free][metric] == honest[free][metric]
        for policy in (priced, negative):
            assert everything[policy][metric] < 0.7 * honest[policy][metric]
            assert padded[policy][metric] < 0.5 * honest[policy][metric]
        assert table["the truth and all that is uncertain"][priced][metric] == 1
    assert everything[priced][0] < table["always the four most frequent"][priced][0]


def test_the_reward_of_naming_everything_is_that_of_the_measurement(chexpert_like):
    states = chexpert_like[:512]
    positive, known = states == 1, np.isin(states, (0, 1))
    reference = blank_labels.references(states)["at half a price"]
    hedged = ~known & ~reference.blank
    parsed = answers.parse_texts([text_of(CHEXPERT_14)] * len(states))
    reward = masked_terms(parsed, positive, known, hedged)["accuracy_hard"]
    want = scores.jaccard_rows(Answers(np.ones_like(known)), reference)
    np.testing.assert_allclose(reward, want, rtol=1e-6)
    assert 0.2 < reward.mean() < 0.4


def test_the_constant_answers_beside_the_reward_are_scored_under_its_mask(chexpert_like):
    states = chexpert_like[:300]
    reference = blank_labels.references(states)["at half a price"]

    class Source:
        def __len__(self):
            return len(states)

        def solutions(self, indices):
            return (states == 1)[indices]

        def masks(self, indices):
            return reference.known[indices], ~reference.known[indices] & ~reference.blank[indices]

    got = model_selection.constant_baselines(Source())
    policies = scores.constant_policies(reference, bootstrap=Bootstrap(2))["policies"]
    assert got["all_labels"] == policies["all labels"]["jaccard"]
    assert got["best"] == max(policy["jaccard"] for policy in policies.values())
